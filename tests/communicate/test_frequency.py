"""When exchanges are due, and results that are used late."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jdml.aggregate import average_params, mean_gradients
from jdml.communicate import error_feedback
from jdml.communicate.codecs import int8
from jdml.communicate.frequency import delayed, is_due, post_local
from jdml.sharding import make_mesh
from jdml.train import make_step

K = 4


def rounds(every, num_steps):
    found, last = [], 0
    for steps in range(1, num_steps + 1):
        if bool(is_due(every, jnp.asarray(steps), jnp.asarray(last))):
            found.append(steps)
            last = steps
    return found


def test_a_number_is_an_interval_and_a_function_a_schedule():
    assert rounds(1, 4) == [1, 2, 3, 4]
    assert rounds(3, 10) == [3, 6, 9]
    assert rounds(post_local(3, 4), 14) == [1, 2, 3, 7, 11]
    assert rounds(lambda steps: 10 // steps, 9) == [3, 5, 6, 7, 8, 9]


def train(tx, num_steps):
    mesh = make_mesh({"data": K}, devices=jax.devices()[:K])
    data = np.asarray(jax.random.normal(jax.random.key(0), (6, 8, 3)))

    def loss_fn(params, batch, key):
        return jnp.sum((batch @ params["w"] - 1) ** 2), {}

    init, step = make_step(loss_fn, tx, mesh)
    state = init({"w": jnp.ones((3, 2))}, 0)
    history = []
    for i in range(num_steps):
        state, _ = step(state, data[i])
        history.append(np.asarray(state.params["w"]))
    return history, state


def test_post_local_sgd_is_synchronous_first_and_local_then():
    tx = optax.chain(optax.sgd(0.01), average_params("data", post_local(2, 3)))
    history, _ = train(tx, 6)
    agreed = [bool((np.ptp(w, axis=0) < 1e-6).all()) for w in history]
    assert agreed == [True, True, False, False, True, False]
    synchronous, _ = train(optax.chain(mean_gradients("data"), optax.sgd(0.01)), 2)
    np.testing.assert_allclose(history[1][0], synchronous[1], rtol=1e-6)


@pytest.mark.parametrize(
    ("codec", "steps"),
    [
        (None, 1),
        (None, 3),
        pytest.param(error_feedback(int8(4)), 1, marks=pytest.mark.slow),
        (error_feedback(int8(4)), 3),
    ],
)
def test_a_delayed_mean_is_the_mean_of_old_gradients(steps, codec):
    """At fixed parameters, T steps with a delay have summed what ``T - steps`` without it have."""
    total = optax.trace(1.0)  # the sum of all updates so far
    late = optax.chain(delayed(mean_gradients("data", codec), steps), total, optax.sgd(0.0))
    plain = optax.chain(mean_gradients("data", codec), total, optax.sgd(0.0))
    _, delayed_state = train(late, 6)
    _, plain_state = train(plain, 6 - steps)
    np.testing.assert_array_equal(
        delayed_state.opt_state[1].trace["w"], plain_state.opt_state[1].trace["w"]
    )


def test_no_delay_is_the_transformation_itself():
    plain, _ = train(optax.chain(mean_gradients("data"), optax.adam(0.1)), 4)
    wrapped, _ = train(optax.chain(delayed(mean_gradients("data"), 0), optax.adam(0.1)), 4)
    np.testing.assert_array_equal(plain, wrapped)


def test_refuses_what_cannot_work():
    with pytest.raises(ValueError, match="int >= 0"):
        delayed(mean_gradients("data"), -1)
    with pytest.raises(ValueError, match="int >= 1"):
        average_params("data", 0)
    with pytest.raises(ValueError, match="at least 0"):
        post_local(-1, 2)


# --- What a delay costs --------------------------------------------------------------------------


def quadratic(rate_times_curvature, steps, num_steps):
    """Distance from the optimum of ``L w^2 / 2`` under ``sgd(rate)``, delayed; L in two places."""
    mesh = make_mesh({"data": K}, devices=jax.devices()[:K])
    rates = jnp.asarray(rate_times_curvature)  # one problem for each

    def loss_fn(params, batch, key):
        return 0.5 * jnp.sum(rates * params["w"] ** 2) + 0 * jnp.sum(batch), {}

    tx = optax.chain(delayed(mean_gradients("data"), steps), optax.sgd(1.0))
    init, step = make_step(loss_fn, tx, mesh, steps_per_call=num_steps)
    state = init({"w": jnp.ones(rates.shape)}, 0)
    state, _ = step(state, np.zeros((num_steps, K)))
    return np.abs(np.asarray(state.params["w"]))


@pytest.mark.parametrize("steps", [0, 1, 2, 4])
def test_a_delay_is_stable_up_to_the_rate_that_theory_says(steps):
    """On a quadratic of curvature L, ``w <- w - eta L w_{t - tau}`` converges if and only if
    ``eta L < 2 sin(pi / (2 (2 tau + 1)))``: 2, 1, 0.618, 0.347 for a delay of 0, 1, 2, 4.
    """
    bound = 2 * np.sin(np.pi / (2 * (2 * steps + 1)))
    num_steps = 300 * (steps + 1)
    within, beyond = quadratic([0.95 * bound, 1.05 * bound], steps, num_steps)
    assert within < 1e-2
    assert beyond > 1e2
    # The roots of z^(tau+1) - z^tau + eta L say the same.
    for factor, stable in ((0.95, True), (1.05, False)):
        roots = np.roots(
            [1, -1, *[0] * (steps - 1), factor * bound] if steps else [1, factor * bound - 1]
        )
        assert (np.abs(roots).max() < 1) == stable


@pytest.mark.slow
def test_at_a_low_rate_a_delay_costs_its_own_length_and_no_more():
    """Least squares below ``eta L = tau^tau / (tau + 1)^(tau + 1)``, where nothing overshoots: the
    gradients of ``tau`` steps ago are longer than today's, so that the delayed run is never behind
    the run without delay of ``tau`` steps before.
    """
    mesh = make_mesh({"data": K}, devices=jax.devices()[:K])
    x = np.asarray(jax.random.normal(jax.random.key(0), (128, 8)))
    y = x @ np.linspace(-1, 1, 8)
    rate = 0.08 / np.linalg.eigvalsh(2 * x.T @ x / len(x))[-1]
    num_steps = 80
    batches = {"x": np.tile(x, (num_steps, 1, 1)), "y": np.tile(y, (num_steps, 1))}

    def loss_fn(params, batch, key):
        return jnp.mean((batch["x"] @ params["w"] - batch["y"]) ** 2), {}

    losses = {}
    for steps in (0, 1, 2, 4):
        tx = optax.chain(delayed(mean_gradients("data"), steps), optax.sgd(rate))
        init, step = make_step(loss_fn, tx, mesh, steps_per_call=num_steps)
        _, metrics = step(init({"w": jnp.zeros(8)}, 0), batches)
        losses[steps] = np.asarray(metrics["loss"])
    for steps, late in losses.items():
        np.testing.assert_array_equal(late[: steps + 1], late[0])
        assert (late[steps:] <= losses[0][: num_steps - steps] * (1 + 1e-5)).all()
        assert (late[steps + 1 :] < late[steps:-1]).all()
    assert losses[4][-1] < 0.02 * losses[4][0]
