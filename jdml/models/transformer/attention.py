"""Grouped-query attention, causal or not, with rotary positions or none, with and without a cache.

Heads come before positions from the projection to the output, so that both products have leading
batch dims, one contracted dim and no transposed operand. Training repeats keys and values to the
number of queries' heads: the copies are small beside the scores, and the head dim stays divided
over its mesh axis even where there are fewer key heads than devices. Decoding groups the queries
instead, for there the keys and values are the large arrays.

With ``config.attention`` ``"xla"`` or ``"cudnn"`` JAX's own attention does it. With ``"ring"``,
``"ulysses"`` and ``"gather"`` scores are computed block by block, and over a sequence that a mesh
axis divides: ``jdml.models.attention``.

References: Su et al., "RoFormer", 2021; Ainslie et al., "GQA", 2023.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jdml.models.attention import divided_attention
from jdml.models.transformer.config import TransformerConfig
from jdml.models.transformer.layers import Dense
from jdml.sharding import Without, constrain
from jdml.sharding.region import platform

# Inside a layer positions are divided over those axes alone that do not divide its heads: between
# the layers (``sequence_parallel``) the heads' axis may have them too.
_POSITIONS = Without("seq", "heads")


class Rotary(NamedTuple):
    """Cosine and sine of each position's angles, float32 [seq, head_dim / 2]."""

    cos: jax.Array
    sin: jax.Array


