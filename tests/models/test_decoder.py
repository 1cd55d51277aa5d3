"""The decoder on one device: its parameters, its equivalent forms, and causality."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jdml.models import Transformer, next_token_loss
from jdml.models.transformer.layers import dropout

pytestmark = pytest.mark.usefixtures("one_device")


def value_and_grads(model, tokens):
    graphdef, params = nnx.split(model)

    @jax.jit
    def run(params):
        return jax.value_and_grad(
            lambda p: next_token_loss(nnx.merge(graphdef, p), tokens[:, :-1], tokens[:, 1:])
        )(params)

    return run(nnx.to_pure_dict(params))


def assert_close(got, wanted, rtol):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            a, b, rtol=rtol, atol=rtol * float(jnp.abs(b).max())
        ),
        got,
        wanted,
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"remat": "none"},
        {"remat": "full"},
        pytest.param({"unroll": True, "remat": "none"}, marks=pytest.mark.slow),
        {"flatten_tokens": False},
    ],
    ids=str,
)
def test_options_of_speed_change_neither_loss_nor_gradients(make, tokens, changes):
    assert_close(value_and_grads(make(**changes), tokens), value_and_grads(make(), tokens), 1e-5)


def test_remat_computes_again_what_it_says(make, tokens):
    """Matrix products in the whole program: "full" repeats a block's, "dots" only attention's."""

    def num_products(remat):
        model = make(remat=remat, unroll=True)
        graphdef, params = nnx.split(model)
        program = jax.make_jaxpr(
            jax.grad(
                lambda p: next_token_loss(nnx.merge(graphdef, p), tokens[:, :-1], tokens[:, 1:])
            )
        )(params)
        return str(program).count("dot_general")

    none, dots, full = (num_products(r) for r in ("none", "dots", "full"))
    assert none < dots < full


@pytest.mark.parametrize("tie", [True, False])
def test_every_parameter_is_float32_and_named(make, tie):
    flat = dict(nnx.to_flat_state(nnx.state(make(tie_embeddings=tie))))
    names = {"/".join(path): v.get_metadata()["out_sharding"] for path, v in flat.items()}
    assert all(v.dtype == jnp.float32 for v in flat.values())
    assert all(len(names["/".join(path)]) == v.ndim for path, v in flat.items())
    assert names["layers/attention/query/kernel"] == ("layers", "embed", "heads", "head_dim")
    assert names["layers/attention/value/kernel"] == ("layers", "embed", "kv_heads", "head_dim")
    assert names["layers/attention/out/kernel"] == ("layers", "heads", "head_dim", "embed")
    assert names["layers/mlp/gate/kernel"] == ("layers", "embed", "mlp")
    assert names["layers/mlp/down/kernel"] == ("layers", "mlp", "embed")
    assert names["layers/mlp_norm/scale"] == ("layers", "embed")
    assert names["embed/embedding"] == ("vocab", "embed")
    assert ("head/kernel" in names) is not tie


def test_initial_deviations(make):
    config = dataclasses.replace(make().config, num_layers=8, embed_dim=64, mlp_dim=96)
    model = Transformer(config, rngs=nnx.Rngs(0))
    attention, mlp = model.layers.attention, model.layers.mlp
    for kernel, wanted in (
        (attention.query.kernel, 64**-0.5),
        (attention.out.kernel, (4 * 6) ** -0.5 / 4),
        (mlp.up.kernel, 64**-0.5),
        (mlp.down.kernel, 96**-0.5 / 4),
        (model.embed.embedding, 0.3),
    ):
        assert float(kernel[...].std()) == pytest.approx(wanted, rel=0.05)
    tied = make(tie_embeddings=True).embed.embedding[...]
    assert float(tied.std()) == pytest.approx(16**-0.5, rel=0.1)
    # Layers must not start alike.
    assert not np.allclose(mlp.up.kernel[0], mlp.up.kernel[1])


def test_a_token_changes_nothing_before_it(make, forward, tokens):
    model = make()
    before, after = forward(model, tokens), forward(model, tokens.at[:, 7].add(1) % 24)
    np.testing.assert_array_equal(before[:, :7], after[:, :7])
    assert not np.allclose(before[:, 7:], after[:, 7:])


def test_bfloat16_computes_in_bfloat16_and_trains_float32(make, tokens):
    model = make(dtype="bfloat16")
    assert jax.eval_shape(model.hidden, tokens).dtype == jnp.bfloat16
    assert jax.eval_shape(model, tokens).dtype == jnp.float32
    loss, grads = value_and_grads(model, tokens)
    wanted, _ = value_and_grads(make(), tokens)
    assert loss.dtype == jnp.float32
    assert {g.dtype for g in jax.tree.leaves(grads)} == {jnp.dtype("float32")}
    assert float(loss) == pytest.approx(float(wanted), rel=0.02)


def test_dropout_follows_its_key_and_is_off_without_one(make, forward, tokens):
    model, plain = make(dropout=0.3), forward(make(), tokens)
    np.testing.assert_array_equal(forward(model, tokens), plain)
    first, again, other = (forward(model, tokens, key=jax.random.key(s)) for s in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other)
    assert not np.allclose(first, plain)


def test_dropout_keeps_the_mean_and_the_rate():
    x = jnp.full((400, 400), 2.0)
    dropped = dropout(x, 0.25, jax.random.key(0))
    assert float((dropped == 0).mean()) == pytest.approx(0.25, abs=0.01)
    assert float(dropped.mean()) == pytest.approx(2.0, rel=0.01)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (jnp.zeros((2, 65), jnp.int32), "max_seq_len"),
        (jnp.zeros((2, 0), jnp.int32), "positions"),
        (jnp.zeros((5,), jnp.int32), r"\[batch, seq\]"),
        (jnp.zeros((2, 3)), "integers"),
    ],
)
def test_refuses_what_are_not_tokens(make, bad, message):
    with pytest.raises(ValueError, match=message):
        make()(bad)


def test_an_id_outside_the_vocabulary_shows_as_nan(make, forward, tokens):
    assert bool(jnp.isnan(forward(make(), tokens.at[1, 3].set(24))[1]).any())
