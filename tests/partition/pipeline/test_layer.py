"""A layer taken apart against ``jax.vjp`` of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdml.partition.pipeline.layer import make_layer


def block(params, x, key):
    params = jax.tree.map(lambda p: p.astype(x.dtype), params)
    hidden = jax.nn.gelu(x @ params["up"] + params["bias"])
    kept = jax.random.bernoulli(key, 0.9, hidden.shape)
    return x + jnp.where(kept, hidden, 0.0) @ params["down"]


def of_scan(params, x, key):
    stacked = jax.tree.map(lambda p: jnp.stack([p, 2 * p]), params)
    return jax.lax.scan(lambda x, p: (block(p, x, key), None), x, stacked)[0]


@pytest.fixture
def arguments():
    keys = jax.random.split(jax.random.key(0), 4)
    params = {
        "up": jax.random.normal(keys[0], (8, 16)),
        "bias": jnp.ones(16),
        "down": jax.random.normal(keys[1], (16, 8)),
    }
    x, dy = (jax.random.normal(key, (4, 8)) for key in keys[2:])
    return params, x, jax.random.key(7), dy


def products(f, *arguments):
    """Matrix products in a traced function, those inside calls included."""
    return str(jax.make_jaxpr(f)(*arguments)).count("dot_general")


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("f", [block, jax.checkpoint(block), of_scan])
def test_gradients_are_those_of_vjp(f, split, arguments):
    params, x, key, dy = arguments
    # Operation by operation: the split opens calls, and XLA rounds in another way in a whole call.
    with jax.disable_jit(f is not of_scan):
        y, pull = jax.vjp(lambda p, x: f(p, x, key), params, x)
        layer = make_layer(f, params, x, key, split)
        out, kept, for_w = layer.forward(params, x, key)
        assert [(a.shape, a.dtype) for a in kept] == [(s.shape, s.dtype) for s in layer.kept]
        if split:
            dx, crossing = layer.backward_input(params, key, kept, for_w, dy)
            dp = layer.backward_params(params, key, for_w, crossing)
            assert [a.shape for a in crossing] == [s.shape for s in layer.crossing]
        else:
            assert not for_w
            assert not layer.crossing
            dx, dp = layer.backward(params, key, kept, dy)
        jax.tree.map(np.testing.assert_array_equal, (out, (dp, dx)), (y, pull(dy)))


def test_parameters_and_what_is_made_of_them_are_not_kept(arguments):
    params, x, key, _ = arguments
    layer = make_layer(block, params, x.astype(jnp.bfloat16), key, split=False)
    shapes = {s.shape for s in layer.kept}
    # Neither the kernels, nor their casts, nor the mask of the key's making.
    assert shapes == {(4, 8), (4, 16)}
    assert all(s.dtype != bool for s in layer.kept)
    assert [s.shape for s in make_layer(jax.checkpoint(block), params, x, key, False).kept] == [
        (4, 8)
    ]


def test_each_product_is_in_one_of_the_halves(arguments):
    """Of a block's four products backward, two make dx and two make parameters' gradients."""
    params, x, key, dy = arguments
    layer = make_layer(block, params, x, key, split=True)
    _, kept, for_w = layer.forward(params, x, key)
    b = lambda kept, for_w, dy: layer.backward_input(params, key, kept, for_w, dy)  # noqa: E731
    _, crossing = b(kept, for_w, dy)
    w = lambda for_w, crossing: layer.backward_params(params, key, for_w, crossing)  # noqa: E731
    assert products(b, kept, for_w, dy) == 2
    assert products(w, for_w, crossing) == 2


def test_a_loop_over_parameters_is_not_split(arguments):
    params, x, key, dy = arguments
    layer = make_layer(of_scan, params, x, key, split=True)
    _, kept, for_w = layer.forward(params, x, key)
    _, crossing = layer.backward_input(params, key, kept, for_w, dy)
    w = lambda for_w, crossing: layer.backward_params(params, key, for_w, crossing)  # noqa: E731
    assert products(w, for_w, crossing) == 0
