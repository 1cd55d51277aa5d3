"""Layers of experts compiled ahead of time for a TPU slice; needs libtpu, no TPU."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jdml.models import Transformer, TransformerConfig, training_loss
from jdml.models.experts.dropless import rows_of_round
from jdml.sharding import collectives, make_mesh, presets, shardings, specs, use_rules

pytestmark = [
    pytest.mark.tpu_compile,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu not installed"),
]

LAYERS, EMBED, EXPERTS, BATCH, SEQ = 3, 512, 8, 4, 512


@pytest.mark.parametrize("capacity_factor", [None, 1.25])
def test_gradients_per_worker(capacity_factor):
    """Rows travel by a ragged all-to-all, or whole buffers; tokens and experts are not gathered."""
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:4x4").devices
    mesh = make_mesh({"data": 2, "expert": 4, "model": 2}, devices=devices)
    rules = presets.expert_parallel(presets.tensor())
    config = TransformerConfig(
        vocab_size=32_768, num_layers=LAYERS, embed_dim=EMBED, num_heads=8, num_kv_heads=4,
        head_dim=64, mlp_dim=1024, num_experts=EXPERTS, capacity_factor=capacity_factor,
        dtype="bfloat16",
    )  # fmt: skip
    graphdef, params = nnx.split(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))
    placed = shardings(specs(params, mesh, rules), mesh)
    params = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), params, placed
    )
    at = NamedSharding(mesh, P("data", "expert"))
    batch = jax.ShapeDtypeStruct((2, BATCH, SEQ), jnp.int32, sharding=at)

    def loss(params, tokens):
        return training_loss(nnx.merge(graphdef, params), tokens, tokens)

    mapped = jax.vmap(jax.value_and_grad(loss, has_aux=True), (None, 0), spmd_axis_name="data")

    @jax.jit
    def per_worker(params, batch):
        with use_rules(mesh, rules, hide=("data",)):
            return mapped(params, batch)

    compiled = per_worker.lower(params, batch).compile()
    found = collectives(compiled, mesh)
    # But for how many rounds any device needs, so that all take the same branch.
    assert not [c for c in found if "data" in c.axes and (c.dtype, c.payload_bytes) != ("s32", 4)]
    # The router's gradient and the losses go round, and the gradients of what all devices hold.
    assert {c.kind for c in found if c.axes == ("model",)} <= {"all-reduce", "reduce-scatter"}
    assert not [c for c in found if c.kind == "all-gather" and "expert" in c.axes]
    kind = "all-to-all" if capacity_factor else "ragged-all-to-all"
    rows = [c for c in found if c.kind == kind and not c.conditional and c.dtype == "bf16"]
    assert sum(c.count for c in rows) == 4 * LAYERS
    tokens = BATCH // 4 * SEQ
    if capacity_factor:
        payload = EXPERTS * (BATCH // 4) * 160 * EMBED * 2  # 160 = 1.25 · 2 · 512 / 8
    else:
        payload = 4 * rows_of_round(tokens, 2, EXPERTS, 4)[0] * EMBED * 2
    assert {c.payload_bytes for c in rows} == {payload}
