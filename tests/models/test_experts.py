"""The decoder with experts in its blocks: counts, losses, training on meshes, text."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jdml.aggregate import mean_gradients
from jdml.models import Transformer, TransformerConfig, generate, next_token_loss, training_loss
from jdml.models.transformer.presets import mixtral
from jdml.sharding import (
    collectives,
    make_mesh,
    no_mesh,
    presets,
    shard,
    specs,
    use_rules,
)
from jdml.train import make_step

TINY = TransformerConfig(
    vocab_size=24, num_layers=2, embed_dim=16, num_heads=4, num_kv_heads=2, head_dim=6, mlp_dim=20,
    max_seq_len=64,
)  # fmt: skip

RULES = presets.expert_parallel(presets.tensor())
DROPLESS = {"num_experts": 4, "shared_experts": 1}
CAPACITY = {"num_experts": 4, "capacity_factor": 1.0, "router": "softmax_then_top_k"}


def model_of(changes):
    config = dataclasses.replace(TINY, **changes)
    return Transformer(config, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def tokens():
    return jax.random.randint(jax.random.key(5), (8, 13), 0, TINY.vocab_size)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_experts": 0}, "num_experts must be an integer from 1"),
        ({"num_experts": 2.0}, "num_experts"),
        ({"num_experts": 2, "experts_per_token": 3}, "take at most 2"),
        ({"num_experts": 2, "experts_per_token": 0}, "experts_per_token"),
        ({"num_experts": 2, "capacity_factor": 0.0}, "capacity_factor must be positive"),
        ({"num_experts": 2, "capacity_factor": -1.0}, "capacity_factor"),
        ({"num_experts": 2, "capacity_factor": math.inf}, "capacity_factor"),
        ({"num_experts": 2, "shared_experts": -1}, "shared_experts"),
        ({"num_experts": 2, "z_weight": -0.1}, "z_weight"),
        ({"num_experts": 2, "balance_weight": math.nan}, "balance_weight"),
        ({"num_experts": 2, "router": "argmax"}, "router must be one of"),
        ({"num_experts": 2, "bias": True}, "no biases"),
        ({"shared_experts": 1}, "need num_experts"),
        ({"capacity_factor": 1.25}, "need num_experts"),
    ],
)
def test_config_refuses(wrong, message):
    with pytest.raises(ValueError, match=message):
        TransformerConfig(**wrong)


@pytest.mark.parametrize("changes", [DROPLESS, CAPACITY | {"mlp": "gelu"}], ids=str)
def test_parameters_are_counted_and_named(changes):
    with no_mesh():
        model = nnx.eval_shape(lambda: model_of(changes))
    flat = {"/".join(map(str, k)): v for k, v in nnx.to_flat_state(nnx.state(model))}
    assert model.config.num_params == sum(math.prod(v.shape) for v in flat.values())
    names = {k: v.get_metadata()["out_sharding"] for k, v in flat.items()}
    assert names["layers/mlp/router"] == ("layers", "embed", None)
    assert names["layers/mlp/up"] == ("layers", "experts", "embed", "mlp")
    assert names["layers/mlp/down"] == ("layers", "experts", "mlp", "embed")
    assert ("layers/mlp/gate" in names) is ("mlp" not in changes)


def test_mixtrals_active_parameters():
    """46.7 and 12.9 billion, as published; the count of all is held to the model elsewhere."""
    assert mixtral().num_active_params == 12_879_925_248
    # Without experts every parameter is active.
    assert TransformerConfig().num_active_params == TransformerConfig().num_params


def gradients_of(graphdef):
    def loss(params, tokens):
        return training_loss(nnx.merge(graphdef, params), tokens[:, :-1], tokens[:, 1:])

    return jax.value_and_grad(loss, has_aux=True)


def assert_close(got, wanted, rtol=1e-4):
    def close(a, b):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * float(jnp.abs(b).max()))

    jax.tree.map(close, got, wanted)


@pytest.fixture(scope="module")
def models():
    with no_mesh():
        make = jax.jit(lambda: [nnx.state(model_of(c)) for c in (DROPLESS, CAPACITY)])
        states = make()
    found = {}
    for name, changes, state in zip(("dropless", "capacity"), (DROPLESS, CAPACITY), states):  # noqa: B905
        with no_mesh():
            graphdef = nnx.graphdef(nnx.eval_shape(lambda c=changes: model_of(c)))
        found[name] = graphdef, nnx.to_pure_dict(state)
    return found


@pytest.fixture(scope="module")
def on_one_device(models, tokens):
    """``gradients_of`` of each worker's samples, one device doing one after the other."""
    with no_mesh():
        return {
            name: jax.jit(lambda p, t, g=graphdef: jax.lax.map(lambda t: gradients_of(g)(p, t), t))(
                params, tokens.reshape(2, 4, -1)
            )
            for name, (graphdef, params) in models.items()
        }