def rotary(positions: jax.Array, head_dim: int, base: float) -> Rotary:
    """Angles ``position * base^(-2i / head_dim)`` for pair ``i``; ``positions``: int [seq]."""
    pairs = jnp.arange(head_dim // 2, dtype=jnp.float32)
    frequency = base ** (-2.0 * pairs / head_dim)
    angle = positions.astype(jnp.float32)[:, None] * frequency
    return Rotary(jnp.cos(angle), jnp.sin(angle))


def rotate(x: jax.Array, table: Rotary) -> jax.Array:
    """Turns the pairs (i, i + head_dim / 2) of ``x`` [batch, heads, seq, head_dim]."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = (
        first * table.cos - second * table.sin,
        second * table.cos + first * table.sin,
    )
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


class LayerCache(NamedTuple):
    """Keys and values of one layer, [batch, kv_heads, length, head_dim]."""

    keys: jax.Array
    values: jax.Array


class Attention(nnx.Module):
    """Projects to queries, keys and values, attends, projects back.

    Args:
      config: shapes and dtypes.
      rngs: stream ``params``.
    """

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
        embed, head = config.embed_dim, config.head_dim
        heads, kv_heads = config.num_heads, config.num_kv_heads
        flatten = config.flatten_tokens
        names = ("embed", "heads", "head_dim")
        kv_names = ("embed", "kv_heads", "head_dim")
        self.group = heads // kv_heads
        self.causal = config.causal
        self.form = config.attention
        self.order, self.block = config.seq_order, config.attention_block

        def into(num: int, names: tuple[str, ...]) -> Dense:
            outputs, key = (num, head), rngs.params()
            bias, matmul = config.bias, config.matmul
            return Dense((embed,), outputs, names, key, bias=bias, flatten=flatten, matmul=matmul)

        self.query = into(heads, names)
        self.key = into(kv_heads, kv_names)
        self.value = into(kv_heads, kv_names)
        self.out = Dense(
            (heads, head),
            (embed,),
            ("heads", "head_dim", "embed"),
            rngs.params(),
            bias=config.bias,
            scale=1 / math.sqrt(2 * config.num_layers),
            flatten=flatten,
            matmul=config.matmul,
        )

    def __call__(
        self,
        x: jax.Array,
        table: Rotary | None,
        cache: LayerCache | None = None,
        start: jax.Array | int = 0,
    ) -> tuple[jax.Array, LayerCache | None]:
        """The layer's output and its cache.

        Args:
          x: [batch, seq, embed].
          table: angles of the ``seq`` positions; None turns nothing.
          cache: keys and values of earlier positions, which are causal; None attends within ``x``.
          start: int32 scalar, position of ``x[:, 0]`` in the cache.
        """
        x = constrain(x, "batch", _POSITIONS, "embed")
        query, key = _heads(self.query(x), "heads"), _heads(self.key(x), "kv_heads")
        if table is not None:
            query, key = rotate(query, table), rotate(key, table)
        value = _heads(self.value(x), "kv_heads")
        if cache is not None:
            cache = LayerCache(
                jax.lax.dynamic_update_slice_in_dim(cache.keys, key, start, axis=2),
                jax.lax.dynamic_update_slice_in_dim(cache.values, value, start, axis=2),
            )
            mixed = _attend_grouped(query, cache, start)
        elif self.form == "full":
            key, value = _repeat(key, self.group), _repeat(value, self.group)
            mixed = attend(query, key, value, causal=self.causal)
        elif self.form == "xla" or self.form == "cudnn":
            mixed = attend_by_jax(query, key, value, self.form, causal=self.causal)
        else:
            mixed = divided_attention(
                query, key, value, self.form, causal=self.causal, order=self.order, block=self.block
            )
        mixed = constrain(mixed, "batch", "heads", _POSITIONS, "head_dim").transpose(0, 2, 1, 3)
        return self.out(mixed), cache


def attend(query: jax.Array, key: jax.Array, value: jax.Array, *, causal: bool = True) -> jax.Array:
    """``softmax(q kᵀ / sqrt(head_dim)) v`` with the softmax in float32.

    Args:
      query, key, value: [batch, heads, seq, head_dim].
      causal: a position sees none after it.
    """
    seq = query.shape[2]
    allowed = jnp.tril(jnp.ones((seq, seq), bool)) if causal else None
    weights = _weights("bhtd,bhsd->bhts", query, key, allowed)
    return jnp.einsum("bhts,bhsd->bhtd", weights, value)


def attend_by_jax(
    query: jax.Array, key: jax.Array, value: jax.Array, form: str, *, causal: bool = True
) -> jax.Array:
    """``attend`` by an implementation of ``jax.nn.dot_product_attention``.

    Args:
      query: [batch, heads, seq, head_dim].
      key, value: [batch, kv_heads, seq, head_dim].
      form: ``"xla"``, or ``"cudnn"``, which never holds [seq, seq] scores.
      causal: a position sees none after it.

    Raises:
      ValueError: ``"cudnn"`` where the devices are no GPUs; what cuDNN itself cannot do.
    """
    if form == "cudnn" and platform() not in ("gpu", "cuda"):
        raise ValueError(
            f"attention='cudnn' is for NVIDIA GPUs, and the devices are of platform "
            f"{platform()!r}. Take attention='full' or 'xla', or 'ring', which never holds all "
            "scores."
        )
    arrays = (x.transpose(0, 2, 1, 3) for x in (query, key, value))
    implementation: Any = form
    mixed = jax.nn.dot_product_attention(*arrays, is_causal=causal, implementation=implementation)
    return mixed.transpose(0, 2, 1, 3)


def _attend_grouped(query: jax.Array, cache: LayerCache, start: jax.Array | int) -> jax.Array:
    batch, heads, seq, head_dim = query.shape
    kv_heads, length = cache.keys.shape[1:3]
    grouped = query.reshape(batch, kv_heads, heads // kv_heads, seq, head_dim)
    past = jnp.arange(length)[None, :] <= start + jnp.arange(seq)[:, None]
    weights = _weights("bkgtd,bksd->bkgts", grouped, cache.keys, past)
    mixed = jnp.einsum("bkgts,bksd->bkgtd", weights, cache.values)
    return mixed.reshape(query.shape)


def _weights(
    product: str, query: jax.Array, key: jax.Array, allowed: jax.Array | None
) -> jax.Array:
    scores = jnp.einsum(product, query, key, preferred_element_type=jnp.float32)
    scores = scores * query.shape[-1] ** -0.5
    if allowed is not None:
        scores = jnp.where(allowed, scores, jnp.finfo(jnp.float32).min)
    return jax.nn.softmax(scores, axis=-1).astype(query.dtype)


def _heads(x: jax.Array, name: str) -> jax.Array:
    """[batch, seq, heads, head_dim] → [batch, heads, seq, head_dim], divided over the heads."""
    return constrain(x.transpose(0, 2, 1, 3), "batch", name, _POSITIONS, "head_dim")


def _repeat(x: jax.Array, times: int) -> jax.Array:
    if times == 1:
        return x
    batch, heads, seq, head_dim = x.shape
    repeated = jnp.broadcast_to(x[:, :, None], (batch, heads, times, seq, head_dim))
    return repeated.reshape(batch, heads * times, seq, head_dim)
