"""Limit cases of the methods that average models."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jdml.aggregate import average_params, bmuf, streaming_diloco
from jdml.sharding import collectives, make_mesh
from jdml.train import make_step

K = 4
BATCH = np.asarray(jax.random.normal(jax.random.key(0), (8, 3)))


def build(tx):
    mesh = make_mesh({"data": K}, devices=jax.devices()[:K])

    def loss_fn(params, batch, key):
        return jnp.sum((jnp.tanh(batch @ params["a"]) @ params["b"] - 1) ** 2), {}

    init, step = make_step(loss_fn, optax.chain(optax.sgd(0.05), tx), mesh)
    state = init({"a": jnp.ones((3, 4)) * 0.3, "b": jnp.ones((4, 2)) * 0.2}, 0)
    return mesh, state, step


def train(tx, num_steps=7):
    _, state, step = build(tx)
    for i in range(num_steps):
        state, _ = step(state, np.roll(BATCH, i, axis=0))
    return state


def outer():
    return optax.sgd(0.7, momentum=0.9, nesterov=True)


def assert_same_models(a, b):
    for x, y in zip(jax.tree.leaves(a.params), jax.tree.leaves(b.params), strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-6, atol=1e-7)


def test_one_fragment_without_delay_is_diloco():
    assert_same_models(
        train(streaming_diloco("data", 3, 1, outer())), train(average_params("data", 3, outer()))
    )


def test_fragments_take_turns_and_a_delay_moves_the_exchange():
    """P = 2, H = 4: fragments begin after steps 2 and 4, and end ``delay`` steps later."""
    for delay in (0, 1):
        _, state, step = build(streaming_diloco("data", 4, 2, outer(), delay=delay))
        agreed = []
        for i in range(7):
            state, _ = step(state, np.roll(BATCH, i, axis=0))
            agreed.append(
                "".join(
                    name if np.ptp(np.asarray(x), axis=0).max() < 1e-6 else "."
                    for name, x in sorted(state.params.items())
                )
            )
        expected = ["..", "a.", "..", ".b", "..", "a.", ".."]
        assert agreed == ([".."] * delay + expected)[:7]


def test_bmuf_without_momentum_is_model_averaging():
    assert_same_models(
        train(bmuf("data", 2, 0.0, nesterov=False)), train(average_params("data", 2))
    )


@pytest.mark.parametrize("nesterov", [True, False])
def test_bmuf_follows_its_paper(nesterov):
    """The filter's recursion, on the models that the workers had before each round ended."""
    eta, zeta, every = 1 - 1 / K, 0.8, 2
    _, state, step = build(bmuf("data", every, None, zeta, nesterov))
    w = broadcast = np.asarray(state.params["a"][0])
    d = np.zeros_like(w)
    for i in range(3 * every):
        before = jax.tree.map(jnp.copy, state.params)
        state, _ = step(state, np.roll(BATCH, i, axis=0))
        if (i + 1) % every:
            continue
        # What the workers had before they averaged: one local step more.
        single = []
        for k in range(K):
            params = jax.tree.map(lambda x, k=k: x[k], before)
            rows = np.roll(BATCH, i, axis=0)[2 * k : 2 * k + 2]
            g = jax.grad(lambda p, rows=rows: jnp.sum((jnp.tanh(rows @ p["a"]) @ p["b"] - 1) ** 2))(
                params
            )
            single.append(np.asarray(params["a"] - 0.05 * g["a"]))
        d = eta * d + zeta * (np.mean(single, axis=0) - broadcast)
        w = w + d
        broadcast = w + eta * d if nesterov else w
        np.testing.assert_allclose(state.params["a"][0], broadcast, rtol=1e-5)


def test_a_fragment_costs_its_own_bytes():
    mesh, state, step = build(streaming_diloco("data", 4, 2, outer()))
    compiled = step.lower(state, BATCH).compile()
    sent = sorted(c.payload_bytes for c in collectives(compiled, mesh) if c.conditional)
    assert sent == [4 * 8, 4 * 12]


def test_refuses_what_cannot_work():
    with pytest.raises(ValueError, match="1 <= P <= every"):
        streaming_diloco("data", 2, 3, outer())
    with pytest.raises(ValueError, match="0 <= delay < every"):
        streaming_diloco("data", 2, 1, outer(), delay=2)
    with pytest.raises(ValueError, match="0 <= mixing < 1"):
        streaming_diloco("data", 2, 1, outer(), mixing=1.0)
    with pytest.raises(ValueError, match="only 2 leaves"):
        train(streaming_diloco("data", 4, 3, outer()))
    with pytest.raises(ValueError, match="fragment_of gave"):
        train(
            streaming_diloco(
                "data", 4, 2, outer(), fragment_of=lambda p: jax.tree.map(lambda _: 0, p)
            )
        )
    with pytest.raises(ValueError, match="0 <= eta < 1"):
        bmuf("data", 2, 1.0)
    with pytest.raises(ValueError, match="zeta > 0"):
        bmuf("data", 2, 0.9, 0.0)
