"""The decoder on a mesh: same numbers, and no array gathered that need not be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jdml.models import generate, next_token_loss
from jdml.sharding import make_mesh, no_mesh, presets, shard, specs, use_rules
from jdml.sharding.compiled import collectives

RULES = presets.tensor()


def place(model, mesh, rules):
    graphdef, params = nnx.split(shard(model, mesh, specs(model, mesh, rules)))
    return graphdef, nnx.to_pure_dict(params)


def loss_of(graphdef, **options):
    def loss(params, tokens):
        model = nnx.merge(graphdef, params)
        return next_token_loss(model, tokens[:, :-1], tokens[:, 1:], **options)

    return loss


@pytest.mark.parametrize("chunk_size", [pytest.param(None, marks=pytest.mark.slow), 3])
def test_gradients_per_worker_equal_those_of_one_device(make, tokens, chunk_size):
    """As a training step takes them: mapped over the workers, divided over ``model``."""
    mesh = make_mesh({"data": 4, "model": 2})
    graphdef, params = place(make(), mesh, RULES)
    batch = jnp.concatenate([tokens, tokens[::-1] // 2]).reshape(4, 2, 12)
    loss = loss_of(graphdef, chunk_size=chunk_size)

    @jax.jit
    def per_worker(params, batch):
        with use_rules(mesh, RULES, hide=("data",)):
            mapped = jax.vmap(jax.value_and_grad(loss), (None, 0), spmd_axis_name="data")
            return mapped(params, batch)

    placed = jax.device_put(batch, NamedSharding(mesh, P("data")))
    compiled = per_worker.lower(params, placed).compile()
    losses, grads = compiled(params, placed)
    local = jax.device_get(params)
    with no_mesh():
        single = jax.jit(jax.value_and_grad(loss))
        for worker in range(4):
            wanted, wanted_grads = single(local, batch[worker])
            assert float(losses[worker]) == pytest.approx(float(wanted), rel=1e-5)
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a[worker], b, rtol=1e-3, atol=1e-5),  # noqa: B023
                grads,
                wanted_grads,
            )
    # Workers have not spoken, and heads, hidden units and words stay where they are.
    assert {(c.kind, *c.axes) for c in collectives(compiled, mesh)} == {("all-reduce", "model")}


@pytest.mark.slow
def test_fewer_key_heads_than_devices(make, tokens):
    """Keys and values whole, queries divided: the repeated copies must follow the queries."""
    mesh = make_mesh({"data": 2, "model": 4})
    rules = RULES.replace(kv_heads=None)
    graphdef, params = place(make(), mesh, rules)
    step = jax.jit(jax.value_and_grad(loss_of(graphdef)))
    placed = jax.device_put(tokens, NamedSharding(mesh, P("data")))
    with use_rules(mesh, rules):
        compiled = step.lower(params, placed).compile()
    loss, _ = compiled(params, placed)
    with no_mesh():
        wanted, _ = step(jax.device_get(params), tokens)
    assert float(loss) == pytest.approx(float(wanted), rel=1e-5)
    # Gradients of the whole keys and values are put together from the devices' heads; nothing
    # larger is.
    found = [c for c in collectives(compiled, mesh) if c.kind != "all-reduce"]
    kv_shard = 2 * 1 * 11 * 6 * 4  # (4 / 2) samples × (2 / 2) heads × positions × head_dim × f32
    assert {c.kind for c in found} <= {"all-gather"}
    assert all(size <= kv_shard for c in found for size in c.operand_bytes)


@pytest.mark.slow
@pytest.mark.parametrize("chunk_size", [None, 4])
def test_a_divided_sequence(make, tokens, chunk_size):
    """Positions over an axis between the blocks and in the loss, with and without chunks."""
    mesh = make_mesh({"data": 2, "seq": 2, "model": 2})
    rules = RULES.replace(seq="seq")
    graphdef, params = place(make(flatten_tokens=False), mesh, rules)
    tokens = jnp.concatenate([tokens, tokens[:, :1]], axis=1)
    step = jax.jit(jax.value_and_grad(loss_of(graphdef, chunk_size=chunk_size)))
    with use_rules(mesh, rules):
        loss, grads = step(params, tokens)
    with no_mesh():
        wanted, wanted_grads = step(jax.device_get(params), tokens)
    assert float(loss) == pytest.approx(float(wanted), rel=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), grads, wanted_grads
    )


def test_generates_the_same_text_on_a_mesh(make, tokens):
    mesh = make_mesh({"data": 4, "model": 2})
    graphdef, params = place(make(), mesh, RULES)
    with use_rules(mesh, RULES):
        text = generate(nnx.merge(graphdef, params), tokens, 4, temperature=0)
    with no_mesh():
        wanted = generate(make(), tokens, 4, temperature=0)
    np.testing.assert_array_equal(text, wanted)
