"""Random-k: elements drawn by a seed that travels in place of their indices."""

import dataclasses

import jax
import jax.numpy as jnp

from jdml.communicate.codecs.base import Codec, Payload
from jdml.communicate.codecs.largest import magnitude_bits
from jdml.communicate.codecs.sparse import Sparse, amount_of, check_amount, check_values

_INFINITY = 0x7F800000


@dataclasses.dataclass(frozen=True)
class RandomK(Sparse):
    """See :func:`random_k`."""

    k: int | float
    values: Codec | None = None
    unbiased: bool = False
    is_part: bool = dataclasses.field(init=False, repr=False)

    needs_key = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "is_part", check_amount("random_k", "k", self.k))
        check_values("random_k", self.values)

    def num_slots(self, length: int) -> int:
        return amount_of("random_k", "k", self.k, length)

    def choose(self, rows: jax.Array, key: jax.Array | None) -> tuple[Payload, jax.Array]:
        assert key is not None
        seeds = jax.random.bits(key, (rows.shape[0], 2), jnp.uint32)
        return seeds, self.elements(seeds, rows.shape[1])

    def elements(self, index: Payload, length: int) -> jax.Array:
        slots = self.num_slots(length)
        shortest, longer = divmod(length, slots)
        stratum = jnp.arange(slots, dtype=jnp.int32)
        start = stratum * shortest + jnp.minimum(stratum, longer)
        size = shortest + (stratum < longer).astype(jnp.int32)

        def draw(seed: jax.Array) -> jax.Array:
            # The generator is named, so that every receiver draws the same whatever its default.
            key = jax.random.wrap_key_data(seed, impl="threefry2x32")
            of_strata, of_row = jax.random.split(key)
            inside = jax.random.randint(of_strata, (slots,), 0, size, jnp.int32)
            turn = jax.random.randint(of_row, (), 0, length, jnp.int32)
            return (start + inside + turn) % length

        return jax.vmap(draw)(index)

    def index_bytes(self, length: int) -> int:
        return 8

    def gain(self, length: int) -> float:
        return length / self.num_slots(length) if self.unbiased else 1.0

    def mark(self, rows: jax.Array, kept: jax.Array) -> jax.Array:
        broken = jnp.any(magnitude_bits(rows) >= _INFINITY, axis=1)
        return kept.at[:, 0].set(jnp.where(broken, jnp.nan, kept[:, 0]))


def random_k(k: int | float, values: Codec | None = None, unbiased: bool = False) -> RandomK:
    """Sends k elements of each row, drawn at random whatever they hold; the others decode to zero.

    The row is cut into k strata of ``d / k`` elements (as equal as can be), turned by a random
    offset, and one element of each is drawn: every element is sent with probability ``k / d``
    exactly. So ``E ||C(x) - x||^2 = (1 - k/d) ||x||^2``: a contraction on average, for use with
    ``error_feedback``. With ``unbiased`` the receiver multiplies by ``d / k``: then ``E C(x) = x``
    with variance ``(d/k - 1) ||x||^2``, for use without; feeding that error back diverges.

    Args:
      k: An int, the number of elements sent of each row; or a float in (0, 1], the part of them,
        rounded up. See :func:`jdml.communicate.codecs.top_k` for what a row is.
      values: Codec of the values sent, ``None`` for f32.
      unbiased: Whether decoded values are multiplied by ``d / k``. What would pass the largest f32
        stays at it.

    Needs a key. No index travels: each row carries 64 bits drawn from the key, and the receiver
    seeds the same generator (Threefry) with them. A row that holds NaN or infinity sends NaN in
    place of its first value, whether or not it was drawn.

    Bytes on the wire for a row: the values' own (``4 k`` as f32) and 8 of seed.

    Raises:
      ValueError: k is neither a positive int nor a fraction; k is more than a row holds.

    Reference: Stich, Cordonnier and Jaggi, "Sparsified SGD with Memory", NeurIPS 2018; Konečný et
    al., "Federated Learning: Strategies for Improving Communication Efficiency", 2016 (a seed in
    place of indices). Drawn by strata here, which needs no permutation of the row and keeps the
    probability of each element, on which alone the bounds rest.
    """
    return RandomK(k, values, unbiased)
