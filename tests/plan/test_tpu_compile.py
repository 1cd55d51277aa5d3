"""The compiler asked again; needs libtpu, no TPU."""

import importlib.util

import pytest

from benchmarks.plan import CASES, entry_of, read_record
from jdml.plan.largest import largest
from jdml.plan.report import sent_by_axis

pytestmark = [
    pytest.mark.tpu_compile,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu not installed"),
]


@pytest.mark.parametrize("name", ["dots-tensor", "slices-int8", "fsdp-torus"])
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
    if layout.data == 1:  # gradients among workers are exchanged all layers at once
        found = largest(entry["collectives"], case.config, layout, case.batch, case.seq)
        assert all(one.layers <= 1 for one in found.values()), found
    slow = [row for row in entry["collectives"] if row["slow"]]
    assert bool(slow) == (case.topology.num_slices > 1)
    assert all(row["axes"] == ["data"] for row in slow)
