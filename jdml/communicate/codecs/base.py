"""The contract of a codec: rows of floats to a payload, and back.

A codec is a frozen dataclass without state. It works on the rows of a matrix, because a collective
sends each row to another worker: no scale or index may be shared between rows. What a codec needs
to remember from round to round (an error-feedback residual) belongs to the transformation that
calls it.
"""

import abc
from typing import Any

import jax

Payload = Any
"""A pytree of arrays whose first dim is the row: what goes over the wire, byte for byte."""


class Codec(abc.ABC):
    """Encodes f32 rows to a payload. Subclasses are frozen dataclasses (hashable, comparable)."""

    needs_key: bool = False
    """Whether ``encode`` draws random numbers (stochastic rounding, random-k)."""

    @property
    @abc.abstractmethod
    def granularity(self) -> int:
        """Row lengths must be a multiple of this (a block size); callers pad with zeros."""

    @abc.abstractmethod
    def encode(self, rows: jax.Array, key: jax.Array | None = None) -> Payload:
        """Payload of ``rows``, f32 ``[num_rows, length]``; NaN and infinity must survive."""

    @abc.abstractmethod
    def decode(self, payload: Payload, length: int) -> jax.Array:
        """The f32 ``[num_rows, length]`` that the receiver reads off a payload."""

    @abc.abstractmethod
    def payload_bytes(self, length: int) -> int:
        """Bytes on the wire for one row of ``length`` elements."""
