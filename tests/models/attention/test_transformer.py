"""The decoder with a divided sequence: one device's loss and gradients, and a training step's."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jdml.aggregate import mean_gradients
from jdml.models import Transformer, TransformerConfig, next_token_loss
from jdml.models.attention import zigzag
from jdml.sharding import bytes_per_axis, collectives, make_mesh, no_mesh, presets, shard, specs
from jdml.train import make_step
from tests.marks import slow

CONFIG = TransformerConfig(
    vocab_size=24, num_layers=2, embed_dim=16, num_heads=4, num_kv_heads=2, head_dim=6,
    mlp_dim=20, max_seq_len=64, flatten_tokens=False,
)  # fmt: skip
RULES = presets.tensor().replace(seq="seq")
NUM_WORKERS, SEQ = 2, 16


@functools.cache
def model_of(**changes):
    config = dataclasses.replace(CONFIG, **changes)
    return nnx.split(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))


@functools.cache
def params_of(positions):
    config = dataclasses.replace(CONFIG, positions=positions)
    state = jax.jit(lambda: nnx.state(Transformer(config, rngs=nnx.Rngs(0))))()
    return jax.device_get(nnx.to_pure_dict(state))


@pytest.fixture(scope="module")
def tokens():
    return np.asarray(jax.random.randint(jax.random.key(5), (4, SEQ + 1), 0, CONFIG.vocab_size))


def batch_of(tokens, size=1):
    inputs, targets = (zigzag(x, size) for x in (tokens[:, :-1], tokens[:, 1:]))
    # Not all count, and not every worker's as much: a mask in another order would show.
    mask = zigzag(np.arange(tokens[:, 1:].size).reshape(inputs.shape) % 3 > 0, size)
    return {"inputs": inputs, "targets": targets, "mask": mask.astype(np.float32)}


def loss_of(graphdef):
    def loss_fn(params, batch, key):
        model = nnx.merge(graphdef, params)
        return next_token_loss(model, batch["inputs"], batch["targets"], batch["mask"]), {}

    return loss_fn


@functools.cache
def one_device(positions):
    """Mean over the workers of loss and gradients, with full attention; after a step of SGD."""
    graphdef, _ = model_of(positions=positions)
    tokens = jax.random.randint(jax.random.key(5), (4, SEQ + 1), 0, CONFIG.vocab_size)
    batch = jax.tree.map(lambda x: x.reshape(NUM_WORKERS, -1, SEQ), batch_of(np.asarray(tokens)))
    params = params_of(positions)

    @jax.jit
    def step(params, batch):
        run = jax.value_and_grad(lambda p, b: loss_of(graphdef)(p, b, None)[0])
        losses, gradients = jax.vmap(run, (None, 0))(params, batch)
        return losses.mean(), jax.tree.map(lambda p, g: p - g.mean(axis=0), params, gradients)

    with no_mesh():
        return jax.device_get(step(params, batch))


# Both ways in which a step maps its loss over the workers; with and without an axis for heads.
@pytest.mark.parametrize(
    ("shape", "mapping", "changes"),
    [
        slow(
            {"data": 2, "seq": 2, "model": 2},
            "vmap",
            {"attention": "ring", "seq_order": "zigzag", "positions": "learned"},
        ),
        slow({"data": 2, "seq": 4}, "shard_map", {"attention": "ring", "seq_order": "zigzag"}),
        slow({"data": 2, "seq": 2, "model": 2}, "vmap", {"attention": "ulysses"}),
        slow({"data": 2, "seq": 4}, "vmap", {"attention": "gather", "seq_order": "zigzag"}),
    ],
)
def test_a_training_step_equals_one_device(tokens, shape, mapping, changes):
    mesh = make_mesh({"data": 1, "seq": 1, "model": 1} | shape)
    graphdef, _ = model_of(**changes)
    positions = changes.get("positions", "rotary")
    size = mesh.shape["seq"] if changes.get("seq_order") == "zigzag" else 1
    model = nnx.merge(graphdef, params_of(positions))
    params = nnx.to_pure_dict(nnx.state(shard(model, mesh, specs(model, mesh, RULES))))
    tx = optax.chain(mean_gradients("data"), optax.sgd(1.0))
    init, step = make_step(loss_of(graphdef), tx, mesh, rules=RULES, mapping=mapping)
    state = init(params)
    batch = jax.device_put(batch_of(tokens, size), NamedSharding(mesh, P("data", "seq")))
    compiled = step.lower(state, batch).compile()
    state, metrics = compiled(state, batch)
    loss, wanted = one_device(positions)
    assert float(metrics["loss"]) == pytest.approx(float(loss), rel=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), state.params, wanted
    )
    if changes["attention"] == "ring":
        # Two rings of keys and one of gradients for each layer: the saved output of the first
        # pass spares a third. Nothing else permutes, and no layer's positions are gathered.
        found = [c for c in collectives(compiled, mesh) if c.axes == ("seq",)]
        size = mesh.shape["seq"]
        rings = [c for c in found if c.kind == "collective-permute"]
        assert sum(c.count for c in rings) == CONFIG.num_layers * 3 * (size - 1)
        moved = [c for c in found if c.kind in ("all-gather", "all-to-all")]
        assert not [c for c in moved if c.loops]  # tokens, mask, and the embedding's gradient
        pair = 2 * 2 * (2 // mesh.shape["model"]) * SEQ // size * 6 * 4
        stated = CONFIG.num_layers * 3 * (size - 1) * pair
        assert bytes_per_axis(rings) == {("seq",): stated}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"attention": "sparse"}, "attention must be one of"),
        ({"seq_order": "spiral"}, "seq_order must be one of"),
        ({"seq_order": "zigzag"}, "needs attention='ring'"),
        ({"attention": "ring", "flatten_tokens": True}, "set flatten_tokens=False"),
        ({"attention_block": 0}, "attention_block"),
    ],
)
def test_configurations_that_cannot_be(wrong, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **wrong)


def test_decoding_takes_the_order_of_the_text(tokens):
    """A cache is not in zig-zag order, and on one device neither is the sequence."""
    with no_mesh():
        model = nnx.merge(model_of(attention="ring", seq_order="zigzag")[0], params_of("rotary"))
        full = nnx.merge(model_of()[0], params_of("rotary"))

        @jax.jit
        def run(tokens):
            last, _ = model.decode(tokens, model.init_cache(*tokens.shape))
            return last, model(tokens)[:, -1], full(tokens)[:, -1]

        decoded, ring, wanted = run(jnp.asarray(tokens))
    np.testing.assert_allclose(ring, wanted, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(decoded, wanted, rtol=1e-4, atol=1e-5)
