"""0/1 Adam in its limit cases, its two schedules, and what it sends on which steps."""

import jax
import numpy as np
import optax
import pytest

from jdml.aggregate import mean_gradients, zero_one_adam
from jdml.communicate import error_feedback
from jdml.communicate.codecs import int8
from jdml.sharding import bytes_per_axis, collectives
from tests.aggregate.test_one_bit_adam import program, train
from tests.train.problems import make_batch

NEVER = 10**6
VARIANCE, MOMENTUM = "branch.zero_one_adam.variance", "branch.zero_one_adam.momentum"


def one_model(state):
    """The parameters, which must be equal on all workers."""

    def first(x):
        np.testing.assert_allclose(x, np.broadcast_to(x[:1], x.shape), atol=1e-7)
        return x[0]

    kernel = state.params["in"]["kernel"]
    return jax.tree.map(first, state.params) if kernel.ndim == 3 else state.params


@pytest.mark.parametrize("max_interval", [pytest.param(1, marks=pytest.mark.slow), 4])
@pytest.mark.parametrize(
    "schedule", [pytest.param(1e-2, marks=pytest.mark.slow), optax.linear_schedule(0.0, 1e-2, 4)]
)
def test_with_both_schedules_at_every_step_it_is_adam(max_interval, schedule):
    """With an exact codec, to rounding; a rate of 0 loses no momentum."""
    tx = zero_one_adam(
        "data",
        schedule,
        NEVER,
        kappa=NEVER,
        max_interval=max_interval,
        weight_decay=0.1,
        codec=None,
    )
    state, metrics = train(tx, 6)
    adam = optax.chain(mean_gradients("data"), optax.adamw(schedule, weight_decay=0.1))
    expected, _ = train(adam, 6)
    for x, y in zip(
        jax.tree.leaves(one_model(state)), jax.tree.leaves(expected.params), strict=True
    ):
        np.testing.assert_allclose(x, y, atol=1e-6)
    assert metrics[VARIANCE] == 1


def test_exchanges_when_its_schedules_say():
    tx = zero_one_adam("data", 1e-2, 10, kappa=2, double_every=4, max_interval=3)
    _, problem, init, step = program(tx)
    state, variances, momenta = init(problem.params, 0), [], []
    for i in range(24):
        before = jax.tree.map(np.asarray, state.opt_state.nu)
        state, metrics = step(state, make_batch(i))
        if metrics[VARIANCE]:
            variances.append(i)
        else:
            jax.tree.map(np.testing.assert_array_equal, before, state.opt_state.nu)
        if metrics[MOMENTUM]:
            momenta.append(i)
            one_model(state)
            assert not any(np.any(u) for u in jax.tree.leaves(state.opt_state.progress))
        else:
            kernel = np.asarray(state.params["in"]["kernel"])
            assert np.abs(kernel - kernel[:1]).max() > 1e-4
    # Intervals 1, 1, 2, 2, 4, 4 and no more from step 10 on.
    assert variances == [0, 1, 2, 4, 6]
    # Every step while fewer than 10 + 4 were taken, then every second, from 10 + 8 on every third.
    assert momenta == [*range(13), 14, 16, 19, 22]


def test_equals_its_dense_form_but_for_what_the_residuals_hold():
    """Signs, after local steps: momentum and mean residual make the exact mean and last debt."""
    tx = zero_one_adam("data", 1e-2, 2, double_every=1, max_interval=2)
    _, problem, init, step = program(tx)
    state, compared = init(problem.params, 0), 0

    def of(tree):
        return np.asarray(tree["in"]["kernel"], np.float64)

    def gradient(params, i, worker):
        batch = jax.tree.map(lambda x: x[4 * worker : 4 * (worker + 1)], make_batch(i))
        return of(jax.grad(lambda p: problem.loss_fn(p, batch, None)[0])(params))

    for i in range(7):
        params, before = jax.tree.map(np.asarray, (state.params, state.opt_state))
        state, metrics = step(state, make_batch(i))
        after = state.opt_state
        if not metrics[MOMENTUM]:
            continue
        rate = 1e-2 / (1 - 0.9 ** (i + 1))
        said = []
        for k in range(4):
            g = gradient(jax.tree.map(lambda x: x[k], params), i, k)  # noqa: B023
            mu = 0.9 * of(before.mu)[k] + 0.1 * g
            said.append((of(before.progress)[k] + rate * mu) / (before.rate + rate))
        exact = np.mean(said, axis=0) + of(before.residual).mean(0)
        mu = of(after.mu)[0]
        np.testing.assert_allclose(mu + of(after.residual).mean(0), exact, atol=1e-6)
        root = np.sqrt(of(after.nu) / (1 - 0.999 ** int(after.num_variances))) + 1e-8
        expected = of(before.anchor) - (before.rate + rate) * mu / root
        # Where the variance is small, the momentum's rounding is divided by its root.
        np.testing.assert_allclose(of(state.params)[0], expected, rtol=1e-4, atol=1e-5)
        compared += before.rate > 0
    assert compared >= 2


