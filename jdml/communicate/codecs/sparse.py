"""What sparse codecs share: some elements of each row are sent, by place and value."""

import abc
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from jdml.communicate.codecs.base import Codec, Payload
from jdml.communicate.codecs.largest import take


class Sparse(Codec):
    """Sends ``num_slots(length)`` elements of each row; the others decode to zero.

    A subclass is a frozen dataclass with a field ``values``: the codec of the values that are sent,
    or ``None`` for f32. It says which elements, and how the receiver learns of them. Coding is
    compiled also where the caller is not: step by step, each of its many parts would be.
    """

    values: Codec | None
    leaves_out = True

    @property
    def granularity(self) -> int:
        return 1

    @abc.abstractmethod
    def num_slots(self, length: int) -> int:
        """Elements that are sent of a row of ``length``.

        Raises:
          ValueError: the row is too short for them.
        """

    @abc.abstractmethod
    def choose(self, rows: jax.Array, key: jax.Array | None) -> tuple[Payload, jax.Array]:
        """``(index, elements)``: what tells the receiver, and int32 ``[num_rows, num_slots]``.

        An element past the end of a row stands for a slot that is not used.
        """

    @abc.abstractmethod
    def elements(self, index: Payload, length: int) -> jax.Array:
        """The elements of :meth:`choose`, read off its index."""

    @abc.abstractmethod
    def index_bytes(self, length: int) -> int:
        """Bytes of the index for one row."""

    def gain(self, length: int) -> float:
        """What the receiver multiplies every value by."""
        del length
        return 1.0

    def mark(self, rows: jax.Array, kept: jax.Array) -> jax.Array:
        """The values to send, f32 ``[num_rows, num_slots]``, given those of the elements chosen."""
        del rows
        return kept

    @functools.partial(jax.jit, static_argnames="self")
    def encode_rows(self, rows: jax.Array, key: jax.Array | None = None) -> Payload:
        index_key = value_key = None
        if key is not None:
            index_key, value_key = jax.random.split(key)
        rows = rows.astype(jnp.float32)
        index, elements = self.choose(rows, index_key)
        kept = self.mark(rows, take(rows, elements))
        if self.values is not None:
            kept = self.values.encode_rows(self._whole_blocks(kept, self.values), value_key)
        return {"index": index, "values": kept}

    @functools.partial(jax.jit, static_argnames=("self", "length"))
    def decode_rows(self, payload: Payload, length: int) -> jax.Array:
        elements, values = self._entries(payload, length)
        empty = jnp.zeros((values.shape[0], length), jnp.float32)
        return jax.vmap(lambda e, i, v: e.at[i].set(v, mode="drop"))(empty, elements, values)

    @functools.partial(jax.jit, static_argnames=("self", "length", "divisor"))
    def decode_sum(self, payload: Payload, length: int, divisor: int = 1) -> jax.Array:
        elements, values = self._entries(payload, length)
        if divisor != 1:
            values = values / divisor
        empty = jnp.zeros(length, jnp.float32)
        return empty.at[elements.reshape(-1)].add(values.reshape(-1), mode="drop")

    def payload_bytes(self, length: int) -> int:
        slots = self.num_slots(length)
        if self.values is None:
            return self.index_bytes(length) + 4 * slots
        whole = self.values.whole(slots)
        return self.index_bytes(length) + self.values.payload_bytes(whole)

    def _entries(self, payload: Payload, length: int) -> tuple[jax.Array, jax.Array]:
        """Elements and their f32 values, ``[num_rows, num_slots]`` each."""
        slots, values = self.num_slots(length), payload["values"]
        if self.values is not None:
            whole = self.values.whole(slots)
            values = self.values.decode_rows(values, whole)[:, :slots]
        gain = self.gain(length)
        if gain != 1:
            largest = jnp.finfo(jnp.float32).max
            scaled = jnp.clip(values * gain, -largest, largest)
            values = jnp.where(jnp.isinf(values), values, scaled)
        return self.elements(payload["index"], length), values

    @staticmethod
    def _whole_blocks(kept: jax.Array, codec: Codec) -> jax.Array:
        """Rows of values filled up as the codec wants it."""
        missing = codec.whole(kept.shape[1]) - kept.shape[1]
        if not missing:
            return kept
        if codec.fill == "zeros":
            return jnp.concatenate([kept, jnp.zeros((kept.shape[0], missing))], axis=1)
        times = 1 + -(-missing // kept.shape[1])
        return jnp.tile(kept, (1, times))[:, : kept.shape[1] + missing]


def check_values(name: str, values: Any) -> None:
    """Raises unless ``values`` can code the values of the sparse codec ``name``."""
    if values is not None and not isinstance(values, Codec):
        raise ValueError(
            f"{name}(values={values!r}): expected None (f32) or a codec such as int8(); did you "
            "forget to call the factory?"
        )


def check_amount(name: str, argument: str, amount: Any) -> bool:
    """Whether ``amount`` is a fraction in (0, 1]; raises unless it is that or a positive int.

    A codec keeps the answer in a field: 1 and 1.0, one element and all of them, are equal to Python
    and, without it, would make one codec to a cache of compiled programs.
    """
    is_count = isinstance(amount, int) and not isinstance(amount, bool) and amount >= 1
    is_fraction = isinstance(amount, float) and 0 < amount <= 1
    if not is_count and not is_fraction:
        raise ValueError(
            f"{name}({argument}={amount!r}): expected an int >= 1, the number of elements of each "
            "row, or a float in (0, 1], the part of them: 0.01 is one in a hundred."
        )
    return is_fraction


def amount_of(name: str, argument: str, amount: int | float, length: int) -> int:
    """Number of elements that ``amount`` is of a row (or block) of ``length``.

    Raises:
      ValueError: it is more than there are.
    """
    if isinstance(amount, float):
        # Rounded first: 0.07 * 100 is a little more than 7.
        return min(length, math.ceil(round(amount * length, 6)))
    if amount > length:
        raise ValueError(
            f"{name}({argument}={amount}): a row of {length} elements has no {amount}. A row is "
            "what one worker sends to one other, so a short leaf, or its part, may be one; give a "
            f"fraction, such as {argument}=0.01, which fits any length."
        )
    return amount
