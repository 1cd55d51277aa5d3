"""Two programs train one model; what was measured is kept, judged, and not measured again."""

import dataclasses
import importlib.util
import json

import jax
import numpy as np
import pytest

from benchmarks.namespaces import NamespacesUnavailable
from benchmarks.time_to_loss import __main__ as benchmark
from benchmarks.time_to_loss.picture import draw
from benchmarks.time_to_loss.problem import (
    ONE_BIT_ADAM,
    Problem,
    Shape,
    Task,
    is_decayed,
    write_problem,
)
from benchmarks.time_to_loss.results import AtRate, Phase, Result, load, verdicts

TINY = Task(
    shape=Shape(num_layers=2, embed_dim=32, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=48),
    num_workers=2,
    batch=2,
    seq_len=16,
    steps=28,
    eval_every=14,
    eval_batches=1,
)
needs_torch = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="PyTorch is not installed"
)


@pytest.fixture(scope="module")
def problem(tmp_path_factory):
    path = tmp_path_factory.mktemp("problem") / "problem.npz"
    write_problem(TINY, path)
    return path


def test_the_default_task_is_of_three_million_parameters():
    from jdml.models import TransformerConfig

    config = TransformerConfig(**dataclasses.asdict(Shape()))
    assert 2.9e6 < config.num_params < 3.2e6


def test_workers_share_out_the_rows(problem):
    whole = Problem(str(problem), 0, 1)
    parts = [Problem(str(problem), k, 2) for k in range(2)]
    assert whole.train.shape == (28, 4, 17)
    np.testing.assert_array_equal(np.concatenate([p.train for p in parts], axis=1), whole.train)
    np.testing.assert_array_equal(np.concatenate([p.valid for p in parts], axis=1), whole.valid)
    assert whole.rates[0] == 0
    assert len(whole.rates) == TINY.steps


def test_tasks_are_told_apart():
    assert TINY.fingerprint() != Task().fingerprint()
    assert Task().fingerprint() == Task().fingerprint()


@needs_torch
def test_the_twin_has_the_loss_and_the_gradient_of_the_model(problem):
    import torch

    from benchmarks.time_to_loss.twin import Twin, to_jdml, to_torch
    from benchmarks.time_to_loss.worker_jdml import loss_of, tree_of
    from jdml.sharding import no_mesh
    from jdml.sharding.paths import leaves_with_paths

    whole = Problem(str(problem), 0, 1)
    with no_mesh():
        loss, gradient = jax.jit(
            jax.value_and_grad(lambda p: loss_of(TINY.shape)(p, whole.train[0], None)[0])
        )(tree_of(whole.weights))
    twin = Twin(TINY.shape)
    twin.load_state_dict(to_torch(whole.weights, TINY.shape))
    twin_loss = twin(torch.from_numpy(whole.train[0]).long())
    twin_loss.backward()
    assert float(twin_loss.detach()) == pytest.approx(float(loss), rel=1e-6)
    found = to_jdml({n: p.grad for n, p in twin.named_parameters()}, whole.weights)
    wanted = dict(leaves_with_paths(gradient))
    assert found.keys() == wanted.keys()
    for name, x in wanted.items():
        np.testing.assert_allclose(found[name], x, atol=1e-5 * np.abs(x).max(), err_msg=name)
    decayed = {n for n, _ in twin.named_parameters() if is_decayed(n)}
    assert len(decayed) == 2 + 2 * 7  # embedding, head, and seven kernels in each of two layers


