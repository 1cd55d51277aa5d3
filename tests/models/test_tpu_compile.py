"""The decoder's gradients compiled ahead of time for a TPU slice; needs libtpu, no TPU."""

import importlib.util
from collections import Counter

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jdml.models import Transformer, TransformerConfig, next_token_loss
from jdml.sharding import make_mesh, presets, shardings, specs, use_rules
from jdml.sharding.compiled import collectives

pytestmark = [
    pytest.mark.tpu_compile,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu not installed"),
]


@pytest.fixture
def slice_16():
    from jax.experimental import topologies

    return topologies.get_topology_desc(platform="tpu", topology_name="v5e:4x4").devices


@pytest.mark.parametrize("fsdp", [1, 2])
def test_gradients_per_worker(slice_16, fsdp):
    """A large vocabulary divided over ``model``, in chunks; workers are silent in the gradient."""
    mesh = make_mesh({"data": 4 // fsdp, "fsdp": fsdp, "model": 4}, devices=slice_16)
    rules = presets.fsdp_tensor()
    config = TransformerConfig(
        vocab_size=32_768, num_layers=3, embed_dim=512, num_heads=8, num_kv_heads=4, head_dim=64,
        mlp_dim=1024, dtype="bfloat16",
    )  # fmt: skip
    graphdef, params = nnx.split(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))
    placed = shardings(specs(params, mesh, rules), mesh)
    params = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), params, placed
    )
    workers, seq = mesh.shape["data"], 1024
    batch = jax.ShapeDtypeStruct(
        (workers, 4, seq), jnp.int32, sharding=NamedSharding(mesh, P("data", "fsdp"))
    )

    def loss(params, tokens):
        return next_token_loss(nnx.merge(graphdef, params), tokens, tokens)

    workers_gradients = jax.vmap(jax.value_and_grad(loss), (None, 0), spmd_axis_name="data")

    @jax.jit
    def per_worker(params, batch):
        with use_rules(mesh, rules, hide=("data",)):
            return workers_gradients(params, batch)

    compiled = per_worker.lower(params, batch).compile()
    found = collectives(compiled, mesh)
    assert not [c for c in found if "data" in c.axes]
    assert {c.kind for c in found if c.axes == ("model",)} <= {"all-reduce", "reduce-scatter"}
    # A piece of the head is put together, and its gradient summed, once for all chunks.
    gathered = [c for c in found if c.kind in ("all-gather", "reduce-scatter")]
    assert all(len(c.loops) < 2 for c in gathered)
    if fsdp > 1:
        layer = config.num_layer_params // 4
        widths = {"bf16": 2, "f32": 4, "s32": 4}  # numbers of words travel, too
        assert max(c.whole_bytes / widths[c.dtype] for c in gathered) <= layer
        pieces = -(-config.embed_dim * config.vocab_size // config.num_layer_params)
        assert sum(c.count for c in gathered if c.loops == (pieces,)) == 3 * pieces
    logits = 4 // fsdp * seq * config.vocab_size // 4 * 4
    assert compiled.memory_analysis().temp_size_in_bytes < logits


@pytest.mark.parametrize("sequence", [False, True], ids=["tensor", "sequence"])
def test_collectives_of_a_layer(sequence):
    """Two sums over the axis forward and two backward; or as many gathers and scatters.

    Megatron's count: backward, what the norms gave is gathered again for the kernels' gradients.
    """
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices
    mesh = make_mesh({"data": 2, "model": 4}, devices=devices)
    rules = presets.tensor()
    rules = presets.sequence_parallel(rules) if sequence else rules
    batch, seq, layers = 8, 256, 3
    config = TransformerConfig(
        vocab_size=8192, num_layers=layers, embed_dim=512, num_heads=8, num_kv_heads=4,
        head_dim=64, mlp_dim=1024, dtype="bfloat16", flatten_tokens=not sequence,
    )  # fmt: skip
    graphdef, params = nnx.split(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))
    placed = shardings(specs(params, mesh, rules), mesh)
    params = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), params, placed
    )
    by_data = NamedSharding(mesh, P("data"))
    tokens = jax.ShapeDtypeStruct((batch, seq), jnp.int32, sharding=by_data)

    @jax.jit
    def run(params, tokens):
        with use_rules(mesh, rules):
            return jax.value_and_grad(
                lambda p: next_token_loss(nnx.merge(graphdef, p), tokens, tokens)
            )(params)

    found = collectives(run.lower(params, tokens).compile(), mesh)
    over = [c for c in found if "model" in c.axes]
    whole = batch // 2 * seq * config.embed_dim * 2
    inside = Counter((c.kind, c.operand_bytes) for c in over if c.loops == (layers,))
    if sequence:
        assert inside == {
            ("all-gather", (whole // 4,)): 2 + 2 + 2,
            ("reduce-scatter", (whole,)): 2 + 2,
        }
    else:
        assert inside == {("all-reduce", (whole,)): 2 + 2}
    # The embedded tokens, and the loss's exchanges: no table, no logits.
    logits = batch // 2 * seq * config.vocab_size // 4 * 4
    assert max(size for c in over for size in c.operand_bytes) == whole < logits
