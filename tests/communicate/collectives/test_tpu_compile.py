"""The exchanges compiled ahead of time for a TPU slice: the bytes that the cost model says."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from jdml.communicate import (
    Link,
    all_gather,
    all_reduce_mean,
    broadcast,
    predict,
    reduce_scatter_mean,
)
from jdml.communicate.codecs import int8
from jdml.sharding import collectives, make_mesh

pytestmark = [
    pytest.mark.tpu_compile,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu not installed"),
]

AXES, SHAPE, SIZE = ("slow", "fast"), (2, 4), 1 << 18


@pytest.fixture(scope="module")
def describe():
    from jax.experimental import topologies

    return lambda: topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4")


def all_reduce(topology):
    return lambda x, axes, codec: all_reduce_mean(x, axes, codec, topology)


@pytest.mark.parametrize("codec", [None, int8()])
@pytest.mark.parametrize(
    ("pattern", "exchange"),
    [
        ("ring", all_reduce("ring")),
        ("tree", all_reduce("tree")),
        ("hierarchical", all_reduce("hierarchical")),
        ("all_gather", all_gather),
        ("reduce_scatter", reduce_scatter_mean),
        ("broadcast", broadcast),
    ],
)
def test_carries_the_bytes_predicted(describe, pattern, exchange, codec):
    mesh = make_mesh(dict(zip(AXES, SHAPE, strict=True)), devices=describe().devices)
    sharding = jax.NamedSharding(mesh, P(AXES))
    x = jax.ShapeDtypeStruct((8 * SIZE,), jnp.float32, sharding=sharding)
    mapped = jax.shard_map(
        lambda x: exchange(x, AXES, codec), mesh=mesh, in_specs=P(AXES), out_specs=P(AXES)
    )
    found = collectives(jax.jit(mapped).lower(x).compile(), mesh)
    assert {c.dtype for c in found} <= {"f32", "u8", "s8"}
    num_workers = SHAPE if pattern == "hierarchical" else 8
    cost = predict(pattern, num_workers, SIZE, codec, Link(0, 1))
    if pattern == "hierarchical":
        for name, expected in zip(AXES, cost.bytes_per_axis, strict=True):
            assert sum(c.sent_bytes for c in found if c.axes == (name,)) == expected
    assert sum(c.sent_bytes * c.count for c in found) == cost.sent_bytes
