"""The formulas beside what TPU's compiler made of the same steps.

``compiled.json`` is the compiler's word, written by ``python -m benchmarks.plan``;
``test_tpu_compile.py`` asks the compiler again.
"""

import pytest

from benchmarks.plan import CASES, SCALE, listed_flops, read_record
from jdml.plan.largest import largest
from jdml.plan.report import sent_by_axis

RECORD = read_record()
PUBLISHED = [name for name in SCALE if name in RECORD]

ROUGH = {
    # The compiler scatters the head's gradients with 9 % more rows, and sends these on.
    ("stages-fsdp", "fsdp"): 0.08,
}
"""Where the formulas miss by more than they may elsewhere."""


def test_at_least_eight_configurations():
    assert len(RECORD) >= 8
    assert RECORD.keys() <= CASES.keys()
    assert len(PUBLISHED) >= 5


@pytest.mark.parametrize("name", RECORD)
def test_memory_within_a_tenth(name):
    case, layout = CASES[name]
    memory, compiled = case.predict(layout).memory, RECORD[name]["memory"]
    assert memory.parameters == compiled["parameters"]
    assert memory.gradients == compiled["gradients"]
    assert memory.optimiser == pytest.approx(compiled["optimiser"], rel=0.02)
    assert memory.total == pytest.approx(sum(compiled.values()), rel=0.10)


@pytest.mark.parametrize("name", RECORD)
def test_bytes_within_a_twentieth(name):
    case, layout = CASES[name]
    predicted, compiled = sent_by_axis(case.predict(layout)), RECORD[name]["sent_by_axis"]
    total = sum(compiled.values())
    # Sums over several axes at once are those of the loss, and of norms.
    for axis, sent in compiled.items():
        assert sent < 0.01 * total or axis in predicted, axis
    for axis, sent in predicted.items():
        # The compiler's word is of a step in which models are exchanged.
        times = case.algorithm.every if axis == "data" else 1
        if max(sent * times, compiled[axis]) < 0.01 * total:
            continue
        assert sent * times == pytest.approx(compiled[axis], rel=ROUGH.get((name, axis), 0.05)), (
            axis
        )


@pytest.mark.parametrize("name", RECORD)
def test_products(name):
    case, layout = CASES[name]
    assert listed_flops(case, layout) == pytest.approx(RECORD[name]["flops"], rel=0.03)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_shapes_fit_and_a_chip_holds_its_share(name):
    case, layout = CASES[name]
    memory = RECORD[name]["memory"]
    assert sum(memory.values()) < case.topology.chip.memory
    share = 4 * case.config.num_params / (layout.fsdp * layout.model)
    # Norms are not divided over ``model``.
    assert memory["parameters"] == pytest.approx(share, rel=0.001)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_shapes_exchange_no_more_than_a_layer_at_once(name):
    case, layout = CASES[name]
    found = largest(RECORD[name]["collectives"], case.config, layout, case.batch, case.seq)
    assert found.keys() == {"parameters", "activations"}
    assert all(one.layers <= 1 for one in found.values()), found


def test_more_copies_of_the_model_cost_a_chip_nothing():
    """The same load for each chip on 64 to 1,024: no more bytes, as much work to compile."""
    names = ["llama3-8b-64", "llama3-8b-256", "llama3-8b-1024"]
    entries = [RECORD[name] for name in names if name in RECORD]
    assert len(entries) > 1
    sizes = [sum(entry["memory"].values()) for entry in entries]
    assert max(sizes) < 1.02 * sizes[0]
    seconds = [entry["compile_cpu_seconds"] for entry in entries]
    assert max(seconds) < 1.5 * min(seconds)
