"""Products of groups of rows, each with its own kernel: group e of the rows times ``kernels[e]``.

The rows of a group follow each other, and how many they are is data. Two forms:

- ``jax.lax.ragged_dot``, one instruction where the backend has it (TPU). Elsewhere XLA multiplies
  every row with every kernel and masks: E times the work, measured on CPU.
- a loop over blocks of rows, each of which lies within one group: groups are filled up with zeros
  to whole blocks, and the loop ends where the rows end. On CPU it is within 25 % of one product
  with a single kernel.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jdml.models.experts.mapped import one_by_one
from jdml.models.experts.rows import Places, places_of
from jdml.sharding.region import alike

_MAX_BLOCK = 256


def block_size(num_rows: int, num_groups: int, platform: str) -> int:
    """Rows of a block: 1 on TPU, which needs none; else about half a group, 8 to 256."""
    if platform == "tpu":
        return 1
    half = max(1, num_rows // (2 * num_groups))
    return min(_MAX_BLOCK, max(8, 1 << (half.bit_length() - 1)))


def grouped(group: jax.Array, num_groups: int, block: int) -> tuple[Places, jax.Array]:
    """Lays copies of rows out by group, in the order in which they come.

    Args:
      group: int32 [rows, copies]; ``num_groups`` or more for a copy that belongs to none.
      num_groups: E.
      block: groups start at multiples of it.

    Returns:
      The places of the copies, and int32 [E], places of each group, zeros that fill up included.
    """
    flat = jnp.minimum(group.ravel(), num_groups)
    num_places = -(-flat.size // block) * block + (num_groups * block if block > 1 else 0)
    counts = jnp.sum(flat[:, None] == jnp.arange(num_groups), axis=0, dtype=jnp.int32)
    sizes = -(-counts // block) * block
    order = jnp.argsort(flat, stable=True)
    # By how much each group's places lie behind its rows' ranks.
    shift = _starts(sizes) - _starts(counts)
    place = jnp.arange(flat.size, dtype=jnp.int32) + shift[flat[order]]
    place = jnp.where(flat[order] < num_groups, place, num_places)
    target = jnp.zeros_like(place).at[order].set(place, unique_indices=True)
    return places_of(target.reshape(group.shape), num_places), sizes


def product(rows: jax.Array, kernels: jax.Array, sizes: jax.Array, block: int) -> jax.Array:
    """Each group of rows times its kernel; rows after the last group give nothing to be used.

    Args:
      rows: [places, inputs], laid out by ``grouped``, zeros where no row stands.
      kernels: [E, inputs, outputs], in the dtype of the rows.
      sizes: int32 [E].
      block: as ``grouped`` was given it; 1 for ``ragged_dot``.

    Returns:
      [places, outputs] in the dtype of the rows; sums in float32.
    """
    rows, kernels, sizes = alike(rows, kernels, sizes)
    return _product(block, rows, kernels, sizes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(block: int, rows: jax.Array, kernels: jax.Array, sizes: jax.Array) -> jax.Array:
    return _forms(block)[0](rows, kernels, sizes)


def _product_forward(
    block: int, rows: jax.Array, kernels: jax.Array, sizes: jax.Array
) -> tuple[jax.Array, Any]:
    return _product(block, rows, kernels, sizes), (rows, kernels, sizes)


def _product_backward(block: int, kept: Any, gradient: jax.Array) -> tuple[jax.Array, Any, None]:
    rows, kernels, sizes = kept
    times, transposed = _forms(block)
    of_rows = times(gradient, kernels.swapaxes(1, 2), sizes)
    return of_rows, transposed(rows, gradient, sizes).astype(kernels.dtype), None


_product.defvjp(_product_forward, _product_backward)


@functools.cache
def _forms(block: int) -> tuple[Callable[..., jax.Array], Callable[..., jax.Array]]:
    """``(rows, kernels, sizes)`` → products; ``(rows, gradient, sizes)`` → float32 kernels'."""
    if block == 1:
        return one_by_one(_ragged), one_by_one(_ragged_transposed)
    return (
        one_by_one(functools.partial(_blocks, block)),
        one_by_one(functools.partial(_blocks_transposed, block)),
    )


def _ragged(rows: jax.Array, kernels: jax.Array, sizes: jax.Array) -> jax.Array:
    product = jax.lax.ragged_dot(rows, kernels, sizes, preferred_element_type=jnp.float32)
    return product.astype(rows.dtype)


def _ragged_transposed(rows: jax.Array, gradient: jax.Array, sizes: jax.Array) -> jax.Array:
    over_rows = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((0,), (0,)), ((), ())),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=[],
    )
    return jax.lax.ragged_dot_general(
        rows, gradient, sizes, over_rows, preferred_element_type=jnp.float32
    )


def _blocks(block: int, rows: jax.Array, kernels: jax.Array, sizes: jax.Array) -> jax.Array:
    ends = jnp.cumsum(sizes)

    def one(number: jax.Array, out: jax.Array) -> jax.Array:
        at = number * block
        part = jax.lax.dynamic_slice_in_dim(rows, at, block)
        kernel = jax.lax.dynamic_index_in_dim(kernels, _group_at(ends, at), keepdims=False)
        done = jnp.matmul(part, kernel, preferred_element_type=jnp.float32)
        return jax.lax.dynamic_update_slice_in_dim(out, done.astype(out.dtype), at, axis=0)

    out = jnp.zeros((rows.shape[0], kernels.shape[2]), rows.dtype)
    return jax.lax.fori_loop(0, ends[-1] // block, one, alike(out, rows)[0])


def _blocks_transposed(
    block: int, rows: jax.Array, gradient: jax.Array, sizes: jax.Array
) -> jax.Array:
    ends = jnp.cumsum(sizes)

    def one(number: jax.Array, out: jax.Array) -> jax.Array:
        at = number * block
        parts = (jax.lax.dynamic_slice_in_dim(x, at, block) for x in (rows, gradient))
        done = jnp.einsum("ri,ro->io", *parts, preferred_element_type=jnp.float32)
        return out.at[_group_at(ends, at)].add(done)

    out = jnp.zeros((sizes.shape[0], rows.shape[1], gradient.shape[1]), jnp.float32)
    return jax.lax.fori_loop(0, ends[-1] // block, one, alike(out, rows)[0])


def _group_at(ends: jax.Array, at: jax.Array) -> jax.Array:
    return jnp.sum(at >= ends, dtype=jnp.int32)


def _starts(sizes: jax.Array) -> jax.Array:
    """int32 [E + 1]: where each group starts, and where the last one ends."""
    return jnp.concatenate([jnp.zeros_like(sizes[:1]), jnp.cumsum(sizes)])
