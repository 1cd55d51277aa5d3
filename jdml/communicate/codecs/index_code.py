"""How an ascending list of places travels: a bitmap, or low bytes and a unary code of the rest.

A place of 22 bits would take 4 bytes as it stands. Ascending, the parts above its lowest 8 or 16
bits only ever grow, and their steps in unary (Elias-Fano) take ``k + n / 2**8`` bits together: at
k = n / 100 an index costs 1.17 bytes, where entropy asks for 1.01.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from jdml.communicate.codecs.bit_words import places, set_bits


@dataclasses.dataclass(frozen=True)
class IndexCode:
    """Codes at most ``num_slots`` ascending places below ``num_places``, a multiple of 32.

    Fewer are coded by the place ``num_places`` in the slots at the end.

    Attributes:
      num_places: n, places in a row.
      num_slots: k, places that one payload can tell.
      low_bits: 8 or 16, bits of each place that travel as they stand, while bit ``slot + (place >>
        low_bits)`` of the upper words is set; or 0 for a bitmap of all places.
    """

    num_places: int
    num_slots: int
    low_bits: int

    @property
    def num_words(self) -> int:
        """Words of 32 bits: the bitmap, or the unary code."""
        if not self.low_bits:
            return self.num_places // 32
        return math.ceil((self.num_slots + (self.num_places - 1 >> self.low_bits)) / 32)

    @property
    def nbytes(self) -> int:
        """Bytes on the wire for one row."""
        return 4 * self.num_words + self.num_slots * self.low_bits // 8

    def encode(self, places: jax.Array) -> dict[str, jax.Array]:
        """Payload of int32 ``[num_rows, num_slots]``, ascending."""
        if not self.low_bits:
            return {"bitmap": set_bits(places, self.num_words)}
        slot = jnp.arange(self.num_slots, dtype=jnp.int32)
        upper = jnp.where(
            places < self.num_places, (places >> self.low_bits) + slot, 32 * self.num_words
        )
        low = places & ((1 << self.low_bits) - 1)
        return {
            "low": low.astype(f"uint{self.low_bits}"),
            "upper": set_bits(upper, self.num_words),
        }

    def decode(self, payload: dict[str, jax.Array]) -> jax.Array:
        """The places, int32 ``[num_rows, num_slots]``."""
        if not self.low_bits:
            return places(payload["bitmap"], self.num_slots)
        upper = places(payload["upper"], self.num_slots)
        slot = jnp.arange(self.num_slots, dtype=jnp.int32)
        place = ((upper - slot) << self.low_bits) | payload["low"].astype(jnp.int32)
        return jnp.where(upper < 32 * self.num_words, place, self.num_places)


def index_code(num_places: int, num_slots: int) -> IndexCode:
    """The code of fewest bytes: 16 low bits below a density of about 1/1800, a bitmap above 1/9."""
    codes = [IndexCode(num_places, num_slots, low_bits) for low_bits in (8, 16, 0)]
    return min(codes, key=lambda code: code.nbytes)
