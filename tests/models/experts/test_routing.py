"""Choices as ``top_k`` makes them, and the losses against their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdml.models.experts import (
    balance_of,
    importance_loss,
    load_balance_loss,
    route,
    router_z_loss,
)

EXPERTS = 6


@pytest.fixture(scope="module")
def logits():
    return 2 * jax.random.normal(jax.random.key(0), (3, 5, EXPERTS))


@pytest.mark.parametrize("k", [1, 2, EXPERTS])
def test_softmax_of_the_largest(logits, k):
    routing = route(logits, k)
    largest, experts = jax.lax.top_k(logits, k)
    np.testing.assert_array_equal(routing.experts, experts)
    np.testing.assert_allclose(routing.weights, jax.nn.softmax(largest), rtol=1e-6)


@pytest.mark.parametrize("k", [1, 3])
def test_largest_of_the_softmax(logits, k):
    routing = route(logits, k, "softmax_then_top_k")
    weights, experts = jax.lax.top_k(jax.nn.softmax(logits), k)
    np.testing.assert_array_equal(routing.experts, experts)
    np.testing.assert_allclose(routing.weights, weights, rtol=1e-6)


@pytest.mark.parametrize("value", [0.0, -np.inf, np.nan])
def test_experts_of_a_token_differ_whatever_its_logits(value):
    experts = route(jnp.full((1, EXPERTS), value), 4).experts
    np.testing.assert_array_equal(experts, [[0, 1, 2, 3]])


def test_switchs_router_learns_through_its_weight_and_mixtrals_with_one_choice_does_not(logits):
    def slope(order):
        return jnp.abs(jax.grad(lambda x: route(x, 1, order).weights.sum())(logits)).max()

    assert slope("softmax_then_top_k") > 0.01
    assert slope("top_k_then_softmax") == 0


def test_losses_by_their_definitions(logits):
    routing = route(logits, 2)
    flat = np.asarray(logits, np.float64).reshape(-1, EXPERTS)
    probability = np.exp(flat) / np.exp(flat).sum(1, keepdims=True)
    counts, importance = np.zeros(EXPERTS), np.zeros(EXPERTS)
    for token in flat:
        best = np.argsort(-token)[:2]
        counts[best] += 1
        importance[best] += np.exp(token[best]) / np.exp(token[best]).sum()
    wanted = EXPERTS * np.sum(counts / counts.sum() * probability.mean(0))
    assert float(load_balance_loss(routing)) == pytest.approx(wanted, rel=1e-5)
    wanted = importance.var() / importance.mean() ** 2
    assert float(importance_loss(routing)) == pytest.approx(wanted, rel=1e-5)
    wanted = np.mean(np.log(np.exp(flat).sum(1)) ** 2)
    assert float(router_z_loss(routing)) == pytest.approx(wanted, rel=1e-5)
    busiest = float(balance_of(routing).busiest)
    assert busiest == pytest.approx(counts.max() / counts.mean(), rel=1e-6)


def test_losses_at_their_ends():
    """Even use: 1 and 0; all tokens to one expert, surely: E and E − 1 (Switch; Shazeer)."""
    even = route(20.0 * jnp.eye(EXPERTS), 1)
    assert float(load_balance_loss(even)) == pytest.approx(1)
    assert float(importance_loss(even)) == pytest.approx(0, abs=1e-6)
    one = route(jnp.tile(20.0 * jnp.eye(EXPERTS)[:1], (9, 1)), 1)
    assert float(load_balance_loss(one)) == pytest.approx(EXPERTS, rel=1e-5)
    assert float(importance_loss(one)) == pytest.approx(EXPERTS - 1, rel=1e-5)
    assert float(balance_of(one).busiest) == EXPERTS


@pytest.mark.parametrize("loss", [load_balance_loss, importance_loss, router_z_loss])
def test_a_step_against_the_gradient_lowers_the_loss(logits, loss):
    value = jax.value_and_grad(lambda x: loss(route(x, 2)))
    before, slope = value(logits)
    assert float(value(logits - 0.1 * slope / jnp.abs(slope).max())[0]) < float(before)


def test_a_balanced_router_is_learnt():
    """Tokens that all prefer one expert are spread by the loss alone."""
    x = jax.random.normal(jax.random.key(0), (64, 16)).at[:, 0].set(3.0)
    router = jnp.zeros((16, 4)).at[0, 1].set(1.0)

    @jax.jit
    def descend(router, _):
        slope = jax.grad(lambda r: load_balance_loss(route(x @ r, 1)))(router)
        return router - 0.3 * slope, load_balance_loss(route(x @ router, 1))

    _, losses = jax.lax.scan(descend, router, None, length=300)
    assert float(losses[0]) > 2
    assert float(losses[-1]) < 1.15


def test_refuses(logits):
    for k in (0, EXPERTS + 1):
        with pytest.raises(ValueError, match=f"expected 1 to {EXPERTS} choices"):
            route(logits, k)
    with pytest.raises(ValueError, match="order must be one of"):
        route(logits, 2, "softmax")
