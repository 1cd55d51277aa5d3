"""Which positions a device holds: consecutive ones, or a chunk from each end.

Under causal attention position p has p + 1 keys to look at. With consecutive parts the device with
the last ones does 2K − 1 times the work of that with the first. In *zig-zag* order the sequence is
cut into 2K chunks and device i holds chunks i and 2K − 1 − i: an early one and a late one, equal
work for all. For K = 4:

    device        0    1    2    3
    chunks       0 7  1 6  2 5  3 4

Embedding, norms, feed-forward layers and the mean loss treat positions alike, so the whole model
may run in this order: tokens, targets and masks are put into it once (``zigzag``), and only
rotary angles and the causal mask need to know (``positions``).

Reference: Llama Team, "The Llama 3 Herd of Models", 2024, section 3.3.2 (2K chunks, one from each
end).
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

Order = Literal["contiguous", "zigzag"]
ORDERS = ("contiguous", "zigzag")


def zigzag(x: Any, axis_size: int, dim: int = 1) -> Any:
    """Puts a dim of positions into zig-zag order.

    Shift before, not after: ``inputs, targets = zigzag(tokens[:, :-1], k), zigzag(tokens[:, 1:],
    k)``. With ``axis_size`` 1 the order stays as it is.

    Args:
      x: NumPy or JAX array, such as tokens [batch, seq], targets or a mask.
      axis_size: size K of the mesh axis that divides the sequence.
      dim: which dim holds the positions.

    Raises:
      ValueError: the dim is not a multiple of 2K (of 1 for K = 1).
    """
    sources = _sources(x.shape[dim], axis_size)
    return x if axis_size == 1 else x.take(sources, axis=dim)


def unzigzag(x: Any, axis_size: int, dim: int = 1) -> Any:
    """The inverse of ``zigzag``: for outputs that are wanted in the order of the text."""
    sources = _sources(x.shape[dim], axis_size)
    return x if axis_size == 1 else x.take(np.argsort(sources), axis=dim)


def positions(length: int, axis_size: int, order: Order) -> jax.Array:
    """Position in the text of each place, int32 [length].

    Computed from an iota, so that each device makes only its own part where the result is divided.
    """
    place = jnp.arange(length, dtype=jnp.int32)
    check_divides(length, axis_size, order)
    if order == "contiguous" or axis_size == 1:
        return place
    chunk = length // (2 * axis_size)
    number, within = place // chunk, place % chunk
    device, is_late = number // 2, number % 2 == 1
    return jnp.where(is_late, 2 * axis_size - 1 - device, device) * chunk + within


def chunk_places(axis_size: int, order: Order) -> np.ndarray:
    """Where each chunk of the text lies once all devices' parts are joined, int32 [num_chunks].

    K chunks in contiguous order, 2K in zig-zag order; places count chunks too.
    """
    if order == "contiguous":
        return np.arange(axis_size, dtype=np.int32)
    early = 2 * np.arange(axis_size, dtype=np.int32)
    return np.concatenate([early, early[::-1] + 1])


def check_divides(length: int, axis_size: int, order: Order) -> None:
    """Raises ``ValueError`` unless all devices get equal chunks."""
    parts = 2 * axis_size if order == "zigzag" and axis_size > 1 else axis_size
    if length % parts or length < 1:
        below, above = length // parts * parts, -(-length // parts) * parts
        nearest = f"{below} or {above}" if below else f"{above or parts}"
        why = f"2 × {axis_size} chunks" if parts > axis_size else f"{axis_size} parts"
        raise ValueError(
            f"a sequence of {length} positions in {order} order over an axis of size {axis_size} "
            f"is cut into {why}, which must be equal; the nearest lengths are {nearest}"
        )


def _sources(length: int, axis_size: int) -> np.ndarray:
    check_divides(length, axis_size, "zigzag")
    places = np.arange(length)
    if axis_size == 1:
        return places
    return places.reshape(2 * axis_size, -1)[np.argsort(chunk_places(axis_size, "zigzag"))].ravel()
