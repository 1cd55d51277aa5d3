"""One place decides how many devices the tests simulate and where compiled programs are cached."""

import os
from pathlib import Path

import jax

NUM_DEVICES = 8

jax.config.update("jax_platforms", os.environ.get("JAX_PLATFORMS", "cpu"))
jax.config.update("jax_num_cpu_devices", NUM_DEVICES)
jax.config.update(
    "jax_compilation_cache_dir",
    os.environ.get("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent.parent / ".cache/jax")),
)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
