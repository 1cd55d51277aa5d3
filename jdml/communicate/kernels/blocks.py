"""Blocks encoded in one pass: measured and turned into codes while they are in the chip's memory.

The plain form makes two passes, since a block's scale must be known before its first element is
encoded: XLA reads all that a worker says twice. 16 Mi elements in blocks of 256 to int8, compiled
for v5e (libtpu 0.0.51):

======  ====================  ===================  ==================
form    HBM read and written  cycles               bytes of program
======  ====================  ===================  ==================
plain   134 MB + 17 MB        675,000 (estimated)  560,000
kernel  67 MB + 17 MB         139,000 (scheduled)  210,000
======  ====================  ===================  ==================

XLA estimates its own fusions; the kernel's cycles are the instructions of a tile, times the tiles.
Neither was run. XLA takes 190,000 cycles for a copy of 84 MB, so that the kernel should be as fast
as memory is. In an exchange both phases encode, the second one chunk of it.

Decoding needs no kernel: XLA makes one pass of it, and adds the workers' shares in the same. Nor is
there one for GPU. Pallas lowers it without a device, but compiles nothing that could be compared,
and XLA for GPU has a rewrite of its own that joins a reduction to what is made of it.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
"""Elements in a register's row."""
_TILE_ELEMENTS = 1 << 18  # 1 MB of f32, read while the one before is computed
_LEAST_ELEMENTS = 1 << 17  # below, a launch costs more than a second pass

ToCodes = Callable[[jax.Array, jax.Array], jax.Array]


def fits(shape: tuple[int, int, int], width: int) -> bool:
    """Whether :func:`encode_blocks` takes blocks of this shape, and is worth its launch.

    Args:
      shape: ``(num_rows, n, block)``.
      width: Bits of a code.
    """
    num_rows, n, block = shape
    num_runs = 8 // width
    whole = num_runs == 1 or n % (num_runs * LANES) == 0
    fits_memory = block % LANES == 0 and num_runs * block * LANES <= _TILE_ELEMENTS
    return whole and fits_memory and num_rows * n * block >= _LEAST_ELEMENTS


def encode_blocks(
    blocks: jax.Array, width: int, to_codes: ToCodes, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Codes of blocks and their absolute maxima, each element read once.

    The kernel has no arithmetic of its own but the maximum, of integer bits, which is exact; it
    runs ``to_codes``, as the plain form does.

    Args:
      blocks: f32 ``[num_rows, n, block]``, a shape that :func:`fits`. With ``p = 8 / width`` codes
        to a byte, the ``n`` blocks of a row are ``p`` runs, and a byte holds one code of each.
      width: Bits of a code: 2, 4 or 8.
      to_codes: ``(x [block, k], largest [1, k]) -> codes``, integers of which the low bits are
        taken. Elementwise, of what Mosaic can compile: f32 and int32, no constants that are arrays.
      interpret: Runs on any platform, slowly: for tests.

    Returns:
      ``codes``, uint8 ``[num_rows, n / p, block]``, and ``largest``, f32 ``[num_rows, n]``; the
      largest of a block with a NaN is NaN.
    """
    num_rows, n, block = blocks.shape
    num_runs = 8 // width
    run = n // num_runs
    tile = _tile(run, block, num_runs)
    num_tiles = -(-run // tile)
    lines = num_runs * tile // LANES

    def of_run(k: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, tile, block), lambda r, i: (r, i + k * num_tiles, 0))

    # What varies over the mesh is what varies in the blocks.
    out = functools.partial(jax.ShapeDtypeStruct, manual_axis_type=jax.typeof(blocks).mat)
    codes, largest = pl.pallas_call(
        functools.partial(_kernel, width=width, to_codes=to_codes),
        grid=(num_rows, num_tiles),
        in_specs=[of_run(k) for k in range(num_runs)],
        out_specs=[of_run(0), pl.BlockSpec((1, 1, lines, LANES), lambda r, i: (r, i, 0, 0))],
        out_shape=[
            out((num_rows, run, block), jnp.uint8),
            out((num_rows, num_tiles, lines, LANES), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        interpret=interpret,
        name="encode_blocks",
    )(*[blocks] * num_runs)
    largest = largest.reshape(num_rows, num_tiles, num_runs, tile).swapaxes(1, 2)
    return codes, largest.reshape(num_rows, num_runs, -1)[:, :, :run].reshape(num_rows, n)


def _tile(run: int, block: int, num_runs: int) -> int:
    """Blocks of each run in a tile; with several runs a whole number of tiles makes one."""
    tile = max(_TILE_ELEMENTS // (num_runs * block * LANES), 1) * LANES
    tile = min(tile, -(-run // LANES) * LANES)
    while num_runs > 1 and run % tile:
        tile -= LANES
    return tile


def _kernel(*refs: Any, width: int, to_codes: ToCodes) -> None:
    *runs, codes_ref, largest_ref = refs
    joined = None
    lines = runs[0].shape[1] // LANES
    for k, ref in enumerate(runs):
        # A block becomes a column: its maximum is then one of maxima of whole registers, and what
        # is computed of it fills them, where one number for each row would fill one lane of each.
        x = ref[0].T
        bits = jax.lax.bitcast_convert_type(x, jnp.int32) & jnp.int32(0x7FFFFFFF)
        largest = jnp.max(bits, axis=0, keepdims=True)
        largest = jax.lax.bitcast_convert_type(largest, jnp.float32)
        largest_ref[0, 0, k * lines : (k + 1) * lines] = largest.reshape(lines, LANES)
        codes = to_codes(x, largest)
        if width < 8:
            codes = (codes & ((1 << width) - 1)) << (k * width)
        joined = codes if joined is None else joined | codes
    assert joined is not None
    codes_ref[0] = joined.T.astype(jnp.uint8)
