"""A small model in three parts, its parameters and batch, for the tests beside it."""

import jax
import jax.numpy as jnp
import numpy as np

from jdml.sharding import make_mesh

WIDTH, HIDDEN, SAMPLES = 8, 16, 24


def first(others, batch, key):
    return jnp.tanh(batch["x"] @ others["in"])


def block(params, x, batch, key):
    hidden = jax.nn.silu(x @ params["up"])
    if key is not None:
        hidden = jnp.where(jax.random.bernoulli(key, 0.9, hidden.shape), hidden, 0.0)
    return x + hidden @ params["down"]


def last(others, x, batch, key):
    # The head reads a parameter of its own and the initial part's.
    error = x @ others["out"] + 0.1 * (x @ others["in"].T)[:, :3] - batch["y"]
    return jnp.mean(error**2), {"absolute": jnp.mean(jnp.abs(error))}


def make_params(num_layers):
    keys = jax.random.split(jax.random.key(0), 4)
    normal = lambda key, *shape: 0.3 * jax.random.normal(key, shape)  # noqa: E731
    return {
        "in": normal(keys[0], WIDTH, WIDTH),
        "out": normal(keys[1], WIDTH, 3),
        "layers": {
            "up": normal(keys[2], num_layers, WIDTH, HIDDEN),
            "down": normal(keys[3], num_layers, HIDDEN, WIDTH),
        },
    }


def make_batch(samples=SAMPLES):
    rng = np.random.default_rng(0)
    return {
        "x": rng.normal(size=(samples, WIDTH)).astype(np.float32),
        "y": rng.normal(size=(samples, 3)).astype(np.float32),
    }


def mesh_of(**axes):
    count = int(np.prod(list(axes.values())))
    return make_mesh(axes, devices=jax.devices()[:count])


def close(got, want):
    # f32, sums in another order: a few ulps of the largest entry.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            a, b, rtol=0, atol=2e-6 * max(1e-3, np.abs(b).max())
        ),
        jax.device_get(got),
        jax.device_get(want),
    )
