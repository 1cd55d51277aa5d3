"""ZeRO inside a worker, int8 between workers: compiled ahead of time for a TPU slice."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jdml.aggregate import mean_gradients
from jdml.communicate.codecs import int8
from jdml.sharding import collectives, make_mesh
from jdml.train import make_step

pytestmark = [
    pytest.mark.tpu_compile,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu not installed"),
]

WIDTH, LAYERS = 1024, 4
SIZE = LAYERS * WIDTH * WIDTH


@pytest.fixture(scope="module")
def mesh():
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:4x4").devices
    return make_mesh({"data": 4, "fsdp": 4}, devices=devices)


def loss_fn(params, batch, key):
    del key
    y, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), batch, params["layers"])
    return jnp.mean(y**2), {}


@pytest.mark.parametrize("zero", [0, 2, 3])
def test_state_and_traffic_of_a_device(mesh, zero):
    tx = optax.chain(mean_gradients("data", int8()), optax.adam(1e-3))
    specs = {"layers": P()}
    init, step = make_step(loss_fn, tx, mesh, specs=specs, batch_axes=("fsdp",), zero=zero)
    state = init.abstract({"layers": jax.ShapeDtypeStruct((LAYERS, WIDTH, WIDTH), jnp.float32)})
    batch = jax.ShapeDtypeStruct(
        (4096, WIDTH), jnp.float32, sharding=NamedSharding(mesh, P(("data", "fsdp")))
    )
    compiled = step.lower(state, batch).compile()

    share = 4 if zero else 1
    held = 4 * SIZE * (2 / share + 1 / (share if zero == 3 else 1))  # two moments; parameters
    batch_bytes = batch.size // 16 * 4
    arguments = compiled.memory_analysis().argument_size_in_bytes
    np.testing.assert_allclose(arguments, held + batch_bytes, rtol=0.01)

    large = [c for c in collectives(compiled, mesh) if c.payload_bytes > 64 * 1024]
    between = sum(c.sent_bytes * c.count for c in large if c.axes == ("data",))
    one_way = 3 / 4 * (SIZE / share) * (1 + 4 / 256)  # int8 and a scale for each 256
    np.testing.assert_allclose(between, 2 * one_way, rtol=0.02)

    # Inside a worker the gradients are summed: whole, or each device's slice alone.
    inside = {c.kind for c in large if c.axes == ("fsdp",)}
    assert inside == ({"reduce-scatter", "all-gather"} if zero else {"all-reduce"})
    if zero == 3:  # one layer at a time
        gathered = [c for c in large if c.kind == "all-gather" and c.axes == ("fsdp",)]
        assert all(c.payload_bytes <= WIDTH * WIDTH * 4 / share for c in gathered)
