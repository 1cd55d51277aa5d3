"""PowerSGD in a training step compiled ahead of time for a TPU topology; needs libtpu, no TPU."""

import importlib.util
import math

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import PartitionSpec as P

from jdml.aggregate import mean_gradients
from jdml.communicate.codecs import power_sgd
from jdml.sharding import collectives, make_mesh
from jdml.train import make_step

pytestmark = [
    pytest.mark.tpu_compile,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu not installed"),
]

SHAPES = {"layers": {"up": (3, 256, 1024), "down": (3, 8, 128, 256)}, "bias": (1024,)}
SPECS = {
    "layers": {"up": P(None, "fsdp", "model"), "down": P(None, "model", None, "fsdp")},
    "bias": P("model"),
}


def test_factors_go_over_the_workers_and_leaves_nowhere():
    from jax.experimental import topologies

    described = topologies.get_topology_desc(platform="tpu", topology_name="v5e:4x4")
    mesh = make_mesh({"data": 4, "fsdp": 2, "model": 2}, devices=described.devices)
    shapes = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s, jnp.float32), SHAPES, is_leaf=lambda s: type(s) is tuple
    )

    def loss_fn(p, batch, key):
        x = batch
        for up, down in zip(p["layers"]["up"], p["layers"]["down"], strict=True):
            hidden = jnp.tanh(x @ up + p["bias"])
            x = x + jnp.einsum("bhd,hdk->bk", hidden.reshape(-1, 8, 128), down)
        return jnp.mean(x**2), {}

    codec = power_sgd(4)
    tx = optax.chain(mean_gradients("data", codec), optax.sgd(0.1))
    init, step = make_step(loss_fn, tx, mesh, specs=SPECS)
    batch = jax.ShapeDtypeStruct((64, 256), jnp.float32)
    found = collectives(step.lower(init.abstract(shapes), batch).compile(), mesh)
    workers = [c for c in found if "data" in c.axes]
    assert all(c.axes == ("data",) and c.dtype == "f32" for c in workers)
    assert [c.kind for c in workers if c.payload_bytes > 4] == ["all-reduce"] * 2
    assert sum(c.payload_bytes for c in workers) <= 4 * (codec.num_elements(shapes) + 1)
    # The most that is gathered is the factors of one leaf, which are kept whole.
    factor = 4 * 3 * 4 * 1024
    part = 4 * math.prod(SHAPES["layers"]["up"]) // 4
    gathered = [c for c in found if c.kind in ("all-gather", "all-to-all", "collective-permute")]
    assert max(c.payload_bytes for c in gathered) <= factor < part
