"""What the three divided forms of attention have in common: two functions on a device's part."""

import abc
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jdml.models.attention.blocks import block_size
from jdml.models.attention.order import Order


class Kept(NamedTuple):
    """What the backward pass gets of the forward pass.

    ``query``: [batch, heads, seq, head_dim] and ``log_sum``: float32 [batch, heads, seq], of the
    heads and positions that the form says; ``key``, ``value`` [batch, kv_heads, seq / K, head_dim]
    and ``output`` [batch, heads, seq / K, head_dim] of the device's positions.
    """

    query: jax.Array
    key: jax.Array
    value: jax.Array
    output: jax.Array
    log_sum: jax.Array


@dataclass(frozen=True)
class Form(abc.ABC):
    """A way of attending over a sequence divided over a mesh axis; runs where that axis is manual.

    Attributes:
      axis: mesh axis (or axes) over which the sequence is divided.
      axis_size: its size K.
      causal: a query sees its own position and earlier ones; otherwise all.
      order: which positions a device holds; see ``order.py``.
      block: positions of a block of scores, at most.
    """

    axis: str | tuple[str, ...]
    axis_size: int
    causal: bool
    order: Order
    block: int

    @abc.abstractmethod
    def forward(self, query: jax.Array, key: jax.Array, value: jax.Array) -> Kept:
        """Attends.

        Args:
          query: [batch, heads, seq / K, head_dim], the device's positions.
          key, value: [batch, kv_heads, seq / K, head_dim]; ``kv_heads`` divides ``heads``.
        """

    @abc.abstractmethod
    def backward(self, kept: Kept, gradient: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Gradients of what ``forward`` was given, from that of the output of its positions."""

    def kept_specs(self, spec: Any) -> Kept:
        """Specs of what is kept, given that of the query (dims batch, heads, seq, head_dim)."""
        of_log_sum: Any = P(*spec[:3])
        return Kept(spec, spec, spec, spec, of_log_sum)

    def check(self, heads: int, length: int) -> None:
        """Raises ``ValueError`` for what this form cannot divide.

        Args:
          heads: query heads of a device.
          length: positions of a device, known to be as many on all.
        """
        self.block_of(length)

    def block_of(self, length: int) -> int:
        """Positions of a block, where a device holds ``length``."""
        chunks = 2 if self.order == "zigzag" and self.axis_size > 1 else 1
        return block_size(length // chunks, self.block)


def repeat_heads(x: jax.Array, times: int) -> jax.Array:
    """[..., kv_heads, seq, head_dim] → [..., kv_heads · times, seq, head_dim], side by side."""
    return x if times == 1 else x.repeat(times, axis=-3)


def sum_heads(x: jax.Array, times: int) -> jax.Array:
    """The gradient of ``repeat_heads``, summed in float32."""
    if times == 1:
        return x
    parts = x.reshape(*x.shape[:-3], -1, times, *x.shape[-2:])
    return jnp.sum(parts, axis=-3, dtype=jnp.float32).astype(x.dtype)


def grouped(x: jax.Array, kv_heads: int) -> jax.Array:
    """[batch, heads, ...] → [batch, kv_heads, heads / kv_heads, ...]."""
    return x.reshape(x.shape[0], kv_heads, -1, *x.shape[2:])


def ungrouped(x: jax.Array) -> jax.Array:
    """The inverse of ``grouped``."""
    return x.reshape(x.shape[0], -1, *x.shape[3:])
