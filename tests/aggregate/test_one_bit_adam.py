"""1-bit Adam in its limit cases, and what it sends in each of its two phases."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jdml.aggregate import mean_gradients, one_bit_adam
from jdml.communicate import error_feedback
from jdml.communicate.codecs import int8
from jdml.sharding import collectives, make_mesh
from jdml.train import make_step
from tests.train.problems import make_batch, pytree_problem

K = 4


def program(tx, shape=None):
    shape = {"data": K} if shape is None else shape
    num_devices = int(np.prod(list(shape.values())))
    mesh = make_mesh(shape, devices=jax.devices()[:num_devices])
    problem = pytree_problem(mesh)
    init, step = make_step(problem.loss_fn, tx, mesh, specs=problem.specs)
    return mesh, problem, init, step


def train(tx, num_steps, shape=None):
    _, problem, init, step = program(tx, shape)
    state = init(problem.params, 0)
    for i in range(num_steps):
        state, metrics = step(state, make_batch(i))
    return state, metrics


def adam_state(state):
    return state.opt_state[0]


def test_warm_up_is_adam_of_the_exact_mean():
    """Bit for bit: it is the same program."""
    schedule = optax.linear_schedule(0.0, 1e-2, 4)
    state, metrics = train(one_bit_adam("data", schedule, 10, weight_decay=0.1), 6)
    adam = optax.chain(mean_gradients("data"), optax.adamw(schedule, weight_decay=0.1))
    expected, _ = train(adam, 6)
    jax.tree.map(np.testing.assert_array_equal, state.params, expected.params)
    assert metrics["branch.one_bit_adam"] == 0
    assert not any(np.any(e) for e in jax.tree.leaves(adam_state(state).residual))


@pytest.mark.slow
def test_the_variance_stays_and_the_momentum_goes_on_after_the_warm_up():
    tx = one_bit_adam("data", 1e-2, 3)
    early, _ = train(tx, 3)
    late, metrics = train(tx, 5)
    jax.tree.map(np.testing.assert_array_equal, adam_state(early).nu, adam_state(late).nu)
    assert metrics["branch.one_bit_adam"] == 1
    assert np.any(adam_state(early).mu["in"]["kernel"] != adam_state(late).mu["in"]["kernel"])
    assert np.any(adam_state(late).residual["in"]["kernel"])


def test_residuals_are_per_worker_and_moments_are_not():
    _, problem, init, _ = program(one_bit_adam("data", 1e-2, 3), {"data": 4, "model": 2})
    state = adam_state(init.abstract(problem.params))
    for x, p in zip(jax.tree.leaves(state.residual), jax.tree.leaves(problem.params), strict=True):
        assert x.shape == (4, *p.shape)
    for moment in (state.mu, state.nu):
        for x, p in zip(jax.tree.leaves(moment), jax.tree.leaves(problem.params), strict=True):
            assert x.shape == p.shape


@pytest.mark.parametrize("warmup_steps", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_equals_its_dense_form_but_for_what_the_residuals_hold(warmup_steps):
    """Signs: momentum and mean residual make the exact momentum and the last debt."""
    tx = one_bit_adam("data", 1e-2, warmup_steps)
    _, problem, init, step = program(tx)
    state, key = init(problem.params, 0), ("in", "kernel")

    def of(tree):
        return np.asarray(tree[key[0]][key[1]], np.float64)

    for i in range(warmup_steps + 3):
        before = adam_state(state)
        mu, owed = of(before.mu), of(before.residual).mean(0) if i > warmup_steps else 0
        params = jax.tree.map(np.asarray, state.params)
        state, _ = step(state, make_batch(i))
        grads = jax.grad(lambda p, b: problem.loss_fn(p, b, None)[0])(params, make_batch(i))
        after = adam_state(state)
        exact = 0.9 * mu + 0.1 * of(grads)
        now = of(after.residual).mean(0) if i >= warmup_steps else 0
        np.testing.assert_allclose(of(after.mu) + now, exact + owed, atol=1e-6)
        direction = of(after.mu) / (1 - 0.9 ** (i + 1))
        direction /= np.sqrt(of(after.nu) / (1 - 0.999 ** min(i + 1, warmup_steps))) + 1e-8
        expected = of(params) - 1e-2 * direction
        np.testing.assert_allclose(of(state.params), expected, rtol=1e-4, atol=1e-6)


def quadratic(codec, dead):
    """Steps on a block in which some elements never have a gradient; the parameters' moves."""
    mesh = make_mesh({"data": K}, devices=jax.devices()[:K])

    def loss_fn(p, batch, key):
        return jnp.mean(jnp.where(dead, 0, p["w"] - batch) ** 2), {}

    init, step = make_step(loss_fn, one_bit_adam("data", 1e-2, 2, codec=codec), mesh)
    state = init({"w": jnp.zeros(dead.shape)}, 0)
    for i in range(6):
        batch = jax.random.normal(jax.random.key(i), (K, *dead.shape)) + 1
        state, _ = step(state, batch)
    return np.asarray(state.params["w"])