@pytest.mark.slow
def test_a_run_in_miniature_is_measured_once(tmp_path, capsys):
    methods = ("exact", "int8", ONE_BIT_ADAM)
    if importlib.util.find_spec("torch") is not None:
        methods += ("torch f32",)
    options = benchmark.Options(
        task=TINY,
        rates=(100.0,),
        methods=methods,
        target=10.0,
        timed_steps=1,
        out=tmp_path,
        timeout_s=200,
    )
    console = benchmark.console_of_tables()
    try:
        results = benchmark.run(options, console)
    except NamespacesUnavailable as reason:
        pytest.skip(f"no network namespaces on this machine: {reason}")
    for result in results.values():
        assert len(result.losses) == TINY.steps
        assert [step for step, _ in result.validation] == [0, 14, 28]
        phases = 2 if result.name == ONE_BIT_ADAM else 1
        assert [len(phase.seconds) for phase in result.rates["100"].phases] == [1] * phases
        assert result.steps_to(10.0) == 0
    if "torch f32" in results:
        np.testing.assert_allclose(results["torch f32"].losses, results["exact"].losses, rtol=1e-4)
    before = {file.name: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    benchmark.run(options, console)
    assert {file.name: file.stat().st_mtime_ns for file in tmp_path.iterdir()} == before
    for table in benchmark.report(options, results):
        console.print(table)
    printed = capsys.readouterr().out
    assert "Time to 10 over 100 Mbit/s" in printed
    pytest.importorskip("matplotlib")
    assert draw(results, ["100"], 10.0, tmp_path / "picture.png").stat().st_size > 10_000


def result(name: str, step_seconds: float, final: float = 1.0, alone: float = 0.1) -> Result:
    return Result(
        name,
        "task",
        losses=[4.0, 2.0, 1.0],
        validation=[(0, 5.0), (10, 3.0), (20, final)],
        alone=[alone],
        rates={"50": AtRate([Phase(0, [step_seconds], 1e6)], [4.0])},
    )


def test_time_to_a_loss_between_two_validations():
    one = result("int8", step_seconds=0.5)
    assert one.steps_to(5.0) == 0
    assert one.steps_to(2.0) == 15
    assert one.seconds_to(2.0, "50") == 7.5
    assert one.exchange_seconds("50") == pytest.approx(0.4)
    assert one.steps_to(0.9) is None
    assert one.seconds_to(0.9, "50") is None


def test_a_run_too_short_to_be_timed_is_refused(tmp_path):
    plan = benchmark.Plan(TINY, (50.0,), timed_steps=10, full=False, out=tmp_path)
    plan.check("exact")
    with pytest.raises(ValueError, match=r"1-bit Adam: 13 steps from number 0 .* has 4 there"):
        plan.check(ONE_BIT_ADAM)


def test_phases_add_up():
    at = AtRate([Phase(0, [3.0], 9e6), Phase(30, [0.5, 0.4, 0.6], 1e6)], [])
    assert at.seconds_of(10) == 30
    assert at.seconds_of(30) == 90
    assert at.seconds_of(40) == pytest.approx(95)
    assert at.step_seconds == 0.5
    assert at.sent_bytes == 1e6


def test_targets():
    results = {
        r.name: r
        for r in (
            result("exact", 3.0),
            result("int8", 0.5, final=1.005),
            result("int4", 0.4, final=1.02),
            result("torch f32", 3.0),
            result("torch bf16", 1.5),
        )
    }
    lines = verdicts(results, 2.0, "50")
    assert all(line.met for line in lines)
    assert "int8: +0.50 % of exact" in str(lines[0])  # int4 is faster, and 2 % off
    assert "6.0 times faster" in str(lines[1])  # 3 / 0.5
    assert "int8 6.0 s" in str(lines[2])
    slow = results | {"int8": result("int8", 2.0)}
    assert [line.met for line in verdicts(slow, 2.0, "50")] == [True, False, False]
    none_near = results | {"int8": result("int8", 0.5, final=1.02)}
    (line,) = verdicts(none_near, 2.0, "50")
    assert not line.met


def test_results_are_kept_for_their_task_alone(tmp_path):
    one = result("top 1 % + int8 + EF all_gather", 0.5)
    one.save(tmp_path)
    (file,) = tmp_path.iterdir()
    assert file.name == "top-1-percent-with-int8-with-EF-all-gather.json"
    assert json.loads(file.read_text())["rates"]["50"]["phases"][0]["seconds"] == [0.5]
    again = load(tmp_path, one.name, "task")
    assert again.rates["50"].step_seconds == 0.5
    assert again.steps_to(2.0) == 15
    assert not load(tmp_path, one.name, "another").losses
    assert not load(tmp_path, "int8", "task").losses
