"""Digests: independent of the sharding, and blind to no single change."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jdml.sharding import make_mesh
from jdml.train.saving.digest import _weights, digest_arrays, digest_shard

DTYPES = ["float32", "bfloat16", "float16", "int8", "uint8", "int32", "uint32", "bool", "complex64"]
DTYPES += ["float8_e4m3fn", "int4", "uint4"]


def values(shape: tuple[int, ...], dtype: str, seed: int = 0) -> np.ndarray:
    numbers = np.random.default_rng(seed).integers(0, 8, shape)
    return np.asarray(jnp.asarray(numbers).astype(dtype))


@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (2, 3, 4), (0,), (3, 0, 2)])
def test_is_the_sum_of_its_formula(shape):
    array = np.random.default_rng(1).integers(0, 2**32, shape, dtype=np.uint32)
    tables = [_weights(dim, 0, size) for dim, size in enumerate(shape)]
    total = 0
    for index in itertools.product(*map(range, shape)):
        weight = 1
        for table, i in zip(tables, index, strict=True):
            weight *= int(table[i])
        total += weight * int(array[index])
    assert digest_shard(array, [0] * len(shape)) == total % 2**64


def test_weights_are_odd_and_differ_between_indices_and_dims():
    tables = [_weights(dim, 0, 1000) for dim in range(3)]
    together = np.concatenate(tables)
    assert np.all(together % 2 == 1)
    assert np.unique(together).size == together.size
    assert np.array_equal(_weights(1, 250, 50), tables[1][250:300])


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_sharding_gives_the_same_digest(dtype):
    array = values((8, 4, 6), dtype)
    mesh = make_mesh({"data": 4, "model": 2})
    single = jax.sharding.SingleDeviceSharding(jax.devices()[3])
    shardings = [single] + [
        NamedSharding(mesh, spec)
        for spec in (
            PartitionSpec(),
            PartitionSpec("data"),
            PartitionSpec(None, "data", "model"),
            PartitionSpec(("data", "model")),
            PartitionSpec("model", "data"),
        )
    ]
    digests = {digest_arrays([jax.device_put(array, s)])[0] for s in shardings}
    assert digests == {digest_shard(array, (0, 0, 0)) % 2**64}


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_single_flipped_bit_is_seen(dtype):
    array = values((3, 5), dtype)
    expected = digest_shard(array, (0, 0))
    # A bool has one bit that means something, a 4-bit number four.
    num_bits = 1 if dtype == "bool" else jax.dtypes.itemsize_bits(array.dtype)
    for element, bit in itertools.product(range(array.size), range(num_bits)):
        changed = array.copy()
        changed.reshape(-1).view(np.uint8).reshape(array.size, -1)[element, bit // 8] ^= (
            1 << bit % 8
        )
        assert digest_shard(changed, (0, 0)) != expected


def test_swapped_elements_rows_and_columns_are_seen():
    array = np.random.default_rng(2).normal(size=(64, 64)).astype(np.float32)
    expected = digest_shard(array, (0, 0))
    for i, j in itertools.combinations(range(0, 64, 7), 2):
        rows, columns, elements = array.copy(), array.copy(), array.copy()
        rows[[i, j]] = rows[[j, i]]
        columns[:, [i, j]] = columns[:, [j, i]]
        elements[0, [i, j]] = elements[0, [j, i]]
        assert len({expected, *(digest_shard(x, (0, 0)) for x in (rows, columns, elements))}) == 4


def test_not_a_number_and_negative_zero_are_bits_like_any_other():
    array = np.array([0.0, np.nan, 1.0], np.float32)
    other = array.copy()
    other[0] = -0.0
    assert digest_shard(array, (0,)) == digest_shard(array.copy(), (0,))
    assert digest_shard(array, (0,)) != digest_shard(other, (0,))


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_typed_keys_are_digested_by_their_data(impl):
    mesh = make_mesh({"data": 4, "model": 2})
    keys = jax.random.split(jax.random.key(1, impl=impl), 8)
    sharded = jax.device_put(keys, NamedSharding(mesh, PartitionSpec("data")))
    other = jax.random.split(jax.random.key(2, impl=impl), 8)
    first, second, third = digest_arrays([keys, sharded, other])
    assert first == second == digest_arrays([jax.random.key_data(keys)])[0]
    assert first != third
