"""Elastic averaging: the spring's symmetry, and when it is stable."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jdml.aggregate import elastic_average
from jdml.sharding import make_mesh
from jdml.train import make_step

K = 4


def run(tx, num_steps, slope=0.0):
    mesh = make_mesh({"data": K}, devices=jax.devices()[:K])

    def loss_fn(params, batch, key):
        return jnp.sum((params["w"] - batch) ** 2) / 2, {}

    init, step = make_step(loss_fn, optax.chain(optax.sgd(slope), tx), mesh)
    state = init({"w": jnp.zeros(1)}, 0)
    history = []
    for _ in range(num_steps):
        state, _ = step(state, np.arange(K, dtype=np.float32)[:, None])
        history.append(
            (np.asarray(state.params["w"])[:, 0], float(state.opt_state[1].center["w"][0]))
        )
    return history


def test_without_gradients_the_spring_moves_both_ends_alike():
    """Workers lose alpha of their distance, and the centre gains the sum of what they lose."""
    history = run(elastic_average("data", 1, 0.1), 6, slope=0.5)
    for (x, c), (x_next, c_next) in itertools.pairwise(history):
        gradient_part = -0.5 * (x - np.arange(K))
        np.testing.assert_allclose(x_next, x + gradient_part - 0.1 * (x - c), rtol=1e-5)
        np.testing.assert_allclose(c_next, c + 0.1 * np.sum(x - c), rtol=1e-5)


def test_the_centre_settles_at_the_optimum_of_all():
    history = run(elastic_average("data", 2, 0.9 / K), 200, slope=0.1)
    np.testing.assert_allclose(history[-1][1], np.mean(np.arange(K)), atol=1e-3)


def test_refuses_what_cannot_work():
    with pytest.raises(ValueError, match="int >= 1"):
        elastic_average("data", 0, 0.1)
    for alpha in (0.0, 1.0, float("nan")):
        with pytest.raises(ValueError, match="0 < alpha < 1"):
            elastic_average("data", 1, alpha)
    with pytest.raises(ValueError, match="unstable from alpha = 2 / 4"):
        run(elastic_average("data", 1, 0.5), 1)
