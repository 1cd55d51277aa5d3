"""What the two tables of the vocabulary cost where ``fsdp`` divides them: embedding and head.

``jdml.models.lookup`` and ``jdml.models.head`` say what is exchanged: of a large embedding the rows
that are wanted, of the head a piece at a time, no larger than a layer.
"""

import math

from jdml.models import TransformerConfig
from jdml.models.lookup import SMALL_VOCABULARY
from jdml.plan.layout import Layout

LOSS_CHUNK = 128
LARGEST_SCATTERED = 64 * 2**20
"""Bytes of a piece's gradient up to which TPU's compiler leaves a reduce-scatter one; of 37 MB it
did (v5e, v5p), of 175 MB and more not."""


def num_chunks(config: TransformerConfig, seq: int) -> int:
    """Parts of the sequence that the loss takes one after the other."""
    return 1 if config.vocab_size <= SMALL_VOCABULARY else -(-seq // LOSS_CHUNK)


def rows_travel(config: TransformerConfig, layout: Layout) -> bool:
    """Whether rows of the embedding are exchanged, and the table is not gathered."""
    return layout.fsdp > 1 and config.vocab_size > SMALL_VOCABULARY


def num_pieces(config: TransformerConfig, layout: Layout, seq: int) -> int | None:
    """Pieces in which the head is put together; None if it is all at once."""
    if not rows_travel(config, layout) or num_chunks(config, seq) == 1:
        return None
    return math.ceil(config.embed_dim * config.vocab_size / config.num_layer_params)


def head_sent(config: TransformerConfig, layout: Layout, pieces: int) -> float:
    """Bytes along ``fsdp``: each piece gathered forward and backward (a single one stays), its
    gradient scattered, or, of a large piece, all-reduced."""
    head = config.embed_dim * config.vocab_size / layout.model
    times = 1 if 4 * head / pieces <= LARGEST_SCATTERED else 2
    gathers = min(pieces, 2)
    sent = gathers * config.compute_dtype.itemsize + 4 * times
    return (layout.fsdp - 1) / layout.fsdp * sent * head


def rows_sent(config: TransformerConfig, layout: Layout, tokens: int) -> float:
    """Bytes along ``fsdp``: rows forward and gradients backward of ``tokens`` a chip."""
    rows = tokens * config.embed_dim * config.compute_dtype.itemsize
    return (layout.fsdp - 1) * (2 * rows / layout.fsdp + 4 * tokens)
