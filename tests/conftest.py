"""One place decides how many devices the tests simulate and where compiled programs are cached."""

import gc
import itertools
import os
import time
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from tests.compiling import compiling_lightly

NUM_DEVICES = 8

# LLVM is given a program in one part, not in up to 32 for as many threads: they would have to share
# the cores with the other tests, and each part has its price. Read when JAX first compiles.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_cpu_parallel_codegen_split_count=1"
)

# Eight devices that factorise at once, each with a pool of threads, starve each other: a QR of
# 512 × 512 on each was seen to take minutes. Read when SciPy is first needed, which is later.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

jax.config.update("jax_platforms", os.environ.get("JAX_PLATFORMS", "cpu"))
jax.config.update("jax_num_cpu_devices", NUM_DEVICES)
jax.config.update(
    "jax_compilation_cache_dir",
    os.environ.get("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent.parent / ".cache/jax")),
)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
# Leaves out what LLVM optimises; XLA's own passes stay. Most tests compile many programs and run
# each for milliseconds.
jax.config.update("jax_disable_most_optimizations", True)


# Linux gives a process 65,530 memory maps unless told otherwise. A compiled program takes three for
# each part that LLVM was given, and whoever asks for one too many ends without a word. With this
# many, the programs hold about 2 GB.
NUM_MAPS = 20_000
MAPS = Path("/proc/self/maps")
_tests = itertools.count(1)

UNTIL = float(os.environ.get("TESTS_UNTIL", "inf"))
"""Seconds since 1970 from which on no test begins, for whoever has so much time and no more."""


def pytest_runtest_setup():
    if time.time() > UNTIL:
        pytest.skip("no time was left (TESTS_UNTIL)")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown():
    """Forgets compiled programs before they fill up the process's memory maps."""
    result = yield  # a hook, not a fixture: what the test has patched is as it was
    if next(_tests) % 20 == 0 and MAPS.exists() and MAPS.read_bytes().count(b"\n") > NUM_MAPS:
        jax.clear_caches()
        gc.collect()
    return result


@pytest.fixture(autouse=True)
def compiling_for_tpu(request, monkeypatch):
    """What tests marked ``tpu_compile`` need; nothing for the others."""
    if request.node.get_closest_marker("tpu_compile") is None:
        yield
        return
    for name, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        # libtpu lets one process at a time hold its lock file; compiling needs no device.
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }.items():
        monkeypatch.setenv(name, value)
    # A program compiled without its device can be written to the cache and not read back.
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # JAX looks at the setting once, then remembers
    with compiling_lightly(False):
        yield
    jax.config.update("jax_enable_compilation_cache", before)
    compilation_cache.reset_cache()
