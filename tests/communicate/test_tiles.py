"""A vector as a matrix of blocks: what TPU needs changes nothing of what is said."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jdml.communicate import buckets, error_feedback, tiles
from jdml.communicate.buckets import map_in_buckets
from jdml.communicate.codecs import bf16, e3m0, int4, int8, top_k
from jdml.communicate.collectives.all_reduce import TOPOLOGIES
from jdml.communicate.collectives.payloads import in_chunks
from jdml.communicate.tiles import in_tiles, tile_width
from jdml.sharding import make_mesh


def test_a_matrix_has_the_codecs_blocks_for_rows_if_tpu_tiles_hold_them():
    assert tile_width(int8()) == 256
    assert tile_width(int4()) == 128
    assert tile_width(bf16()) == 128
    assert tile_width(e3m0()) == 512
    assert tile_width(int8(100)) is None
    assert tile_width(top_k(0.01)) is None


@pytest.mark.parametrize(
    ("topology", "codec"),
    [
        ("hierarchical", int8(128)),
        ("ring", int4(128)),
        *((topology, bf16()) for topology in TOPOLOGIES),
        *(
            pytest.param(topology, codec, marks=pytest.mark.slow)
            for topology in TOPOLOGIES
            for codec in (int8(128), int4(128))
            if (topology, codec) not in (("hierarchical", int8(128)), ("ring", int4(128)))
        ),
    ],
)
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


def test_a_vector_whose_rows_end_in_short_blocks_is_no_matrix():
    mesh = make_mesh({"data": 4}, devices=jax.devices()[:4])
    shapes = []

    def exchange(x, axis, codec, key, feedback):
        shapes.append((*x.shape, in_chunks(x, 4, codec).shape[1]))
        return x, None

    def both(x):
        for codec, size in ((e3m0(128), 3072), (e3m0(128), 3200), (int4(128), 3200)):
            in_tiles(exchange)(x[:size], "data", codec, None, None)

    mapped = jax.shard_map(both, mesh=mesh, in_specs=P(), out_specs=P())
    jax.eval_shape(mapped, jax.ShapeDtypeStruct((3200,), jnp.float32))
    assert shapes == [(24, 128, 6), (3200, 800), (25, 128, 8)]


@pytest.mark.parametrize(
    ("shape", "rows"),
    [
        ((16, 512), 16),
        ((2, 8, 256), 16),
        ((111, 512), 112),  # filled up
        ((12, 256), None),  # filling up would cost too much
        ((2, 4, 256), None),
        ((8, 128), None),
        ((2048,), None),
        ((3, 5), None),
    ],
)
def test_on_tpu_blocks_are_taken_in_the_order_in_which_tiles_hold_them(shape, rows, monkeypatch):
    monkeypatch.setattr(buckets, "traced_for_tpu", lambda: True)
    leaf = 1 + jnp.arange(np.prod(shape), dtype=jnp.float32).reshape(shape)
    seen = []

    def exchange(_, vector):
        seen.append(vector)
        return (vector,)

    # Another leaf behind it: what is filled up must not be taken for its beginning.
    behind = -jnp.ones(256)
    ((back, back_behind),) = map_in_buckets(exchange, [[leaf, behind]], int8())
    np.testing.assert_array_equal(back, leaf)
    np.testing.assert_array_equal(back_behind, behind)
    expected = np.asarray(leaf).reshape(-1)
    if rows is not None:
        # Eight rows' first blocks, then their second ones.
        matrix = np.zeros((rows, shape[-1]), np.float32)
        matrix[: expected.size // shape[-1]] = expected.reshape(-1, shape[-1])
        expected = matrix.reshape(rows // 8, 8, -1, 256).swapaxes(1, 2).reshape(-1)
    np.testing.assert_array_equal(seen[0][: expected.size], expected)
    np.testing.assert_array_equal(seen[0][-256:], behind)


def test_on_tpu_chunks_of_long_vectors_are_whole_tiles(monkeypatch):
    monkeypatch.setattr(tiles, "traced_for_tpu", lambda: True)
    mesh = make_mesh({"data": 4}, devices=jax.devices()[:4])
    lengths = []

    def exchange(matrix, axis, codec, key, feedback):
        lengths.append(in_chunks(matrix, 4, codec).shape[1])
        return matrix, None

    def both(x):
        for num_blocks in (3201, 1025):
            in_tiles(exchange)(x[: 128 * num_blocks], "data", int8(128), None, None)

    mapped = jax.shard_map(both, mesh=mesh, in_specs=P(), out_specs=P())
    jax.eval_shape(mapped, jax.ShapeDtypeStruct((128 * 3201,), jnp.float32))
    assert lengths == [808, 257]  # 31 blocks more for 3201, not for 1025
