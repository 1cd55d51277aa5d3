"""``dynamic_loss_scale``: nothing but rounding of float16 may tell that it was there."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jdml.aggregate import mean_gradients
from jdml.communicate import error_feedback
from jdml.communicate.codecs import int8
from jdml.sharding import make_mesh
from jdml.train import Checkpointer, dynamic_loss_scale, make_step
from jdml.train.loss_scale import check_outermost

K, WIDTH = 2, 8


def loss_fn(params, batch, key):
    """A product in float16, whose gradient is as small as ``batch["weight"]`` makes it."""
    del key
    h = batch["x"].astype(jnp.float16) @ params["w"].astype(jnp.float16)
    return jnp.mean(batch["weight"] * h.astype(jnp.float32) ** 2), {}


def f32_loss_fn(params, batch, key):
    """In float32, but for what it is given."""
    del key
    return jnp.mean((batch["x"].astype(jnp.float16).astype(jnp.float32) @ params["w"]) ** 2), {}


def chain():
    return optax.chain(mean_gradients("data", error_feedback(int8(16))), optax.adam(1e-2))


def build(loss_fn, tx):
    mesh = make_mesh({"data": K}, devices=jax.devices()[:K])
    init, step = make_step(loss_fn, tx, mesh)
    return init({"w": jnp.ones((WIDTH, WIDTH))}, 0), step


def batch(i, weight=1.0):
    x = jax.random.normal(jax.random.key(i), (2 * K, WIDTH))
    return {"x": x, "weight": jnp.full((2 * K, 1), weight)}


def host(tree):
    return jax.tree.map(np.asarray, tree)


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture(scope="module")
def scaled():
    """State and step of a scale of 2^15 that grows after two finite steps, to 2^17 at most."""
    tx = dynamic_loss_scale(chain(), "data", growth_every=2, most=2.0**17)
    return build(loss_fn, tx)


def start_again(scaled):
    return jax.tree.map(jnp.copy, scaled[0]), scaled[1]


@pytest.mark.slow
def test_powers_of_two_change_no_bit():
    """float32 has the range: the same parameters, moments and residuals, whatever the scale."""
    state, step = build(f32_loss_fn, chain())
    other, scaled_step = build(f32_loss_fn, dynamic_loss_scale(chain(), "data", growth_every=2))
    for i in range(3):
        state, metrics = step(state, batch(i))
        other, scaled_metrics = scaled_step(other, batch(i))
        assert metrics["loss"] == scaled_metrics["loss"]
    assert float(other.opt_state.loss_scale) == 2.0**16
    assert_equal(host(other.params), host(state.params))
    assert_equal(host(other.opt_state.inner), host(state.opt_state))


def test_one_workers_overflow_is_everybodys_step_not_taken(scaled):
    state, step = start_again(scaled)
    state, _ = step(state, batch(0))
    before = host((state.params, state.opt_state.inner))
    bad = batch(1)
    bad["x"] = bad["x"].at[0].set(1e5)  # beyond float16, on the first worker alone
    state, metrics = step(state, bad)
    assert_equal(host((state.params, state.opt_state.inner)), before)
    assert int(state.step) == 2
    assert float(state.opt_state.loss_scale) == 2.0**14
    assert (float(metrics["branch.finite"]), float(metrics["skipped_steps"])) == (0, 1)
    state, metrics = step(state, batch(2))
    assert float(metrics["branch.finite"]) == 1
    assert not np.array_equal(np.asarray(state.params["w"]), before[0]["w"])


def test_a_scale_grows_after_so_many_finite_steps_up_to_the_most(scaled):
    state, step = start_again(scaled)
    found = []
    for i in range(7):
        state, metrics = step(state, batch(i, weight=1e-3))
        found.append(float(metrics["loss_scale"]))
    assert found == [2.0**k for k in (15, 16, 16, 17, 17, 17, 17)]


def test_small_gradients_are_not_lost(scaled):
    """Of 1e-8, which float16 rounds to 0, the scaled step still takes Adam's."""
    plain, plain_step = build(loss_fn, chain())
    state, step = start_again(scaled)
    tiny = batch(0, weight=1e-9)
    plain, _ = plain_step(plain, tiny)
    state, _ = step(state, tiny)
    np.testing.assert_array_equal(plain.params["w"], 1.0)
    assert float(jnp.max(jnp.abs(state.params["w"] - 1.0))) > 1e-4


def test_it_resumes(scaled, tmp_path):
    state, step = start_again(scaled)
    state, _ = step(state, batch(0))
    with Checkpointer(tmp_path) as saver:
        saver.save(1, state, wait=True)
        restored = saver.restore(scaled[0]).state
    state, _ = step(state, batch(1))
    again, _ = step(restored, batch(1))
    assert_equal(host(again.opt_state), host(state.opt_state))
    assert float(again.opt_state.loss_scale) == 2.0**16


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"initial": 1000.0}, "initial=1000.0; expected a power of two"),
        ({"factor": 0.5}, "expected a power of two over 1"),
        ({"initial": 2.0**30}, r"outside \[least=1.0"),
        ({"growth_every": 0}, "expected an int >= 1"),
    ],
)
def test_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        dynamic_loss_scale(optax.sgd(1.0), "data", **kwargs)


def test_refused_where_it_does_nothing():
    def loss_fn(params, batch, key):
        del key
        return jnp.mean(batch["x"].astype(jnp.bfloat16) @ params["w"].astype(jnp.bfloat16)), {}

    state, step = build(loss_fn, dynamic_loss_scale(chain(), "data"))
    with pytest.raises(ValueError, match="nothing in the loss is float16"):
        step(state, batch(0))


def test_refused_inside_a_chain():
    tx = optax.chain(dynamic_loss_scale(optax.sgd(1.0), "data"), optax.adam(1.0))
    with pytest.raises(ValueError, match="around the whole chain"):
        check_outermost(jax.eval_shape(tx.init, {"w": jnp.ones(2)}))
