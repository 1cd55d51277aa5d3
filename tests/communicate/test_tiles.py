"""A vector as a matrix of blocks: what TPU needs changes nothing of what is said."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jdml.communicate import buckets, error_feedback
from jdml.communicate.buckets import map_in_buckets
from jdml.communicate.codecs import int4, int8, top_k
from jdml.communicate.collectives.all_reduce import TOPOLOGIES
from jdml.communicate.tiles import in_tiles, tile_width
from jdml.sharding import make_mesh


def test_a_matrix_has_the_codecs_blocks_for_rows_if_tpu_tiles_hold_them():
    assert tile_width(int8()) == 256
    assert tile_width(int4()) == 128
    assert tile_width(int8(100)) is None
    assert tile_width(top_k(0.01)) is None


@pytest.mark.parametrize("codec", [int8(128), int4(128)])
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_says_the_same_in_tiles(topology, codec):
    shape = {"slow": 2, "fast": 2} if topology == "hierarchical" else {"data": 4}
    mesh = make_mesh(shape, devices=jax.devices()[:4])
    axis = tuple(shape) if len(shape) > 1 else "data"
    feedback = error_feedback(codec)
    x = np.random.default_rng(0).standard_normal((4, 6 * 256)).astype(np.float32)

    def both(x):
        args = (x[0], axis, codec, None, feedback)
        plain, tiled = TOPOLOGIES[topology](*args), in_tiles(TOPOLOGIES[topology])(*args)
        return jax.tree.map(lambda a: a[None], (plain, tiled))

    specs = P(axis)
    mapped = jax.shard_map(both, mesh=mesh, in_specs=specs, out_specs=specs)
    (mean, error), (mean_in_tiles, error_in_tiles) = jax.jit(mapped)(x)
    np.testing.assert_array_equal(mean_in_tiles, mean)
    np.testing.assert_array_equal(error_in_tiles, error)


@pytest.mark.parametrize("shape", [(16, 512), (2, 8, 256), (8, 128), (12, 256), (2048,), (3, 5)])
def test_on_tpu_blocks_are_taken_in_the_order_in_which_tiles_hold_them(shape, monkeypatch):
    monkeypatch.setattr(buckets, "traced_for_tpu", lambda: True)
    leaf = jnp.arange(np.prod(shape), dtype=jnp.float32).reshape(shape)
    seen = []

    def exchange(_, vector):
        seen.append(vector)
        return (vector,)

    ((back,),) = map_in_buckets(exchange, [[leaf]], int8())
    np.testing.assert_array_equal(back, leaf)
    # Whole tiles: eight rows' first blocks, then their second ones. Else row by row.
    expected = np.asarray(leaf).reshape(-1)
    if len(shape) > 1 and shape[-1] % 256 == 0 and shape[-2] % 8 == 0:
        tiles = np.asarray(leaf).reshape(-1, 8, shape[-1] // 256, 256)
        expected = tiles.transpose(0, 2, 1, 3).reshape(-1)
    np.testing.assert_array_equal(seen[0][: leaf.size], expected)