def test_the_loss_is_the_sum_of_its_parts(models, on_one_device, tokens):
    for name, (graphdef, params) in models.items():
        (loss, metrics), _ = on_one_device[name]
        model = nnx.merge(graphdef, params)
        c = model.config
        wanted = (
            metrics["next_token_loss"]
            + c.balance_weight * metrics["experts.load_balance"]
            + c.z_weight * metrics["experts.router_z"]
        )
        np.testing.assert_allclose(loss, wanted, rtol=1e-6)
        dropped = np.asarray(metrics["experts.dropped"])
        assert (dropped > 0.02).all() if name == "capacity" else (dropped == 0).all()
        assert (np.asarray(metrics["experts.load_balance"]) > 0.9).all()
    with no_mesh():
        plain = jax.jit(lambda t: next_token_loss(model, t[:, :-1], t[:, 1:]))(tokens[:4])
    np.testing.assert_allclose(plain, metrics["next_token_loss"][0], rtol=1e-6)


@pytest.mark.parametrize(
    ("axes", "name"),
    [
        pytest.param({"data": 2, "expert": 4}, "dropless", marks=pytest.mark.slow),
        pytest.param({"data": 2, "expert": 2, "model": 2}, "capacity", marks=pytest.mark.slow),
        pytest.param({"data": 2, "expert": 4}, "capacity", marks=pytest.mark.slow),
        pytest.param({"data": 2, "expert": 2, "model": 2}, "dropless", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_step_on_a_mesh(models, on_one_device, tokens, axes, name):
    """``make_step`` in both its mappings, which on CPU go by the number of axes."""
    mesh = make_mesh({"model": 1} | axes)
    graphdef, params = models[name]
    rate = 0.5

    def loss_fn(params, batch, key):
        model = nnx.merge(graphdef, params)
        return training_loss(model, batch[:, :-1], batch[:, 1:], key=key)

    model = nnx.merge(graphdef, params)
    layout = nnx.to_pure_dict(specs(nnx.state(model), mesh, RULES))
    init, step = make_step(
        loss_fn,
        optax.chain(mean_gradients("data"), optax.sgd(rate)),
        mesh,
        specs=layout,
        rules=RULES,
        batch_axes=("expert",),
    )
    state = init(shard(params, mesh, layout))
    compiled = step.lower(state, tokens).compile()
    state, metrics = compiled(state, tokens)
    (losses, wanted), gradients = on_one_device[name]
    assert_close(metrics, {k: v.mean(0) for k, v in (wanted | {"loss": losses}).items()}, 1e-5)
    assert_close(
        jax.tree.map(lambda new, old: (old - new) / rate, state.params, params),
        jax.tree.map(lambda g: g.mean(0), gradients),
        1e-3,  # the step is a difference of parameters
    )
    # In a layer four exchanges of rows, none of them computed again, and nothing is gathered. (The
    # gradient of this small table of words is put together from gathered rows.)
    found = collectives(compiled, mesh)
    rows = [c for c in found if c.kind == "all-to-all" and c.dtype == "f32" and not c.conditional]
    assert sum(c.count for c in rows) == 4 * TINY.num_layers
    assert not [c for c in found if c.kind == "all-gather" and c.loops]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dropless", "capacity"])
def test_generates_the_same_text_on_a_mesh(models, tokens, name):
    mesh = make_mesh({"data": 2, "expert": 4})
    graphdef, params = models[name]
    model, prompt = nnx.merge(graphdef, params), tokens[:, :5]
    with no_mesh():
        wanted = generate(model, prompt, 4, temperature=0)
    with use_rules(mesh, presets.expert_parallel(presets.data_parallel())):
        text = generate(model, prompt, 4, temperature=0)
    np.testing.assert_array_equal(text, wanted)


def test_a_token_changes_nothing_before_it(models, tokens):
    """Dropless; with a capacity an earlier second choice yields to a later first one."""
    graphdef, params = models["dropless"]
    other = tokens.at[:, 7].add(1) % TINY.vocab_size
    with no_mesh():
        run = jax.jit(lambda t: nnx.merge(graphdef, params)(t))
        before, after = run(tokens), run(other)
    np.testing.assert_allclose(before[:, :7], after[:, :7], rtol=1e-5, atol=1e-6)
    assert not np.allclose(before[:, 7:], after[:, 7:])
