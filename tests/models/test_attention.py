"""Attention and rotary positions against what they must equal."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jdml.models.transformer.attention import attend, rotary, rotate

pytestmark = pytest.mark.usefixtures("one_device")


def test_attend_equals_jax():
    query, key, value = jax.random.normal(jax.random.key(0), (3, 2, 4, 10, 6))
    wanted = jax.nn.dot_product_attention(
        *(x.transpose(0, 2, 1, 3) for x in (query, key, value)), is_causal=True
    )
    np.testing.assert_allclose(
        attend(query, key, value).transpose(0, 2, 1, 3), wanted, rtol=1e-5, atol=1e-6
    )


def test_attention_by_jax(make, tokens, forward):
    """The same model but for rounding; cuDNN's is refused where there is no GPU to run it."""
    wanted = forward(make(), tokens)
    got = forward(make(attention="xla"), tokens)
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="takes no float32"):
        make(attention="cudnn")
    with pytest.raises(ValueError, match="is for NVIDIA GPUs"):
        make(attention="cudnn", dtype="bfloat16")(tokens)


def test_scores_depend_on_the_distance_alone():
    query, key = jax.random.normal(jax.random.key(1), (2, 1, 1, 1, 8))

    def score(i, j):
        at = [rotary(jnp.array([p]), 8, 100.0) for p in (i, j)]
        return float(jnp.vdot(rotate(query, at[0]), rotate(key, at[1])))

    assert score(9, 4) == pytest.approx(score(25, 20), rel=1e-4)
    assert score(9, 4) != pytest.approx(score(9, 5), rel=1e-2)
    assert score(0, 0) == pytest.approx(float(jnp.vdot(query, key)), rel=1e-5)


def test_shared_key_heads_equal_copied_ones(make):
    """Grouped attention is full attention whose key and value heads are copies."""
    few, many = (_first_layer(make(**c)).attention for c in ({}, {"num_kv_heads": 4}))
    many.query.kernel[...], many.out.kernel[...] = few.query.kernel[...], few.out.kernel[...]
    many.key.kernel[...] = jnp.repeat(few.key.kernel[...], 2, axis=1)
    many.value.kernel[...] = jnp.repeat(few.value.kernel[...], 2, axis=1)
    x = jax.random.normal(jax.random.key(2), (2, 9, 16))
    table = rotary(jnp.arange(9), 6, 100.0)
    got, wanted = (nnx.jit(lambda m: m(x, table)[0])(m) for m in (few, many))
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)


def _first_layer(model):
    graphdef, state = nnx.split(model.layers)
    return nnx.merge(graphdef, jax.tree.map(lambda x: x[0], state))
