"""The same code compiled ahead of time for TPU topologies; needs libtpu, no TPU."""

import importlib.util
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from jdml.sharding import (
    check_compiled,
    constrain,
    describe_mesh,
    lower_init,
    make_mesh,
    optimizer_specs,
    presets,
    shardings,
    specs,
    use_rules,
)

pytestmark = [
    pytest.mark.tpu_compile,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu not installed"),
]

TOPOLOGIES = {
    "v5e 4x4": ("v5e:4x4", 1, {"data": 2, "fsdp": 2, "model": 4}),
    "v5p 4x4x4": ("v5p:4x4x4", 1, {"data": 4, "fsdp": 4, "model": 4}),
    "two slices": ("v5e:4x4", 2, {"data": 2, "fsdp": 4, "model": 4}),
    "two slices of data": ("v5e:4x4", 2, {"data": 8, "fsdp": 1, "model": 4}),
}
LAYERS, WIDTH = 2, 512


@pytest.fixture(params=TOPOLOGIES)
def mesh(request):
    from jax.experimental import topologies

    name, num_slices, shape = TOPOLOGIES[request.param]
    more = {"num_slices": num_slices} if num_slices > 1 else {}
    described = topologies.get_topology_desc(platform="tpu", topology_name=name, **more)
    dcn = {"data": num_slices} if num_slices > 1 else None
    return make_mesh(shape, dcn=dcn, devices=described.devices)


class Block(nnx.Module):
    def __init__(self, rngs):
        up, down = ("embed", "mlp"), ("mlp", "embed")
        self.up = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs, kernel_metadata={"out_sharding": up})
        self.down = nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs, kernel_metadata={"out_sharding": down})

    def __call__(self, x):
        hidden = constrain(jax.nn.relu(self.up(x)), "batch", "mlp")
        return constrain(x + self.down(hidden), "batch", "embed")


def make_model():
    @nnx.split_rngs(splits=LAYERS)
    @nnx.vmap(transform_metadata={nnx.PARTITION_NAME: "layers"})
    def make(rngs):
        return Block(rngs)

    return make(nnx.Rngs(0))


def test_slices_are_crossed_by_data_alone(mesh):
    slice_of = np.vectorize(lambda device: getattr(device, "slice_index", 0))(mesh.devices)
    num_slices = len(set(slice_of.flat))
    per_slice = mesh.shape["data"] // num_slices
    for data in range(mesh.shape["data"]):
        assert set(slice_of[data].flat) == {data // per_slice}
    assert len({device.id for device in mesh.devices.flat}) == mesh.size
    assert (f"{num_slices} slices" in describe_mesh(mesh)) == (num_slices > 1)


def test_init_and_step(mesh):
    import optax

    rules = presets.fsdp_tensor()
    created = lower_init(make_model, mesh, rules).compile()
    arrays = re.findall(r"\b[a-z]+\d*\[([\d,]+)\]", created.as_text())
    largest = max(math.prod(map(int, dims.split(","))) for dims in arrays)
    parts = mesh.shape["fsdp"] * mesh.shape["model"]
    # TPU tiles pad a shard's dims to multiples of 8 × 128, hence the allowance.
    assert largest <= 1.1 * LAYERS * 4 * WIDTH * WIDTH / parts

    with nnx.use_eager_sharding(False):
        graphdef, params = nnx.split(nnx.eval_shape(make_model))
    tx = optax.adamw(1e-3)
    opt_state = jax.eval_shape(tx.init, params)
    param_specs = specs(params, mesh, rules)
    opt_specs = optimizer_specs(opt_state, params, param_specs)
    batch_spec = P(("data", "fsdp"), None)

    def step(params, opt_state, batch):
        def loss_fn(params):
            with use_rules(mesh, rules):
                stacked = nnx.merge(graphdef, params)
                out, _ = jax.lax.scan(lambda x, block: (block(x), None), batch, stacked)
            return jnp.mean(out**2)

        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    layout = (param_specs, opt_specs)
    args = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        (params, opt_state, jax.ShapeDtypeStruct((64, WIDTH), jnp.float32)),
        shardings((*layout, batch_spec), mesh),
    )
    compiled = jax.jit(step, out_shardings=shardings((*layout, P()), mesh)).lower(*args).compile()
    check_compiled(compiled, mesh, (*layout, batch_spec), (*layout, P()))
