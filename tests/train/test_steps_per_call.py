"""Several steps in one call: the same steps, counted right, in the loop as well."""

import io

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console

from jdml.aggregate import average_params, mean_gradients
from jdml.communicate.frequency import delayed
from jdml.sharding import bytes_per_axis, collectives, make_mesh
from jdml.train import Checkpointer, MetricsLog, fit, make_step
from tests.train.problems import make_batch, pytree_problem

CHAINS = {
    "delayed": lambda: optax.chain(delayed(mean_gradients("data"), 1), optax.adamw(1e-2)),
    "local SGD": lambda: optax.chain(optax.sgd(0.1), average_params("data", 3)),
}
CALLS, PER_CALL = 2, 3


def noisy(loss_fn):
    """A loss that draws: equal keys show as equal losses."""

    def with_noise(params, batch, key):
        x = batch["x"] + 0.1 * jax.random.normal(key, batch["x"].shape)
        loss, metrics = loss_fn(params, {**batch, "x": x}, key)
        return loss, {**metrics, "draw": jax.random.uniform(key)}

    return with_noise


def stacked(first, num_steps):
    batches = [make_batch(i) for i in range(first, first + num_steps)]
    return jax.tree.map(lambda *xs: np.stack(xs), *batches)


class Runs:
    """The same steps taken one by one and several at once, and both programs."""

    def __init__(self, make_tx):
        self.mesh = make_mesh({"data": 4, "model": 2})
        problem = pytree_problem(self.mesh)

        def build(**kwargs):
            return make_step(
                noisy(problem.loss_fn), make_tx(), self.mesh, specs=problem.specs, **kwargs
            )

        init, self.single = build()
        self.params, self.init, self.batch = problem.params, init, make_batch(0)
        self.one_by_one, self.metrics = init(problem.params, 7), []
        for i in range(CALLS * PER_CALL):
            self.one_by_one, metrics = self.single(self.one_by_one, make_batch(i))
            self.metrics.append(metrics)
        many_init, self.many = build(steps_per_call=PER_CALL)
        self.at_once, self.stacked_metrics = many_init(problem.params, 7), []
        for call in range(CALLS):
            given = self.at_once
            batch = stacked(call * PER_CALL, PER_CALL)
            self.at_once, metrics = self.many(given, batch)
            self.stacked_metrics.append(metrics)
        self.donated = all(x.is_deleted() for x in jax.tree.leaves(given.params))


@pytest.fixture(
    scope="module", params=["local SGD", pytest.param("delayed", marks=pytest.mark.slow)]
)
def runs(request):
    return Runs(CHAINS[request.param])


