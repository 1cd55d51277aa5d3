"""Both forms on one device: equal to the dense evaluation of the same routing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdml.models.experts import (
    capacity_of,
    evaluate_densely,
    evaluate_dropless,
    evaluate_with_capacity,
    places,
    route,
)
from jdml.models.experts.products import block_size, grouped, product
from jdml.models.experts.rows import collect, places_of, spread
from tests.models.experts.problem import (
    CHOICES,
    DENSE,
    EMBED,
    EXPERTS,
    SEQ,
    assert_equal,
    gradients_of,
    operands,
)

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.mark.parametrize(
    ("form", "gated"),
    [
        ("capacity", True),
        ("dropless", True),
        pytest.param("dropless", False, marks=pytest.mark.slow),
    ],
)
def test_values_and_gradients_equal_the_dense_evaluation(form, gated):
    given = operands(gated)
    got = jax.jit(gradients_of(form))(*given)
    wanted = jax.jit(gradients_of(DENSE[form]))(*given)
    assert_equal(got, wanted)
    dropped = float(got[0][1])
    assert (0.1 < dropped < 0.5) if form == "capacity" else dropped == 0


def test_places_are_given_to_first_choices_first():
    """Against the words of the docstring, one choice at a time."""
    rng = np.random.default_rng(0)
    experts = np.stack([rng.permutation(4)[:2] for _ in range(3 * 7)]).reshape(3, 7, 2)
    got = np.asarray(places(jnp.asarray(experts, jnp.int32), 4, 3))
    for sequence in range(3):
        taken = np.zeros(4, int)
        for choice in range(2):
            for position in range(7):
                expert = experts[sequence, position, choice]
                wanted = taken[expert] if taken[expert] < 3 else -1
                taken[expert] += 1
                assert got[sequence, position, choice] == wanted


def test_what_is_dropped_does_not_depend_on_the_batch():
    experts = route(jax.random.normal(jax.random.key(1), (4, 9, EXPERTS)), 2).experts
    whole = places(experts, EXPERTS, 2)
    parts = [places(experts[i : i + 1], EXPERTS, 2) for i in range(4)]
    np.testing.assert_array_equal(whole, jnp.concatenate(parts))


def test_capacity():
    assert capacity_of(1.0, 2, 64, 8) == 16
    assert capacity_of(1.25, 2, 6, 8) == 2
    assert capacity_of(100.0, 2, 6, 8) == 6  # a token's experts are different ones
    assert capacity_of(0.01, 2, 1, 8) == 1  # a token alone is never dropped: decoding


def test_every_token_to_one_expert():
    """Groups of no row, and one of all."""
    (kernels, _), x = operands()

    @jax.jit
    def run(x, kernels):
        logits = jnp.zeros((*x.shape[:2], EXPERTS)).at[..., 3].set(9.0)
        routing = route(logits, 1)
        place = places(routing.experts, EXPERTS, SEQ)
        return (
            evaluate_dropless(x, routing, kernels),
            evaluate_with_capacity(x, routing, kernels, place, SEQ),
            evaluate_densely(x, routing, kernels),
        )

    dropless, capacity, dense = run(x, kernels)
    assert_equal((dropless, capacity), (dense, dense))


def test_bfloat16_stays_bfloat16():
    (kernels, router), x = operands()

    @jax.jit
    def run(x, kernels):
        routing = route(x @ router, CHOICES)
        half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), (x, kernels))
        got = evaluate_dropless(half[0], routing, half[1])
        return got, evaluate_densely(x, routing, kernels)

    got, wanted = run(x, kernels)
    assert got.dtype == jnp.bfloat16
    # Eight bits of fraction, and three products in a row.
    np.testing.assert_allclose(got.astype(jnp.float32), wanted, atol=0.03 * jnp.abs(wanted).max())


@pytest.mark.parametrize("block", [pytest.param(1, marks=pytest.mark.slow), 8])
@pytest.mark.parametrize("mapped", [False, True])
def test_products_of_groups(block, mapped):
    """``ragged_dot`` and the loop over blocks, gradients included; mapped over two of each."""
    rng = np.random.default_rng(0)
    shape = (2, 30, 1) if mapped else (30, 1)
    group = jnp.asarray(rng.integers(0, 4, shape), jnp.int32)  # 3 is none
    x = jnp.asarray(rng.normal(size=(*shape[:-1], EMBED)), jnp.float32)
    kernels = jnp.asarray(rng.normal(size=(3, EMBED, 7)), jnp.float32)

    def run(x, kernels, group):
        where, sizes = grouped(group, 3, block)
        return collect(product(spread(x, where), kernels, sizes, block), where)[:, 0]

    def plain(x, kernels, group):
        padded = jnp.concatenate([kernels, jnp.zeros_like(kernels[:1])])
        return jnp.einsum("ri,rio->ro", x, padded[group[:, 0]])

    def gradients(function):
        value = lambda x, kernels, group: jnp.sum(jnp.sin(function(x, kernels, group)))  # noqa: E731
        both = jax.value_and_grad(value, (0, 1))
        return jax.jit(jax.vmap(both, (0, None, 0)) if mapped else both)

    assert_equal(gradients(run)(x, kernels, group), gradients(plain)(x, kernels, group))


def test_rows_moved_and_moved_back():
    target = jnp.asarray([[4, 0], [6, 2], [1, 6]], jnp.int32)  # 6 is no place
    where = places_of(target, 6)
    x = jnp.arange(6.0).reshape(3, 2) + 1
    moved = spread(x, where)
    np.testing.assert_array_equal(moved[:, 0], [1, 5, 3, 0, 1, 0])
    np.testing.assert_array_equal(collect(moved, where)[:, :, 0], [[1, 1], [0, 3], [5, 0]])
    # The gradient is that of JAX's own gather.
    weights = jnp.arange(12.0).reshape(6, 2)
    got = jax.grad(lambda x: jnp.sum(spread(x, where) * weights))(x)
    source = jnp.asarray([0, 2, 1, 3, 0, 3])
    padded = lambda x: jnp.concatenate([x, jnp.zeros((1, 2))])[source]  # noqa: E731
    np.testing.assert_array_equal(got, jax.grad(lambda x: jnp.sum(padded(x) * weights))(x))


def test_blocks_are_near_half_a_group():
    assert block_size(4096, 8, "tpu") == 1
    assert block_size(4096, 8, "cpu") == 256
    assert block_size(100, 2, "cpu") == 16
    assert block_size(6, 8, "cpu") == 8


def test_refuses_a_slack_that_sends_nothing():
    (kernels, router), x = operands()
    with pytest.raises(ValueError, match="slack must be positive"):
        evaluate_dropless(x, route(x @ router, 2), kernels, slack=0)
