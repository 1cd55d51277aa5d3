"""Tables that FSDP divides: the plain loss's numbers, and nothing larger than a layer exchanged."""

import collections
import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jdml.models import Transformer, TransformerConfig, next_token_loss, pipeline_parts
from jdml.partition.pipeline import pipeline
from jdml.sharding import collectives, make_mesh, no_mesh, presets, shard, specs, use_rules

# Too large for its rows to be gathered; the head as large as three layers, and a part of it in
# pieces that must be filled up.
VOCAB = 4108
CONFIG = TransformerConfig(
    vocab_size=VOCAB, num_layers=1, embed_dim=16, num_heads=2, num_kv_heads=2, head_dim=64,
    mlp_dim=320,
)  # fmt: skip
MESHES = {
    "fsdp": ({"data": 2, "fsdp": 4}, presets.fsdp(), CONFIG),
    "fsdp-tensor": ({"data": 2, "fsdp": 2, "model": 2}, presets.fsdp_tensor(), CONFIG),
    "two-axes": (
        {"data": 1, "a": 2, "b": 2, "model": 2},
        presets.fsdp_tensor(fsdp=("a", "b")),
        dataclasses.replace(CONFIG, tie_embeddings=True, dtype="bfloat16"),
    ),
}


def decoder(config):
    return nnx.split(Transformer(config, rngs=nnx.Rngs(0)))


@pytest.fixture(
    scope="module",
    params=[
        name if name == "fsdp-tensor" else pytest.param(name, marks=pytest.mark.slow)
        for name in MESHES
    ],
)
def compiled(request):
    """Per worker, as a training step does it: (config, mesh, program's results, the plain ones)."""
    sizes, rules, config = MESHES[request.param]
    mesh = make_mesh(sizes)
    with no_mesh():
        graphdef, params = decoder(config)
    workers = mesh.shape["data"]
    tokens = jax.random.randint(jax.random.key(1), (workers, 4, 14), 0, VOCAB)
    mask = jax.random.bernoulli(jax.random.key(2), 0.8, tokens.shape)

    def loss(params, tokens, mask):
        model = nnx.merge(graphdef, params)
        return next_token_loss(model, tokens[:, :-1], tokens[:, 1:], mask[:, 1:], chunk_size=5)

    @jax.jit
    def per_worker(params, tokens, mask):
        with use_rules(mesh, rules, hide=("data",)):
            run = jax.vmap(jax.value_and_grad(loss), (None, 0, 0), spmd_axis_name="data")
            return run(params, tokens, mask)

    with use_rules(mesh, rules):
        placed = shard(params, mesh, specs(params, mesh, rules))
    given = jax.device_put((tokens, mask), NamedSharding(mesh, P("data")))
    program = per_worker.lower(placed, *given).compile()
    with no_mesh():
        plain = jax.jit(jax.vmap(jax.value_and_grad(loss), (None, 0, 0)))(params, tokens, mask)
    return config, mesh, program, program(placed, *given), plain


def test_numbers_are_the_plain_ones(compiled):
    config, _, _, found, plain = compiled
    rtol = 1e-4 if config.dtype == "float32" else 0.05
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * np.abs(b).max()),
        *jax.device_get((found, plain)),
    )


def test_no_exchange_is_larger_than_a_layer(compiled):
    config, mesh, program, _, _ = compiled
    width = 4  # what is bf16 in the model is f32 on CPU's wires
    layer = width * config.num_layer_params // mesh.shape.get("model", 1)
    listed = [c for c in collectives(program, mesh) if c.axes]
    assert {axis for c in listed for axis in c.axes} == mesh.shape.keys() - {"data"}
    # On CPU the layer's gradients are summed together, and with them those of the last norm.
    assert max(c.whole_bytes for c in listed) <= layer + 8 * config.embed_dim
    # Of the head three pieces are gathered forward and backward; the embedding's rows travel.
    pieces = collections.Counter()
    for c in listed:
        if c.loops == (3,) and c.whole_bytes > layer // 2:
            pieces[c.kind] += c.count
    assert pieces == {"all-gather": 2 * 3, "reduce-scatter": 3}


@pytest.mark.slow
def test_on_the_stages_of_a_pipeline():
    """In branches that one stage alone takes: numbers of the plain loss."""
    mesh = make_mesh({"stage": 2, "fsdp": 2, "model": 2})
    rules = presets.fsdp_tensor(data=None).replace(vocab=None)
    config = dataclasses.replace(CONFIG, num_layers=2)
    with no_mesh():
        graphdef, state = decoder(config)
        pipe = pipeline(
            *pipeline_parts(nnx.merge(graphdef, state)), mesh, num_layers=2, micro_batches=2
        )
    params = nnx.to_pure_dict(state)
    placed = jax.tree.map(
        lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)),
        pipe.arrange(params),
        pipe.specs(nnx.to_pure_dict(specs(state, mesh, rules))),
    )
    tokens = jax.random.randint(jax.random.key(1), (4, 130), 0, VOCAB)
    batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}
    with use_rules(mesh, rules):
        program = jax.jit(jax.value_and_grad(lambda p: pipe(p, batch)[0])).lower(placed).compile()
    assert 3 in {n for c in collectives(program, mesh) if c.axes == ("fsdp",) for n in c.loops}
    loss, found = program(placed)
    with no_mesh():
        plain = jax.jit(jax.value_and_grad(lambda p: pipe.reference(p, batch)[0]))(params)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max()),
        *jax.device_get(((loss, pipe.restore(found)), plain)),
    )
