"""The position-wise part of a block: SwiGLU, or two layers with GELU.

The hidden units may be divided over a mesh axis: the first products then exchange nothing, and the
last one sums over the axis (Shoeybi et al., "Megatron-LM", 2019).

References: Shazeer, "GLU Variants Improve Transformer", 2020; Hendrycks and Gimpel, "Gaussian Error
Linear Units", 2016.
"""

import math

import jax
from flax import nnx

from jdml.models.transformer.config import TransformerConfig
from jdml.models.transformer.layers import Dense
from jdml.sharding import Without, constrain


class SwiGLU(nnx.Module):
    """``(silu(x @ gate) * (x @ up)) @ down``, each product with its bias if there are any.

    Args:
      config: shapes and dtypes.
      rngs: stream ``params``.
    """

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
        self.gate = _into(config, rngs)
        self.up = _into(config, rngs)
        self.down = _out_of(config, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """``x`` [batch, seq, embed] → the same shape."""
        x = _whole(x)
        return self.down(_divided(jax.nn.silu(self.gate(x)) * self.up(x)))


class GeluMLP(nnx.Module):
    """``gelu(x @ up) @ down``, each product with its bias if there are any; GELU by its tanh form.

    Args:
      config: shapes and dtypes.
      rngs: stream ``params``.
    """

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
        self.up = _into(config, rngs)
        self.down = _out_of(config, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """``x`` [batch, seq, embed] → the same shape."""
        hidden = jax.nn.gelu(self.up(_whole(x)), approximate=True)
        return self.down(_divided(hidden))


def make_mlp(config: TransformerConfig, rngs: nnx.Rngs) -> SwiGLU | GeluMLP:
    """The MLP that the configuration asks for."""
    return SwiGLU(config, rngs) if config.mlp == "swiglu" else GeluMLP(config, rngs)


def _into(config: TransformerConfig, rngs: nnx.Rngs) -> Dense:
    return Dense(
        (config.embed_dim,),
        (config.mlp_dim,),
        ("embed", "mlp"),
        rngs.params(),
        bias=config.bias,
        flatten=config.flatten_tokens,
        matmul=config.matmul,
    )


def _out_of(config: TransformerConfig, rngs: nnx.Rngs) -> Dense:
    return Dense(
        (config.mlp_dim,),
        (config.embed_dim,),
        ("mlp", "embed"),
        rngs.params(),
        bias=config.bias,
        scale=1 / math.sqrt(2 * config.num_layers),
        flatten=config.flatten_tokens,
        matmul=config.matmul,
    )


def _whole(x: jax.Array) -> jax.Array:
    """``x`` with its positions put together, where the axis between blocks is the hidden units'."""
    return constrain(x, "batch", Without("seq", "mlp"), "embed")


def _divided(hidden: jax.Array) -> jax.Array:
    return constrain(hidden, "batch", Without("seq", "mlp"), "mlp")
