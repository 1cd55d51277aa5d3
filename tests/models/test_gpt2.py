"""GPT-2's form against a dense one in NumPy, a loop over layers, heads and positions."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jdml.models import Transformer, next_token_loss

pytestmark = pytest.mark.usefixtures("one_device")

FORM = {"norm": "layer", "positions": "learned", "mlp": "gelu", "bias": True}
GPT2 = FORM | {"num_kv_heads": 4, "tie_embeddings": True}


@pytest.fixture
def model(make):
    """Biases and scales drawn at random too, so that each of them counts."""
    model = make(**GPT2)
    graphdef, params = nnx.split(model)
    draws = np.random.default_rng(3)
    moved = jax.tree.map(lambda x: x + jnp.float32(0.1 * draws.normal(size=x.shape)), params)
    return nnx.merge(graphdef, moved)


def dense(params, tokens):
    """Logits [seq, vocab] of one sequence in float64, as the paper and its code describe them."""

    def norm(x, p):
        centred = x - x.mean(-1, keepdims=True)
        return centred / np.sqrt(x.var(-1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]

    def gelu(x):
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    table, layers = params["embed"]["embedding"], params["layers"]
    x = table[tokens] + params["positions"]["table"][: len(tokens)]
    for n in range(len(layers["mlp"]["up"]["kernel"])):
        layer = jax.tree.map(lambda p: p[n], layers)  # noqa: B023
        attention, h = layer["attention"], norm(x, layer["attention_norm"])
        out = np.zeros_like(x) + attention["out"]["bias"]
        for head in range(attention["query"]["kernel"].shape[1]):
            q, k, v = (
                h @ attention[name]["kernel"][:, head] + attention[name]["bias"][head]
                for name in ("query", "key", "value")
            )
            for t in range(len(tokens)):
                scores = np.array([q[t] @ k[s] for s in range(t + 1)]) / math.sqrt(q.shape[1])
                weights = np.exp(scores - scores.max())
                mixed = weights / weights.sum() @ v[: t + 1]
                out[t] += mixed @ attention["out"]["kernel"][head]
        x = x + out
        mlp, h = layer["mlp"], norm(x, layer["mlp_norm"])
        hidden = gelu(h @ mlp["up"]["kernel"] + mlp["up"]["bias"])
        x = x + hidden @ mlp["down"]["kernel"] + mlp["down"]["bias"]
    return norm(x, params["norm"]) @ table.T


def test_equals_its_dense_form(model, forward, tokens):
    params = nnx.to_pure_dict(nnx.state(model))
    got = forward(model, tokens)
    for row, ids in zip(got, np.asarray(tokens), strict=True):
        np.testing.assert_allclose(row, dense(params, ids), rtol=1e-4, atol=1e-4)


def test_reads_on_from_a_cache_as_in_one_go(model, forward, tokens):
    """Positions go on counting; past the table's end there is no vector."""
    graphdef, params = nnx.split(model)

    @jax.jit
    def in_two(params, tokens):
        model = nnx.merge(graphdef, params)
        _, cache = model.decode(tokens[:, :7], model.init_cache(len(tokens), 12))
        return nnx.merge(graphdef, params).decode(tokens[:, 7:], cache)[0]

    np.testing.assert_allclose(
        in_two(params, tokens), forward(model, tokens)[:, -1], rtol=1e-4, atol=1e-5
    )
    past = model.positions(jnp.int32(model.config.max_seq_len - 1), 2, jnp.float32)
    assert jnp.isfinite(past[0]).all()
    assert jnp.isnan(past[1]).all()


def test_every_parameter_has_names_and_a_gradient(model, tokens):
    graphdef, params = nnx.split(model)
    flat = dict(nnx.to_flat_state(params))
    names = {"/".join(path): v.get_metadata()["out_sharding"] for path, v in flat.items()}
    assert names["layers/attention/query/bias"] == ("layers", "heads", "head_dim")
    assert names["layers/attention/out/bias"] == ("layers", "embed")
    assert names["layers/mlp/up/bias"] == ("layers", "mlp")
    assert names["layers/mlp_norm/bias"] == ("layers", "embed")
    assert names["positions/table"] == (None, "embed")
    assert all(len(names["/".join(path)]) == v.ndim for path, v in flat.items())
    grads = jax.jit(
        jax.grad(lambda p: next_token_loss(nnx.merge(graphdef, p), tokens[:, :-1], tokens[:, 1:]))
    )(nnx.to_pure_dict(params))
    used = grads["positions"].pop("table")
    assert all(bool(jnp.any(used[t] != 0)) for t in range(11))
    # All keys moved alike move every score alike: the softmax does not see it.
    key_bias = grads["layers"]["attention"]["key"].pop("bias")
    assert float(jnp.abs(key_bias).max()) < 1e-6
    assert all(bool(jnp.any(g != 0)) for g in jax.tree.leaves(grads))


def test_without_biases_there_are_none(make):
    config = dataclasses.replace(make().config, **GPT2 | {"bias": False})
    model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    paths = ["/".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model))]
    assert not [p for p in paths if "bias" in p]
