"""The library's transformer and training step compiled ahead of time for TPU; needs libtpu, no TPU.

What the workers say is read off the compiled program: with int8 nothing but bytes and a loss goes
over their axis, and the other axes carry exactly what they carry without it.
"""

import importlib.util
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jdml.aggregate import mean_gradients
from jdml.communicate import error_feedback
from jdml.communicate.codecs import int8
from jdml.models import Transformer, TransformerConfig, next_token_loss
from jdml.sharding import (
    Collective,
    bytes_per_axis,
    check_compiled,
    collectives,
    make_mesh,
    presets,
    specs,
)
from jdml.train import make_step

pytestmark = [
    pytest.mark.tpu_compile,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None,
        reason="libtpu is not installed: make test-tpu, or pip install libtpu",
    ),
]

TOPOLOGIES = {
    "v5e 4x4": ("v5e:4x4", 1, {"data": 4, "fsdp": 2, "model": 2}),
    "v5p 4x4x4": ("v5p:4x4x4", 1, {"data": 4, "fsdp": 4, "model": 4}),
    "two slices of v5e 4x4": ("v5e:4x4", 2, {"data": 4, "fsdp": 4, "model": 2}),
}
# Embedding and head must not be square: for TPU, XLA joins the optimiser's broadcasts of one shape,
# and two such leaves that are laid out crosswise are then moved to meet (jax 0.10.2 and 0.12.0.1).
SMALL = TransformerConfig(
    vocab_size=512, num_layers=2, embed_dim=256, num_heads=4, num_kv_heads=4, head_dim=64,
    mlp_dim=512,
)  # fmt: skip
BATCH_SPEC = P(("data", "fsdp"))
# A scalar for each device, which the exchange between slices fills up to a tile.
SCALARS = 512


class Compiled(NamedTuple):
    program: Any
    collectives: list[Collective]
    num_gradients: int  # on each device

    def over_workers(self) -> list[Collective]:
        return [c for c in self.collectives if "data" in c.axes]

    def sent(self, *, workers: bool) -> dict[tuple[str, ...], int]:
        return bytes_per_axis(c for c in self.collectives if ("data" in c.axes) == workers)


def mesh_of(name):
    from jax.experimental import topologies

    topology, num_slices, shape = TOPOLOGIES[name]
    more = {"num_slices": num_slices} if num_slices > 1 else {}
    described = topologies.get_topology_desc(platform="tpu", topology_name=topology, **more)
    dcn = {"data": num_slices} if num_slices > 1 else None
    return make_mesh(shape, dcn=dcn, devices=described.devices)


def compile_step(mesh, config, batch, codec) -> Compiled:
    """A step of ``make_step``, found to take and return every array as asked."""
    rules = presets.fsdp_tensor()
    with nnx.use_eager_sharding(False):
        graphdef, params = nnx.split(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))

    def loss_fn(params, batch, key):
        model = nnx.merge(graphdef, params)
        return next_token_loss(model, batch["inputs"], batch["targets"], key=key), {}

    init, step = make_step(
        loss_fn,
        optax.chain(
            mean_gradients("data", codec), optax.clip_by_global_norm(1.0), optax.adamw(1e-3)
        ),
        mesh,
        specs=specs(params, mesh, rules),
        rules=rules,
        batch_axes=("fsdp",),
    )
    state = init.abstract(params)
    tokens = jax.ShapeDtypeStruct(batch, jnp.int32, sharding=NamedSharding(mesh, BATCH_SPEC))
    program = step.lower(state, {"inputs": tokens, "targets": tokens}).compile()
    asked = jax.tree.map(lambda x: x.sharding.spec, state)
    check_compiled(program, mesh, (asked, BATCH_SPEC), (asked, None))
    local = [math.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(state.params)]
    return Compiled(program, collectives(program, mesh), sum(local))


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_int8_says_bytes_to_the_workers_and_nothing_more_to_the_others(name):
    mesh = mesh_of(name)
    exact, coded = (
        compile_step(mesh, SMALL, (64, 128), codec) for codec in (None, error_feedback(int8()))
    )
    for step, dtype in ((exact, "f32"), (coded, "u8")):
        # Workers exchange with workers alone, and only what the codec says; and their loss.
        assert {c.axes for c in step.over_workers()} == {("data",)}
        spoken = [c for c in step.over_workers() if c.payload_bytes > SCALARS]
        assert {c.dtype for c in spoken} == {dtype}
        assert {c.count for c in spoken} == {1}
        assert any(c.between_slices for c in spoken) == ("slices" in name)
    assert coded.sent(workers=False) == exact.sent(workers=False)
    # A byte for each gradient, four for each block of 256, out and back: (K - 1) / K of both ways.
    once = 3 / 4 * (1 + 4 / 256) * exact.num_gradients
    said = sum(c.sent_bytes for c in coded.over_workers() if c.dtype == "u8")
    assert 2 * once <= said <= 1.01 * 2 * once  # the last block of each vector is filled up


@pytest.mark.slow
def test_realistic_size():
    """Half a billion parameters in bf16 on sixteen chips: it fits, and the step is as asked."""
    config = TransformerConfig(
        vocab_size=32_768, num_layers=8, embed_dim=2048, num_heads=16, num_kv_heads=8,
        head_dim=128, mlp_dim=5632, dtype="bfloat16",
    )  # fmt: skip
    step = compile_step(mesh_of("v5e 4x4"), config, (64, 1024), None)
    assert {c.axes for c in step.over_workers()} == {("data",)}
    memory = step.program.memory_analysis()
    assert memory.argument_size_in_bytes + memory.temp_size_in_bytes < 16e9
