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

# Options that say which parameters there are.
FORMS = ("norm", "positions", "mlp", "bias", "tie_embeddings")


@functools.cache
def _params(config: TransformerConfig):
    # Compiled as one program: hundreds of tiny ones would take most of these tests' time.
    return jax.jit(lambda: nnx.state(Transformer(config, rngs=nnx.Rngs(0))))()


@pytest.fixture
def make():
    """``make(**changes)`` is the tiny decoder with another option or two."""

    def build(**changes) -> Transformer:
        config = dataclasses.replace(TINY, **changes)
        graphdef = nnx.graphdef(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))
        # Options of the computation leave the parameters as they are.
        shapes = {k: v for k, v in changes.items() if k.startswith("num_") or k in FORMS}
        return nnx.merge(graphdef, _params(dataclasses.replace(TINY, **shapes)), copy=True)

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
