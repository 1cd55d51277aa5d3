"""The position-wise part of a block: SwiGLU.

Reference: Shazeer, "GLU Variants Improve Transformer", 2020.
"""

import math

import jax
from flax import nnx
from jax.sharding import PartitionSpec as P

from jdml.models.transformer.config import TransformerConfig
from jdml.models.transformer.layers import Dense
from jdml.sharding import constrain


class SwiGLU(nnx.Module):
    """``(silu(x @ gate) * (x @ up)) @ down``.

    Args:
      config: shapes and dtypes.
      rngs: stream ``params``.
    """

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
        embed, hidden, flatten = config.embed_dim, config.mlp_dim, config.flatten_tokens
        names = ("embed", "mlp")
        self.gate = Dense((embed,), (hidden,), names, rngs.params(), flatten=flatten)
        self.up = Dense((embed,), (hidden,), names, rngs.params(), flatten=flatten)
        self.down = Dense(
            (hidden,),
            (embed,),
            ("mlp", "embed"),
            rngs.params(),
            scale=1 / math.sqrt(2 * config.num_layers),
            flatten=flatten,
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """``x`` [batch, seq, embed] → the same shape."""
        hidden = jax.nn.silu(self.gate(x)) * self.up(x)
        return self.down(constrain(hidden, "batch", P.UNCONSTRAINED, "mlp"))
