"""A decoder small enough to compile in a second, with every dim of its own size."""

import dataclasses
import functools

import jax
import pytest
from flax import nnx

from jdml.models import Transformer, TransformerConfig
from jdml.sharding import no_mesh

TINY = TransformerConfig(
    vocab_size=24,
    num_layers=2,
    embed_dim=16,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    mlp_dim=20,
    max_seq_len=64,
)


@functools.cache
def _parts(config: TransformerConfig, seed: int):
    # Compiled as one program: hundreds of tiny ones would take most of these tests' time.
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(seed))))
    return graphdef, jax.jit(lambda: nnx.state(Transformer(config, rngs=nnx.Rngs(seed))))()


@pytest.fixture
def make():
    """``make(**changes)`` is the tiny decoder with another option or two."""

    def build(seed: int = 0, **changes) -> Transformer:
        return nnx.merge(*_parts(dataclasses.replace(TINY, **changes), seed), copy=True)

    return build


@pytest.fixture
def forward():
    """``forward(model, *args)`` calls the model, compiled."""

    def run(model, *args, **kwargs):
        graphdef, params = nnx.split(model)
        return jax.jit(lambda p, a, k: nnx.merge(graphdef, p)(*a, **k))(params, args, kwargs)

    return run


@pytest.fixture
def tokens():
    return jax.random.randint(jax.random.key(5), (4, 12), 0, TINY.vocab_size)


@pytest.fixture
def one_device():
    with no_mesh():
        yield
