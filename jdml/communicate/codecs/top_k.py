"""Top-k: the elements of largest magnitude and where they are."""

import dataclasses

import jax
import jax.numpy as jnp

from jdml.communicate.codecs.base import Codec, Payload
from jdml.communicate.codecs.bit_words import Layout, layout_of, places
from jdml.communicate.codecs.index_code import IndexCode, index_code
from jdml.communicate.codecs.largest import largest, largest_words
from jdml.communicate.codecs.sparse import Sparse, amount_of, check_amount, check_values


@dataclasses.dataclass(frozen=True)
class TopK(Sparse):
    """See :func:`top_k`."""

    k: int | float
    values: Codec | None = None
    block: int | None = None
    is_part: bool = dataclasses.field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "is_part", check_amount("top_k", "k", self.k))
        check_values("top_k", self.values)
        block = self.block
        if block is not None and (not isinstance(block, int) or block < 1 or block % 32):
            raise ValueError(
                f"top_k(block={block!r}): expected None, or a positive multiple of 32: the number "
                "of consecutive elements of which k are kept."
            )
        if block is not None:
            amount_of("top_k", "k", self.k, block)
        if self.values is not None:
            object.__setattr__(self, "needs_key", self.values.needs_key)

    @property
    def granularity(self) -> int:
        return self.block or 1

    def num_slots(self, length: int) -> int:
        if self.block is None:
            return amount_of("top_k", "k", self.k, length)
        return length // self.block * amount_of("top_k", "k", self.k, self.block)

    def choose(self, rows: jax.Array, key: jax.Array | None) -> tuple[Payload, jax.Array]:
        del key
        num_rows, length = rows.shape
        slots, layout = self.num_slots(length), self._layout(length)
        if self.block is None:
            chosen = largest(fill_places(rows, layout), layout, slots)
        else:
            k, one = slots // layout.groups, Layout(1, layout.width)
            words = largest_words(rows.reshape(-1, self.block), one, k, k)
            chosen = places(words.reshape(num_rows, layout.num_words), slots)
        return self._code(length).encode(chosen), layout.elements(chosen)

    def elements(self, index: Payload, length: int) -> jax.Array:
        return self._layout(length).elements(self._code(length).decode(index))

    def index_bytes(self, length: int) -> int:
        return self._code(length).nbytes

    def _layout(self, length: int) -> Layout:
        if self.block is None:
            return layout_of(length)
        return Layout(length // self.block, self.block // 32)

    def _code(self, length: int) -> IndexCode:
        return index_code(self._layout(length).num_places, self.num_slots(length))


def fill_places(rows: jax.Array, layout: Layout) -> jax.Array:
    """Rows lengthened to ``layout.num_places`` with zeros, which are never chosen.

    Written into zeros, not joined to them: a concatenation would be fused into every pass over the
    rows, on CPU at twice the time of the whole.
    """
    if layout.num_places == rows.shape[1]:
        return rows
    zeros = jnp.zeros((rows.shape[0], layout.num_places), rows.dtype)
    return jax.lax.dynamic_update_slice(zeros, rows, (0, 0))


def top_k(k: int | float, values: Codec | None = None, block: int | None = None) -> TopK:
    """Keeps the k elements of largest magnitude of each row; the others decode to zero.

    ``C(x)_i = x_i`` where ``|x_i|`` is among the k largest of the row, else 0: a contraction,
    ``||C(x) - x||^2 <= (1 - k/d) ||x||^2``; use it with ``error_feedback``. The choice is exact,
    by the bits of ``|x|``, so that NaN comes before infinity and that before all finite numbers:
    what is not finite is always sent. Of equal magnitudes a fixed choice is made. Zeros are never
    sent, whatever k.

    Args:
      k: An int, the number of elements kept of each row; or a float in (0, 1], the part of them,
        rounded up. A row is what one worker says to one other: a leaf or bucket of leaves, or one
        of K chunks of it, as the topology has it. So a fraction fits any, an int only long ones.
      values: Codec of the values kept, ``None`` for f32. ``top_k(0.01, values=int8())`` keeps 1 %
        in 8 bits; the values stand in the order of their places, and the last block is filled up.
      block: ``None`` to choose among the whole row; else k (or the part k) of every ``block``
        consecutive elements, a multiple of 32. The contraction is the same; every part of the
        row is heard.

    Bytes on the wire for a row of d elements, n places (d, rounded up to fill words): the values'
    own, ``4 k`` as f32, and for the indices the least of three exact codes, fixed by k and n:

    - ``k + 4 ceil((k + (n-1 >> 8)) / 32)``: the lowest 8 bits of each place, and the steps of the
      rest in unary (Elias-Fano); 1.17 bytes per index at 1 %, the code from 1/1800 to 1/9;
    - ``2 k + 4 ceil((k + (n-1 >> 16)) / 32)``: the same with 16 bits, for fewer;
    - ``n / 8``: one bit for each element, for more.

    Speed: no sort; a guess from a sample and one pass over the row, ten to thirty where the guess
    is bad. At 4 Mi elements on one core (Intel Xeon, jax 0.10.2) 1 % takes 9 ms to encode.

    Raises:
      ValueError: k is neither a positive int nor a fraction; k is more than a row or block holds.

    Reference: Stich, Cordonnier and Jaggi, "Sparsified SGD with Memory", NeurIPS 2018; Elias,
    "Efficient Storage and Retrieval by Content and Address of Static Files", J. ACM 1974.
    """
    return TopK(k, values, block)
