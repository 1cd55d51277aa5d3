"""What the backward pass keeps changes no number; in which memory, a TPU's compiler shows."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jdml.models import Transformer, TransformerConfig, pipeline_parts
from jdml.models.transformer import remat as remat_module
from jdml.sharding import make_mesh, no_mesh, presets, shardings, specs, use_rules
from jdml.train import make_step


@pytest.mark.parametrize("remat", ["offload_dots", "offload_full"])
def test_offloaded_gradients_are_those_of_what_stays(make, tokens, remat):
    """Bit for bit: on CPU both memories are one."""

    def gradients(name):
        graphdef, params = nnx.split(make(remat=name))

        @jax.jit
        def run(params):
            return jax.grad(lambda p: jnp.sum(nnx.merge(graphdef, p).hidden(tokens) ** 2))(params)

        with no_mesh():
            return nnx.to_pure_dict(run(params))

    jax.tree.map(
        np.testing.assert_array_equal,
        gradients(remat),
        gradients(remat.removeprefix("offload_")),
    )


def test_refused_without_host_memory(make, tokens, monkeypatch):
    monkeypatch.setattr(remat_module, "memory_kinds", lambda: frozenset({"device"}))
    with no_mesh(), pytest.raises(ValueError, match=r"no 'pinned_host'. Use remat='full'"):
        make(remat="offload_full")(tokens)


def test_refused_in_a_pipeline(make):
    with pytest.raises(ValueError, match="a pipeline's schedule says what is kept"):
        pipeline_parts(make(remat="offload_dots"))


@pytest.mark.slow
@pytest.mark.tpu_compile
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu not installed")
def test_memory_of_a_device_on_tpu():
    """Eight scanned layers under FSDP: what they keep leaves the device."""
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    mesh, rules = make_mesh({"data": 1, "fsdp": 4}, devices=devices), presets.fsdp()
    layers, batch, seq, embed = 8, 1024, 128, 512  # more than the scratch memory holds

    def memory(remat):
        config = TransformerConfig(
            vocab_size=256, num_layers=layers, embed_dim=embed, num_heads=2, num_kv_heads=2,
            head_dim=128, mlp_dim=512, dtype="bfloat16", remat=remat,
        )  # fmt: skip
        graphdef, params = nnx.split(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))
        placed = shardings(specs(params, mesh, rules), mesh)
        params = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), params, placed
        )
        tokens = jax.ShapeDtypeStruct(
            (batch, seq), jnp.int32, sharding=NamedSharding(mesh, P(("data", "fsdp")))
        )

        @jax.jit
        def run(params, tokens):
            with use_rules(mesh, rules):
                return jax.grad(
                    lambda p: jnp.sum(nnx.merge(graphdef, p).hidden(tokens).astype(jnp.float32))
                )(params)

        found = run.lower(params, tokens).compile().memory_analysis()
        return found.temp_size_in_bytes, found.host_temp_size_in_bytes

    stays, none = memory("full")
    left, host = memory("offload_full")
    stream = batch // 4 * seq * embed * 2  # bytes of the residual stream, of one layer
    assert none == 0
    assert host >= layers * stream
    assert left <= stays - (layers - 3) * stream


@pytest.mark.tpu_compile
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu not installed")
def test_a_training_steps_products_on_the_host_on_tpu():
    """``make_step``, which maps over workers, under FSDP: products leave the device, too."""
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    mesh, rules = make_mesh({"data": 2, "fsdp": 2}, devices=devices), presets.fsdp()
    layers, batch, seq, embed, mlp = 4, 64, 128, 256, 512
    config = TransformerConfig(
        vocab_size=256, num_layers=layers, embed_dim=embed, num_heads=2, num_kv_heads=2,
        head_dim=128, mlp_dim=mlp, dtype="bfloat16", remat="offload_dots",
    )  # fmt: skip
    graphdef, params = nnx.split(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))

    def loss_fn(params, batch, key):
        del key
        hidden = nnx.merge(graphdef, params).hidden(batch)
        return jnp.mean(hidden.astype(jnp.float32) ** 2), {}

    init, step = make_step(
        loss_fn,
        optax.sgd(1e-3),
        mesh,
        specs=specs(params, mesh, rules),
        rules=rules,
        batch_axes=("fsdp",),
    )
    tokens = jax.ShapeDtypeStruct(
        (batch, seq), jnp.int32, sharding=NamedSharding(mesh, P(("data", "fsdp")))
    )
    found = step.lower(init.abstract(params), tokens).compile().memory_analysis()
    # Queries, keys and values, what the MLP makes of x: bfloat16, of each layer.
    kept = batch // 4 * seq * (3 * embed + mlp) * 2
    assert found.host_temp_size_in_bytes >= layers * kept, (found.host_temp_size_in_bytes, kept)
