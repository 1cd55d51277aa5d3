"""What the library says that it sends, what XLA compiles, and what leaves the interface, agree."""

import jax
import pytest

from benchmarks import wire_audit
from benchmarks.methods import method, sending_codecs
from benchmarks.namespaces import NamespacesUnavailable
from benchmarks.wire_audit import NUM_WORKERS, Row, all_methods, compiled_bytes, formula

SIDE = 64
# A pattern moves rows of bytes, whatever packed them: every codec in two phases, and over the other
# patterns what is not packed, whole bytes, bits, and bytes beside an index code.
OVER_EVERY_PATTERN = ("exact", "int8", "one_bit", "top 1 % + int8")
TPU_METHODS = (
    "exact",
    "int8",
    "int8 ring",
    "int8 tree",
    "int8 hierarchical",
    "int8 broadcast",
    "int4 reduce_scatter",
    "top 1 % + int8 all_gather",
    "power_sgd 4",
)


def compiled_for_cpu() -> list[str]:
    return [
        name
        for name in all_methods()
        if method(name).codec in OVER_EVERY_PATTERN or method(name).pattern == "two_phase"
    ]


# What LLVM makes of a program changes nothing in what it sends.
@pytest.mark.parametrize("name", compiled_for_cpu())
def test_the_program_for_cpu_sends_what_the_formula_says(name):
    row = formula(name, SIDE)
    assert row.formula > 0
    assert compiled_bytes(name, SIDE, jax.devices()[:NUM_WORKERS]) == row.formula


@pytest.mark.tpu_compile
@pytest.mark.parametrize("name", TPU_METHODS)
def test_the_program_for_tpu_sends_what_the_formula_says(name):
    try:
        devices = wire_audit.tpu_devices()
    except RuntimeError as reason:
        pytest.skip(str(reason))
    assert compiled_bytes(name, SIDE, devices) == formula(name, SIDE).formula


@pytest.mark.slow
def test_interfaces_count_the_formula_and_its_framing():
    # The programs' bytes are held to the formulas above; here is what Gloo makes of each kind of
    # collective, of floats and of bytes.
    names = [n for n in all_methods() if method(n).codec == "int8"]
    names += ["exact", "exact reduce_scatter", "exact all_to_all", "exact broadcast"]
    names += ["bf16", "top 1 % + int8", "power_sgd 4"]
    try:
        counted = wire_audit.interface_bytes(names, side=256, rounds=3, timeout_s=200)
    except NamespacesUnavailable as reason:
        pytest.skip(f"no network namespaces on this machine: {reason}")
    for name in names:
        row = formula(name, 256)
        row.interface = counted[name]
        assert row.agrees(), f"{name}: {row.interface:.0f} counted, {row.formula} claimed"


def test_every_codec_goes_over_every_pattern():
    names = all_methods()
    assert len(set(names)) == len(names)
    for codec in ("exact", "int8"):
        patterns = [method(name).pattern for name in names if method(name).codec == codec]
        assert sorted(patterns) == sorted(wire_audit.PATTERNS)
    assert {method(name).codec for name in names} == set(sending_codecs())


@pytest.mark.parametrize(
    ("cpu", "tpu", "interface", "agrees"),
    [
        (None, None, None, True),
        (1000, 1000, 1000.0, True),
        (1000, 1001, None, False),
        (999, None, None, False),
        (1000, None, 999.0, False),
        (1000, None, 1050.0 + 2 * wire_audit.PER_MESSAGE, True),
        (1000, None, 1051.0 + 2 * wire_audit.PER_MESSAGE, False),
    ],
)
def test_accounts_agree_or_not(cpu, tpu, interface, agrees):
    row = Row("int8", formula=1000, num_hops=2, cpu=cpu, tpu=tpu, interface=interface)
    assert row.agrees() == agrees
