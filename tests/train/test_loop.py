import io
import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rich.console import Console

from jdml.aggregate import average_params, mean_gradients
from jdml.communicate import error_feedback
from jdml.communicate.codecs import int8
from jdml.sharding import make_mesh
from jdml.train import Checkpointer, MetricsLog, fit, make_evaluate, make_step, read_metrics
from jdml.train.report import comparison, write_report
from tests.train.problems import make_batch, pytree_problem


class Data:
    """Batches by number, which can be told to send this process a signal."""

    def __init__(self, signal_at=None):
        self.position = 0
        self.signal_at = signal_at

    def __next__(self):
        if self.position == self.signal_at:
            os.kill(os.getpid(), signal.SIGTERM)
        self.position += 1
        return make_batch(self.position - 1)

    def state(self):
        return {"step": self.position}

    def restore(self, state):
        self.position = state["step"]


@pytest.fixture(scope="module")
def mesh():
    return make_mesh({"data": 4, "model": 2})


def build(mesh, tx=None):
    problem = pytree_problem(mesh)
    tx = tx or optax.chain(mean_gradients("data", error_feedback(int8(16))), optax.adam(1e-2))
    return problem, *make_step(problem.loss_fn, tx, mesh, specs=problem.specs)


def run(mesh, folder, num_steps, data=None, tx=None):
    """One call of ``fit``, from the newest checkpoint if there is one."""
    problem, init, step = build(mesh, tx)
    data = data or Data()
    with Checkpointer(folder / "checkpoints") as checkpointer:
        state = init(problem.params, 0)
        if checkpointer.latest_step() is not None:
            state, position, _ = checkpointer.restore(init.abstract(problem.params))
            data.restore(position)
        evaluate = make_evaluate(problem.loss_fn, mesh)
        with MetricsLog(folder / "metrics.jsonl", int(state.step)) as log:
            result = fit(
                step,
                state,
                data,
                num_steps,
                mesh=mesh,
                checkpointer=checkpointer,
                save_every=3,
                evaluate=lambda s: evaluate(step.consensus(s)[0], [make_batch(50)]),
                eval_every=4,
                log=log,
                tokens_per_step=16,
                console=Console(file=io.StringIO()),
            )
    return result, log.rows


def assert_equal(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("method", ["int8", pytest.param("local", marks=pytest.mark.slow)])
def test_stopping_and_resuming_changes_nothing(mesh, tmp_path, method):
    codec = error_feedback(int8(16))
    tx = (
        optax.chain(optax.adam(1e-2), average_params("data", 4, codec=codec))
        if method == "local"
        else optax.chain(mean_gradients("data", codec), optax.adam(1e-2))
    )
    whole, rows = run(mesh, tmp_path / "whole", 8, tx=tx)
    assert whole.finished
    stopped, _ = run(mesh, tmp_path / "parts", 8, Data(signal_at=4), tx=tx)
    assert not stopped.finished
    assert int(stopped.state.step) == 5
    resumed, resumed_rows = run(mesh, tmp_path / "parts", 8, tx=tx)
    assert resumed.finished
    assert_equal(whole.state, resumed.state)
    # Time differs, and the stopped run evaluated where it stopped.
    differ = ("seconds", "tokens_per_second", "val_loss", "val_mae")
    without = [
        [{k: v for k, v in row.items() if k not in differ} for row in rs]
        for rs in (rows, resumed_rows)
    ]
    assert without[0] == without[1]
    assert rows[-1]["val_loss"] == resumed_rows[-1]["val_loss"]
    assert read_metrics(tmp_path / "parts" / "metrics.jsonl") == resumed_rows


def test_rows_tell_loss_time_and_bytes(mesh, tmp_path):
    result, rows = run(mesh, tmp_path, 5)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert [row["step"] for row in rows if "val_loss" in row] == [4, 5]
    assert all(row["bytes_sent"] == row["step"] * row["bytes_per_step"] for row in rows)
    assert 0 < rows[0]["seconds"] < rows[-1]["seconds"]
    # A shard of 101 floats on each device of 'model', in blocks of 16, for four workers.
    assert rows[0]["bytes_per_step"] < 0.6 * 2 * 3 / 4 * 4 * 201
    again, same = run(mesh, tmp_path, 5)
    assert (again.finished, same) == (True, rows)
    assert_equal(again.state, result.state)


@pytest.mark.slow
def test_the_second_signal_is_not_held_back(mesh, tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    run(mesh, tmp_path, 3, Data(signal_at=1))
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_torn_or_later_row_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": i, "seconds": 0.5 * i} for i in range(1, 4)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows) + '{"step": 4, "sec')
    with MetricsLog(path, resume_step=2) as log:
        assert log.rows == rows[:2]
        log.append({"step": 3, "seconds": 9.0})
    assert read_metrics(path) == [*rows[:2], {"step": 3, "seconds": 9.0}]
    with MetricsLog(path) as log:
        assert log.rows == []
    assert read_metrics(path) == []


@pytest.mark.parametrize("text", ["my notes\n", "[1, 2]\n", '{"loss": 1}\n'])
def test_another_file_is_not_overwritten(tmp_path, text):
    path = tmp_path / "metrics.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match="no metrics log"):
        MetricsLog(path)
    assert path.read_text() == text


def test_report_compares_and_draws(tmp_path):
    def rows(factor, sent):
        return [
            {"step": i, "loss": factor * 3 / i, "bytes_sent": sent * i}
            | ({"val_loss": factor * 3 / i} if i % 2 == 0 else {})
            for i in range(1, 5)
        ]

    runs = {"int8": rows(1.01, 254_000), "exact": rows(1.0, 1_000_000)}
    line = comparison("int8", runs["int8"], "exact", runs["exact"], "nats")
    assert "+1.00% in loss" in line
    assert "0.254 × in bytes" in line
    folder = write_report(tmp_path / "report", runs, [line], unit="nats")
    assert (folder / "loss.png").stat().st_size > 10_000
    assert (folder / "summary.txt").read_text() == line + "\n"
    written = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [r["run"] for r in written] == ["int8"] * 4 + ["exact"] * 4


def test_evaluation_needs_a_batch(mesh):
    with pytest.raises(ValueError, match="no batches"):
        make_evaluate(lambda p, b, k: (p, {}), mesh)(jnp.ones(()), [])
