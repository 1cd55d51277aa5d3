"""Rows of a table that FSDP divides: the rows that are wanted travel, and not the table.

The table's ``embed`` dim is divided over axes of the batch. Each device takes its columns of all
rows that the devices of these axes want, and one all-to-all gives each device whole rows of its own
tokens. Backward the same way: a device adds up, in f32, the gradient of the columns that it stores,
and no gradient of the table is exchanged along these axes.

Over their n devices a chip sends ``(n − 1)/n · w E`` bytes for each of its tokens forward and as
many backward (width E, w bytes), and its tokens' numbers to all, where a gathered table costs
``(n − 1)/n · w V E``, twice. Where ``vocab`` is divided too, the sum over that axis is of the same
``[batch, seq, embed]`` as ever.
"""

import jax
import jax.numpy as jnp

from jdml.sharding import Without
from jdml.sharding.constrain import current_context, manual_axes
from jdml.sharding.region import Stored, axes_of_name, axes_of_stored, manual

SMALL_VOCABULARY = 4096
"""Up to so many words a table is gathered, and the loss takes all positions at once: their logits
are no larger than a block's own activations."""


def divided_axes(table: jax.Array, tokens: jax.Array) -> tuple[str, ...]:
    """Axes of the batch that divide the columns of a large table; () if there are none.

    Args:
      table: [vocab, embed], as it is stored.
      tokens: [batch, seq].
    """
    mesh = current_context("divided_axes")[0]
    if mesh is None or tokens.ndim != 2 or len(table) <= SMALL_VOCABULARY:
        return ()
    embed, vocab, batch = axes_of_stored("embed"), axes_of_stored("vocab"), axes_of_name("batch")
    seq = axes_of_name(Without("seq", "vocab"))
    sizes = (table.shape[1], len(table), *tokens.shape)
    for axes, size in zip((embed, vocab, batch, seq), sizes, strict=True):
        for axis in axes:
            size, rest = divmod(size, mesh.shape[axis])
            if rest:
                return ()
    usual = set(embed) <= set(batch) and vocab == axes_of_name("vocab")
    held = manual_axes().intersection((*embed, *vocab, *batch, *seq))
    return embed if usual and not axes_of_name("embed") and not held else ()


def exchanged_rows(
    table: jax.Array, tokens: jax.Array, dtype: jnp.dtype, axes: tuple[str, ...]
) -> jax.Array:
    """``table[tokens]`` in ``dtype``: [batch, seq, embed]; NaN for ids outside the vocabulary.

    Args:
      table: float32 [vocab, embed], as it is stored.
      tokens: integers [batch, seq].
      dtype: of the result.
      axes: from :func:`divided_axes`.
    """
    vocab = axes_of_stored("vocab")
    num_words = len(table)

    def on_device(table: jax.Array, tokens: jax.Array) -> jax.Array:
        wanted = jax.lax.all_gather(tokens, axes, tiled=True)
        place = wanted - (jax.lax.axis_index(vocab) * len(table) if vocab else 0)
        mine = (place >= 0) & (place < len(table))
        rows = jnp.take(table, jnp.where(mine, place, 0), axis=0, mode="clip")
        rows = jnp.where(mine[..., None], rows, 0.0).astype(dtype)
        rows = jax.lax.psum(rows, vocab) if vocab else rows
        rows = jax.lax.all_to_all(rows, axes, 0, 2, tiled=True)
        inside = (tokens >= 0) & (tokens < num_words)
        return jnp.where(inside[..., None], rows, jnp.nan)

    positions = ("batch", Without("seq", "vocab"))
    region = manual(on_device, [Stored(("vocab", "embed")), positions], (*positions, "embed"))
    return region(table, tokens)