def assert_equal(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_array_equal(x, y)


def test_are_the_steps_of_single_calls_to_the_last_bit(runs):
    assert int(runs.at_once.step) == CALLS * PER_CALL
    assert_equal(runs.one_by_one, runs.at_once)
    for x, y in zip(*map(jax.tree.leaves, (runs.one_by_one, runs.at_once)), strict=True):
        assert (x.sharding, x.dtype) == (y.sharding, y.dtype)
    assert runs.donated


def test_metrics_are_those_of_each_step(runs):
    for name in runs.metrics[0]:
        single = np.stack([m[name] for m in runs.metrics])
        together = np.concatenate([m[name] for m in runs.stacked_metrics])
        np.testing.assert_array_equal(single, together, err_msg=name)
    assert len({float(m["draw"]) for m in runs.metrics}) == CALLS * PER_CALL
    assert set(runs.metrics[0]) >= {"loss", "mae", "draw"}


def test_collectives_are_counted_once_for_each_step(runs):
    state = runs.init.abstract(runs.params)
    one, many = (
        collectives(step.lower(state, batch).compile(), runs.mesh)
        for step, batch in ((runs.single, runs.batch), (runs.many, stacked(0, PER_CALL)))
    )
    assert all(c.loops[:1] == (PER_CALL,) for c in many if "data" in c.axes)
    sent = [bytes_per_axis(c for c in listed if "data" in c.axes) for listed in (one, many)]
    assert sent[1] == {axes: PER_CALL * count for axes, count in sent[0].items()}
    assert sum(sent[0].values()) > 0


class Data:
    """Batches by number, NumPy or placed."""

    def __init__(self, sharding=None, position=0):
        self.position, self.sharding = position, sharding

    def __next__(self):
        batch = make_batch(self.position)
        self.position += 1
        if self.sharding is None:
            return jax.tree.map(np.asarray, batch)
        return jax.device_put(batch, self.sharding)

    def state(self):
        return {"step": self.position}


def fitted(mesh, folder, num_steps, per_call, placed=False, name="run"):
    """A run in ``folder`` that goes on from its newest checkpoint; rows, steps saved, evaluated."""
    problem = pytree_problem(mesh)
    init, step = make_step(
        problem.loss_fn, CHAINS["local SGD"](), mesh, specs=problem.specs, steps_per_call=per_call
    )
    state, evaluated = init(problem.params, 0), []
    with Checkpointer(folder / name, keep=10) as checkpointer:
        position = {"step": 0}
        if checkpointer.latest_step() is not None:
            state, position, _ = checkpointer.restore(init.abstract(problem.params))
        data = Data(NamedSharding(mesh, P("data")) if placed else None, position["step"])
        with MetricsLog(folder / f"{name}.jsonl", int(state.step)) as log:
            result = fit(
                step,
                state,
                data,
                num_steps,
                mesh=mesh,
                checkpointer=checkpointer,
                save_every=3,
                evaluate=lambda s: evaluated.append(int(s.step)) or {"val_loss": 0.0},
                eval_every=4,
                log=log,
                tokens_per_step=16,
                console=Console(file=io.StringIO()),
            )
        return result.state, log.rows, checkpointer.steps(), evaluated


@pytest.mark.slow
def test_the_loop_takes_them_and_keeps_its_promises(tmp_path):
    mesh = make_mesh({"data": 4, "model": 2})
    state, rows, saved, evaluated = fitted(mesh, tmp_path, 8, 1, name="single")
    assert (saved, evaluated) == ([3, 6, 8], [4, 8])
    for placed in (False, True):
        name = f"placed {placed}"
        first = fitted(mesh, tmp_path, 4, 2, placed, name)
        assert (first[2], first[3]) == ([4], [4])  # what fell due at 3 came after the call
        several, resumed_rows, saved, evaluated = fitted(mesh, tmp_path, 8, 2, placed, name)
        assert (saved, evaluated) == ([4, 6, 8], [8])
        assert_equal(state, several)
        differ = ("seconds", "tokens_per_second")
        plain = [
            [{k: v for k, v in row.items() if k not in differ} for row in each]
            for each in (rows, resumed_rows)
        ]
        assert plain[0] == plain[1]
        seconds = [row["seconds"] for row in resumed_rows]
        assert seconds == sorted(seconds)
    # Local SGD tells the others something every third step.
    assert [row["bytes_per_step"] > 100 for row in rows] == [i % 3 == 2 for i in range(8)]


def test_refuses_what_cannot_work(tmp_path):
    mesh = make_mesh({"data": 4, "model": 2})
    problem = pytree_problem(mesh)

    def make(n):
        return make_step(
            problem.loss_fn, CHAINS["local SGD"](), mesh, specs=problem.specs, steps_per_call=n
        )

    for wrong in (0, -1, 2.0, True):
        with pytest.raises(ValueError, match=r"steps_per_call=.*int >= 1"):
            make(wrong)
    init, step = make(3)
    state = init(problem.params, 0)
    with pytest.raises(ValueError, match=r"leaf 'x' has shape \(2, 16, 8\).*\[3, batch, ...\]"):
        step(state, stacked(0, 2))
    with pytest.raises(ValueError, match=r"leaf 'x' has shape \(16, 8\)"):
        step(state, make_batch(0))
    short = jax.tree.map(lambda x: x[:, :6], stacked(0, 3))
    with pytest.raises(ValueError, match=r"leaf 'x' has shape \(6, 8\).*4 workers"):
        step(state, short)
    with pytest.raises(ValueError, match=r"8 steps are left .*num_steps 9"):
        fit(step, state, Data(), 8, mesh=mesh)


def test_compiler_options_reach_the_compiler():
    mesh = make_mesh({"data": 4, "model": 2})
    problem = pytree_problem(mesh)
    tx = optax.chain(mean_gradients("data"), optax.sgd(0.1))
    options = {"xla_no_such_option": "true"}
    init, step = make_step(problem.loss_fn, tx, mesh, specs=problem.specs, compiler_options=options)
    state = init(problem.params, 0)
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_no_such_option"):
        step(state, make_batch(0))
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_no_such_option"):
        step.lower(state, make_batch(0)).compile()
