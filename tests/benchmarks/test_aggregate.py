"""The benchmark of aggregations, small: both sides train alike; what is measured is kept."""

import jax
import numpy as np
import pytest

from benchmarks.aggregate import __main__ as benchmark
from benchmarks.aggregate.cases import CASES, HANDS, OPTIMIZERS
from benchmarks.aggregate.hand import hand_written
from benchmarks.aggregate.measure import Bench, Seconds, Size, Times, check_phase, open_between
from benchmarks.aggregate.passes import Count
from jdml.models import TransformerConfig
from jdml.train import make_step
from tests.aggregate.methods import METHODS

TINY = Size(
    samples=1,
    seq=8,
    model=TransformerConfig(
        num_layers=1, embed_dim=8, num_heads=1, num_kv_heads=1, head_dim=8, mlp_dim=8, remat="none"
    ),
)


@pytest.fixture(scope="module")
def bench():
    return Bench(TINY)


@pytest.mark.slow
def test_a_method_and_its_hand_written_steps_train_alike(bench):
    """So they do the same work, alone and together."""
    name = "average_params"
    case = CASES[name]
    init, step = make_step(lambda p, b, k: (bench.loss_fn(p, b), {}), case.tx(), bench.mesh)
    ours = init(bench.params)
    optimizer = OPTIMIZERS[case.optimizer]()
    made = [
        hand_written(bench.loss_fn, optimizer, HANDS[phase], bench.mesh) for phase in case.phases
    ]
    hand = made[0][0](bench.params)
    for (_, hand_step), phase in zip(made, case.phases, strict=True):
        ours, metrics = step(ours, bench.batch)
        hand, loss = hand_step(hand, bench.batch)
        check_phase(name, phase, metrics)
        np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-6)
        for x, y in zip(jax.tree.leaves(ours.params), jax.tree.leaves(hand[0]), strict=True):
            np.testing.assert_allclose(x, y, atol=1e-6)


@pytest.mark.slow
def test_both_kinds_of_steps_are_timed(bench):
    measured = bench.measure("average_params", 2)
    assert set(measured) == {"alone", "exchange"}
    for times in measured.values():
        assert len(times.ours) == len(times.hand) == 2
        assert all(x > 0 for x in times.summary().values())


def test_ratios_are_of_the_same_round():
    times = Times(
        ours=[Seconds(1.0, 1.0), Seconds(30.0, 1.0), Seconds(3.3, 1.0)],
        hand=[Seconds(1.0, 2.0), Seconds(10.0, 2.0), Seconds(3.0, 2.0)],
    )
    summary = times.summary()
    assert summary["ratio"] == pytest.approx(1.1)
    assert summary["cpu_ratio"] == 0.5
    assert summary["ours"] == 3.3


def test_what_was_measured_is_kept(tmp_path, monkeypatch):
    asked = []

    class Counted:
        def __init__(self, size):
            pass

        def measure(self, name, rounds, most):
            asked.append(name)
            return {"alone": Times([Seconds(1.0, 1.0)], [Seconds(1.0, 1.0)])}

    monkeypatch.setattr(benchmark, "Bench", Counted)
    kept = tmp_path / "rows.json"

    def run(*methods, rounds=1):
        return benchmark.main(benchmark.Options(TINY, rounds, methods=methods, json=kept))

    assert run("bmuf") == 0
    assert run("bmuf", "choco") == 0
    assert asked == ["bmuf", "choco"]
    run("bmuf", rounds=2)
    assert asked == ["bmuf", "choco", "bmuf"]


def test_rounds_go_on_while_a_target_is_within_the_bounds():
    def of(*ratios):
        return Times([Seconds(x, x) for x in ratios], [Seconds(1.0, 1.0)] * len(ratios))

    assert of(*np.arange(1, 10)).summary()["low"] == 2  # ranks 2 and 8 of 9: 96 of 100
    assert of(*np.arange(1, 10)).summary()["high"] == 8
    assert open_between("alone", of(1.0, 1.2))
    assert not open_between("alone", of(1.0, 1.04))
    assert not open_between("exchange", of(1.11, 1.2))


def test_a_step_without_exchange_passes_over_parameters_as_plain_training_does():
    count = Count(64)
    alone = count.hand("alone", "adamw")
    averaged = count.method("average_params, outer (DiLoCo)")
    assert averaged.alone == pytest.approx(alone, rel=0.01)
    # The distance from the anchor (3), its sum (2) and mean (2), the momentum (3), the anchor (4),
    # and its copy (2).
    assert averaged.exchange - alone < 16.1


def test_misses_are_told():
    row = {"alone": {"ratio": 1.08, "low": 1.06}, "exchange": {"ratio": 1.11, "low": 1.09}}
    assert benchmark.over(row) == ["alone"]
    with pytest.raises(ValueError, match="in none of mean_gradients"):
        benchmark.chosen(benchmark.Options(methods=("nobody",)))
    with pytest.raises(RuntimeError, match="took branches"):
        check_phase("gossip", "alone", {"branch.gossip": 1.0})


def test_every_method_is_there():
    measured = {name.split(",")[0].split(" ")[0] for name in CASES}
    others = {
        "EASGD": "elastic_average",
        "DiLoCo": "average_params",
        "streaming": "streaming_diloco",
    }
    for name in METHODS:
        first = name.split(",")[0].split(" ")[0]
        assert others.get(first, first) in measured, name
