"""The parts that hold parameters: dense projection, norms, tables of vectors; and dropout.

Every parameter is float32 and carries logical names of its dims, from which a rule table derives
its layout. ``eager_sharding=False``: the names say how an array may be divided, and a module is
also built where there is no mesh.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from jdml.models.lookup import divided_axes, exchanged_rows
from jdml.models.transformer.config import Matmul, TransformerConfig
from jdml.models.transformer.fp8 import check_backend, fp8_matmul
from jdml.sharding import constrain
from jdml.sharding.constrain import automatic_axes


def param(value: jax.Array, names: tuple[str | None, ...]) -> nnx.Param:
    """A parameter whose dims have these logical names."""
    return nnx.Param(value, out_sharding=names, eager_sharding=False)


def truncated_normal(key: jax.Array, shape: tuple[int, ...], std: float) -> jax.Array:
    """Normal, cut at two of its deviations and scaled so that the result's is ``std``; float32."""
    cut = jax.random.truncated_normal(key, -2.0, 2.0, shape, jnp.float32)
    return cut * (std / 0.87962566)  # deviation of the cut normal


class Dense(nnx.Module):
    """``y = x @ kernel``, or ``x @ kernel + bias``.

    Args:
      inputs: sizes of the contracted dims, the last ones of ``x``.
      outputs: sizes of the dims that replace them.
      names: logical names of the kernel's dims, ``inputs`` then ``outputs``; the bias has the
        latter.
      key: typed key.
      bias: add a bias, which starts at 0.
      scale: the kernel's deviation is ``scale / sqrt(fan in)``.
      flatten: see ``TransformerConfig.flatten_tokens``.
      matmul: see ``TransformerConfig.matmul``.
    """

    def __init__(
        self,
        inputs: tuple[int, ...],
        outputs: tuple[int, ...],
        names: tuple[str | None, ...],
        key: jax.Array,
        *,
        bias: bool = False,
        scale: float = 1.0,
        flatten: bool = True,
        matmul: Matmul = "dtype",
    ):
        self.matmul = matmul
        self.num_inputs = len(inputs)
        self.flatten = flatten
        std = scale / math.sqrt(math.prod(inputs))
        self.kernel = param(truncated_normal(key, inputs + outputs, std), names)
        self.bias = nnx.data(
            param(jnp.zeros(outputs, jnp.float32), names[len(inputs) :]) if bias else None
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """``x`` [..., *inputs] → [..., *outputs], in the dtype of ``x``."""
        kernel = self.kernel[...]
        outputs = kernel.shape[self.num_inputs :]
        lead = x.shape[: x.ndim - self.num_inputs]
        kernel = kernel.reshape(-1, math.prod(outputs))
        x = x.reshape(*((-1,) if self.flatten else lead), kernel.shape[0])
        if self.matmul == "dtype":
            y = x @ kernel.astype(x.dtype)
        else:
            if self.matmul == "fp8":
                check_backend()
            y = fp8_matmul(x, kernel)
        y = y.reshape(*lead, *outputs)
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)


class RMSNorm(nnx.Module):
    """``x / sqrt(mean(x²) + epsilon) * scale`` over the last dim, computed in float32.

    Reference: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019.
    """

    def __init__(self, size: int, *, epsilon: float):
        self.epsilon = epsilon
        self.scale = param(jnp.ones((size,), jnp.float32), ("embed",))

    def __call__(self, x: jax.Array) -> jax.Array:
        """``x`` [..., size], same dtype out."""
        wide = x.astype(jnp.float32)
        mean_square = jnp.mean(wide * wide, axis=-1, keepdims=True)
        wide = wide * jax.lax.rsqrt(mean_square + self.epsilon)
        return (wide * self.scale[...]).astype(x.dtype)


class LayerNorm(nnx.Module):
    """``(x - mean) / sqrt(variance + epsilon) * scale + bias`` over the last dim, in float32.

    Reference: Ba, Kiros and Hinton, "Layer Normalization", 2016.
    """

    def __init__(self, size: int, *, epsilon: float, bias: bool = True):
        self.epsilon = epsilon
        self.scale = param(jnp.ones((size,), jnp.float32), ("embed",))
        self.bias = nnx.data(param(jnp.zeros((size,), jnp.float32), ("embed",)) if bias else None)

    def __call__(self, x: jax.Array) -> jax.Array:
        """``x`` [..., size], same dtype out."""
        wide = x.astype(jnp.float32)
        wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        variance = jnp.mean(wide * wide, axis=-1, keepdims=True)
        wide = wide * jax.lax.rsqrt(variance + self.epsilon) * self.scale[...]
        return (wide if self.bias is None else wide + self.bias[...]).astype(x.dtype)


def make_norm(config: TransformerConfig) -> RMSNorm | LayerNorm:
    """The norm that the configuration asks for, over ``embed_dim``."""
    if config.norm == "rms":
        return RMSNorm(config.embed_dim, epsilon=config.norm_epsilon)
    return LayerNorm(config.embed_dim, epsilon=config.norm_epsilon, bias=config.bias)


class Embed(nnx.Module):
    """A table of token vectors."""

    def __init__(self, vocab_size: int, embed_dim: int, key: jax.Array, *, std: float):
        table = truncated_normal(key, (vocab_size, embed_dim), std)
        self.embedding = param(table, ("vocab", "embed"))

    def __call__(self, tokens: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """Ids [...] → vectors [..., embed_dim]; NaN for an id outside the vocabulary."""
        axes = divided_axes(self.embedding[...], tokens)
        if axes:
            return exchanged_rows(self.embedding[...], tokens, dtype, axes)
        # Laid out as activations are: rows taken from a table whose ``embed`` dim is divided over
        # an axis of the batch would be exchanged over every axis of the batch.
        # Its rows whole where XLA's partitioner would end the process: in a region that is manual
        # over one axis and leaves two.
        rows = "vocab" if len(automatic_axes()) < 2 else None
        table = constrain(self.embedding[...].astype(dtype), rows, "embed")
        return jnp.take(table, tokens, axis=0, mode="fill", fill_value=jnp.nan)


class LearnedPositions(nnx.Module):
    """A vector for each position, added to the token's."""

    def __init__(self, max_seq_len: int, embed_dim: int, key: jax.Array, *, std: float):
        self.table = param(truncated_normal(key, (max_seq_len, embed_dim), std), (None, "embed"))

    def __call__(self, start: jax.Array | int, num: int, dtype: jnp.dtype) -> jax.Array:
        """[num, embed_dim] of the positions from ``start`` on; NaN past the table's end."""
        # Laid out as activations are, like ``Embed``.
        table = constrain(self.table[...].astype(dtype), None, "embed")
        if isinstance(start, int) and start + num <= len(table):
            return table[start : start + num]
        return jnp.take(table, start + jnp.arange(num), axis=0, mode="fill", fill_value=jnp.nan)


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zeroes entries with probability ``rate`` and scales the others by ``1 / (1 - rate)``.

    Without a key, or at rate 0, the identity.
    """
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros_like(x))
