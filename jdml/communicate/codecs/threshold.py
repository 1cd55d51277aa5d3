"""Threshold: the elements above a magnitude, as many as the payload holds."""

import dataclasses

import jax
import numpy as np

from jdml.communicate.codecs.base import Codec, Payload
from jdml.communicate.codecs.bit_words import layout_of
from jdml.communicate.codecs.index_code import IndexCode, index_code
from jdml.communicate.codecs.largest import largest
from jdml.communicate.codecs.sparse import Sparse, amount_of, check_amount, check_values
from jdml.communicate.codecs.top_k import fill_places


@dataclasses.dataclass(frozen=True)
class Threshold(Sparse):
    """See :func:`threshold`."""

    value: float
    capacity: int | float
    values: Codec | None = None
    is_part: bool = dataclasses.field(init=False, repr=False)

    def __post_init__(self) -> None:
        number = isinstance(self.value, (int, float)) and not isinstance(self.value, bool)
        if not number or not 0 <= self.value <= float(np.finfo(np.float32).max):
            raise ValueError(
                f"threshold(value={self.value!r}): expected a finite number >= 0, the magnitude "
                "above which an element is sent."
            )
        is_part = check_amount("threshold", "capacity", self.capacity)
        object.__setattr__(self, "is_part", is_part)
        check_values("threshold", self.values)
        if self.values is not None:
            object.__setattr__(self, "needs_key", self.values.needs_key)

    def num_slots(self, length: int) -> int:
        return amount_of("threshold", "capacity", self.capacity, length)

    def choose(self, rows: jax.Array, key: jax.Array | None) -> tuple[Payload, jax.Array]:
        del key
        layout = layout_of(rows.shape[1])
        slots = self.num_slots(rows.shape[1])
        chosen = largest(fill_places(rows, layout), layout, slots, self._floor)
        return self._code(rows.shape[1]).encode(chosen), layout.elements(chosen)

    def elements(self, index: Payload, length: int) -> jax.Array:
        return layout_of(length).elements(self._code(length).decode(index))

    def index_bytes(self, length: int) -> int:
        return self._code(length).nbytes

    @property
    def _floor(self) -> int:
        """Bits of the least f32 above ``value``."""
        nearest = np.float32(self.value)
        bits = int(nearest.view(np.int32))
        return bits + 1 if float(nearest) <= self.value else bits

    def _code(self, length: int) -> IndexCode:
        return index_code(layout_of(length).num_places, self.num_slots(length))


def threshold(value: float, capacity: int | float, values: Codec | None = None) -> Threshold:
    """Sends the elements with ``|x| > value``, at most ``capacity`` of each row.

    ``C(x)_i = x_i`` where ``|x_i| > value``, else 0. The payload has a fixed number of slots: where
    more elements qualify, the largest are sent and the others decode to zero, so that
    ``error_feedback`` keeps them for a later round; where fewer do, the unused slots say nothing
    and decode to nothing, yet travel. NaN and infinity are above any value, and the first to be
    sent. Where all fit, ``max |C(x) - x| <= value``; where not, C is top-k with k = capacity.

    Args:
      value: Finite, at least 0, in the units of x; compared exactly, subnormal numbers included. At
        0 every element but zeros qualifies.
      capacity: An int, slots in each row; or a float in (0, 1], the part of a row's elements.
        About the part that you expect to qualify: fewer make later rounds pay, more are wasted.
      values: Codec of the values sent, ``None`` for f32; unused slots are zeros at the end of the
        last blocks.

    Bytes on the wire: those of :func:`jdml.communicate.codecs.top_k` with k = capacity, however
    many qualify.

    Raises:
      ValueError: an argument is out of its range; the capacity is more than a row holds.

    Reference: Strom, "Scalable Distributed DNN Training Using Commodity GPU Cloud Computing",
    Interspeech 2015 (a fixed threshold with the rest fed back).
    """
    return Threshold(value, capacity, values)
