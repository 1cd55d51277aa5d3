"""Mixing compiled ahead of time for a TPU slice; needs libtpu, no TPU."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jdml.communicate.codecs import int8
from jdml.communicate.topology import mix, one_peer_exponential, random_pairs, ring, torus
from jdml.sharding import collectives, make_mesh

pytestmark = [
    pytest.mark.tpu_compile,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu not installed"),
]

SIZES = (1 << 15, 100)  # below 64 KiB of payload, where nothing is filled up


@pytest.mark.parametrize("codec", [None, int8()])
@pytest.mark.parametrize(
    "graph",
    [ring(8), torus(2, 4), one_peer_exponential(8), random_pairs(8, 2, 0)],
    ids=repr,
)
def test_one_permute_per_neighbour_beside_other_work(graph, codec):
    from jax.experimental import topologies

    described = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4")
    mesh = make_mesh({"data": 8}, devices=described.devices)

    def body(x, step):
        mixed = mix([leaf[0] for leaf in x], "data", graph, step, codec)
        return [leaf[None] for leaf in mixed]

    mapped = jax.shard_map(body, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data"))
    each, all_alike = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    leaves = [jax.ShapeDtypeStruct((8, n), jnp.float32, sharding=each) for n in SIZES]
    step = jax.ShapeDtypeStruct((), jnp.int32, sharding=all_alike)
    seen = collectives(jax.jit(mapped).lower(leaves, step).compile(), mesh)

    assert len(seen) == sum(map(len, graph.permutations))
    assert {c.kind for c in seen} == {"collective-permute"}
    assert all(c.asynchronous for c in seen)
    assert all(c.conditional == (graph.period > 1) for c in seen)
    payload = 4 * sum(SIZES) if codec is None else codec.payload_bytes(SIZES[0] + 256)
    assert {(c.dtype, c.sent_bytes) for c in seen} == {("f32" if codec is None else "u8", payload)}
