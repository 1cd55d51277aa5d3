"""The compiler asked again; needs libtpu, no TPU."""

import dataclasses
import importlib.util

import pytest

from benchmarks.plan import CASES, entry_of, read_record
from jdml.plan import Layout, parse_topology
from jdml.plan.largest import largest
from jdml.plan.report import sent_by_axis

pytestmark = [
    pytest.mark.tpu_compile,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu not installed"),
]


def test_more_copies_cost_a_chip_nothing():
    """The same load for each chip on 16 and 256: as many bytes, and about as long to compile."""
    small, _ = CASES["fsdp-tensor"]
    found = []
    for shape, copies in (("4x4", 2), ("16x16", 32)):
        topology = parse_topology(f"v5e:{shape}")
        case = dataclasses.replace(small, topology=topology, batch=8 * copies, seq=512)
        layout = Layout(copies, 4, 2)
        found.append(entry_of(case.compile(layout)))
        # Gradients of workers are joined as far as the compiler likes.
        rows = [row for row in found[-1]["collectives"] if row["axes"] != ["data"]]
        for one in largest(rows, case.config, layout, case.batch, case.seq).values():
            assert one.layers <= 1, one
    few, many = (sum(entry["memory"].values()) for entry in found)
    assert many < 1.02 * few
    assert found[1]["flops"] == found[0]["flops"]
    assert found[1]["compile_cpu_seconds"] < 2 * found[0]["compile_cpu_seconds"]


@pytest.mark.parametrize(
    "name",
    [
        "fsdp-torus",
        pytest.param("dots-tensor", marks=pytest.mark.slow),
        pytest.param("slices-int8", marks=pytest.mark.slow),
    ],
)
def test_the_compiler_says_what_the_record_says(name):
    case, layout = CASES[name]
    entry, recorded, predicted = (
        entry_of(case.compile(layout)),
        read_record()[name],
        case.predict(layout),
    )
    held = sum(entry["memory"].values())
    assert predicted.memory.total == pytest.approx(held, rel=0.10)
    assert entry["memory"]["activations"] == recorded["memory"]["activations"]
    assert entry["flops"] == recorded["flops"]
    for axis, sent in sent_by_axis(predicted).items():
        assert sent == pytest.approx(entry["sent_by_axis"][axis], rel=0.05), axis
    share = 4 * case.config.num_params / (layout.fsdp * layout.model)
    assert entry["memory"]["parameters"] == pytest.approx(share, rel=0.001)
    rows = [row for row in entry["collectives"] if row["axes"] != ["data"]]
    found = largest(rows, case.config, layout, case.batch, case.seq)
    assert all(one.layers <= 1 for one in found.values()), found
    slow = [row for row in entry["collectives"] if row["slow"]]
    assert bool(slow) == (case.topology.num_slices > 1)
    assert all(row["axes"] == ["data"] for row in slow)