def test_without_local_steps_there_is_one_model_and_one_momentum():
    def per_worker(max_interval):
        tx = zero_one_adam("data", 1e-2, 3, max_interval=max_interval)
        _, problem, init, _ = program(tx, {"data": 4, "model": 2})
        state = init.abstract(problem.params)
        fields = {"params": state.params, **state.opt_state._asdict()}
        return {
            name
            for name, tree in fields.items()
            if name != "metrics" and any(x.shape[:1] == (4,) for x in jax.tree.leaves(tree))
        }

    assert per_worker(1) == {"residual"}
    assert per_worker(2) == {"residual", "params", "mu", "progress"}


@pytest.mark.slow
@pytest.mark.parametrize("shape", [{"data": 4}, {"data": 4, "model": 2}])
def test_sends_floats_for_the_variance_and_bytes_for_the_momentum(shape):
    tx = zero_one_adam("data", 1e-2, 3, max_interval=2, codec=error_feedback(int8(16)))
    mesh, problem, init, step = program(tx, shape)
    compiled = step.lower(init.abstract(problem.params), make_batch(0)).compile()
    found = [c for c in collectives(compiled, mesh) if c.axes == ("data",) and c.payload_bytes > 8]
    assert all(c.conditional for c in found)
    part = (8 * 16 + 16 + 16 * 4) // shape.get("model", 1) + 1
    exact = [c for c in found if c.kind == "all-reduce"]
    assert sum(c.payload_bytes for c in exact) == 4 * part
    coded = [c for c in found if c.kind != "all-reduce"]
    assert sorted({c.kind for c in coded}) == ["all-gather", "all-to-all"]
    assert all(set(c.dtypes) <= {"u8", "s8"} for c in coded)


def test_a_step_sends_what_its_metrics_say():
    """Counted on the branches that they name: nothing but the loss and its metric on local ones."""
    codec = error_feedback(int8(16))
    tx = zero_one_adam("data", 1e-2, 2, kappa=1, double_every=1, max_interval=4, codec=codec)
    mesh, problem, init, step = program(tx)
    state = init(problem.params, 0)
    listed = collectives(step.lower(state, make_batch(0)).compile(), mesh)
    sent = {}
    for i in range(8):
        state, metrics = step(state, make_batch(i))
        taken = {m.removeprefix("branch."): int(metrics[m]) for m in (VARIANCE, MOMENTUM)}
        sent[tuple(taken.values())] = bytes_per_axis(listed, taken=taken)[("data",)]
    assert sorted(sent) == [(0, 0), (0, 1), (1, 1)]
    numbers = 8 * 16 + 16 + 16 * 4 + 1
    losses = 2 * 4 * 2 * 3 // 4
    assert sent[0, 0] == losses
    # Filled up to blocks, the leaves have 224 numbers; a worker's chunk of them, four blocks.
    assert sent[0, 1] == losses + 2 * 3 * codec.codec.payload_bytes(4 * 16)
    assert sent[1, 1] - sent[0, 1] == 4 * numbers * 2 * 3 / 4


def test_refuses_what_cannot_work():
    for what in ("freeze_step", "kappa", "double_every", "max_interval"):
        given = {"freeze_step": 5, what: 0}
        with pytest.raises(ValueError, match=f"{what}=0"):
            zero_one_adam("data", 1e-3, **given)
    with pytest.raises(ValueError, match=r"b2=1.0"):
        zero_one_adam("data", 1e-3, 5, b2=1.0)
    with pytest.raises(ValueError, match="zero_one_adam: codec="):
        zero_one_adam("data", 1e-3, 5, codec=int8)
    tx = zero_one_adam("data", 1e-3, 5)
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update({}, tx.init({}))
