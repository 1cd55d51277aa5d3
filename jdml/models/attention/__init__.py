"""Attention over a sequence that a mesh axis divides: ring, all-to-all (Ulysses), gathered keys.

Reading order: ``plain`` (what all must equal), ``blocks`` (how scores are never whole), ``order``
(who holds which positions), ``ring``, ``gathered``, ``ulysses``, ``divided`` (the functions).
"""

from jdml.models.attention.divided import (
    KEPT,
    attention_axis_size,
    attention_on_shards,
    divided_attention,
)
from jdml.models.attention.order import positions, unzigzag, zigzag
from jdml.models.attention.plain import plain_attention

__all__ = [
    "KEPT",
    "attention_axis_size",
    "attention_on_shards",
    "divided_attention",
    "plain_attention",
    "positions",
    "unzigzag",
    "zigzag",
]