@pytest.mark.slow
def test_an_element_without_variance_stays_where_it_is():
    """A codec with one magnitude for all says that it has momentum."""
    dead = np.arange(64) % 3 == 0
    moved = quadratic(one_bit_adam.__defaults__[-2], dead)
    assert not moved[dead].any()
    assert np.isfinite(moved).all()
    assert moved[~dead].all()
    assert np.abs(moved).max() < 0.2


@pytest.mark.parametrize(
    "shape", [{"data": 4}, pytest.param({"data": 4, "model": 2}, marks=pytest.mark.slow)]
)
def test_sends_floats_in_the_warm_up_and_bytes_after_it(shape):
    tx = one_bit_adam("data", 1e-2, 3, codec=error_feedback(int8(16)))
    mesh, problem, init, step = program(tx, shape)
    compiled = step.lower(init.abstract(problem.params), make_batch(0)).compile()
    found = [c for c in collectives(compiled, mesh) if c.axes == ("data",) and c.payload_bytes > 8]
    assert all(c.conditional for c in found)
    exact = [c for c in found if c.kind == "all-reduce"]
    coded = [c for c in found if c.kind != "all-reduce"]
    assert sorted({c.kind for c in coded}) == ["all-gather", "all-to-all"]
    assert all(set(c.dtypes) <= {"u8", "s8"} for c in coded)
    # A device sends its part of what the model axis divides: all but the scale.
    part = (8 * 16 + 16 + 16 * 4) // shape.get("model", 1) + 1
    assert sum(c.payload_bytes for c in exact) == 4 * part
    assert sum(c.sent_bytes for c in coded) < 0.6 * sum(c.sent_bytes for c in exact)


def test_refuses_what_cannot_work():
    for bad in (0, 2.5, True):
        with pytest.raises(ValueError, match="warmup_steps="):
            one_bit_adam("data", 1e-3, bad)
    with pytest.raises(ValueError, match=r"b1=1.0"):
        one_bit_adam("data", 1e-3, 5, b1=1.0)
    with pytest.raises(ValueError, match=r"b2=-0.1"):
        one_bit_adam("data", 1e-3, 5, b2=-0.1)
    with pytest.raises(ValueError, match="eps="):
        one_bit_adam("data", 1e-3, 5, eps=-1)
    with pytest.raises(ValueError, match="weight_decay="):
        one_bit_adam("data", 1e-3, 5, weight_decay=float("nan"))
    with pytest.raises(ValueError, match="one_bit_adam: topology="):
        one_bit_adam("data", 1e-3, 5, topology="star")
    with pytest.raises(ValueError, match="one_bit_adam: codec="):
        one_bit_adam("data", 1e-3, 5, codec=int8)
