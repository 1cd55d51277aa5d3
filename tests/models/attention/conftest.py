"""Queries, keys and values, and what attention is to make of them."""

import functools

import jax
import pytest

from jdml.models.attention import plain_attention
from tests.models.attention.passes import with_gradients


@pytest.fixture(scope="module")
def arrays():
    """``arrays(batch, heads, kv_heads, seq, head_dim)``: query, key, value, output's gradient."""

    @functools.cache
    def make(batch, heads, kv_heads, seq, head_dim):
        shapes = [(batch, n, seq, head_dim) for n in (heads, kv_heads, kv_heads, heads)]
        keys = jax.random.split(jax.random.key(0), 4)
        return tuple(jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True))

    return make


@pytest.fixture(scope="module")
def expected(arrays):
    """``expected(causal, *sizes)``: what ``with_gradients`` gives of all scores at once."""

    @functools.cache
    def compute(causal, *sizes):
        plain = functools.partial(plain_attention, causal=causal)
        return jax.jit(with_gradients(plain))(*arrays(*sizes))

    return compute
