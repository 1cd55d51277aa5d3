"""Tensor and sequence parallelism by rules alone: every collective of a layer, counted.

``test_tpu_compile.py`` counts the same for TPU, where XLA adds up the gradients of one activation
before it sums them over the axis, and writes the sum of which a device keeps its part as the
reduce-scatter that it is.
"""

import dataclasses
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jdml.models import Transformer, TransformerConfig, next_token_loss
from jdml.sharding import (
    collectives,
    make_mesh,
    no_mesh,
    presets,
    shard,
    shardings,
    specs,
    use_rules,
)

LAYERS, BATCH, SEQ, EMBED, VOCAB = 3, 4, 24, 16, 96
LLAMA = TransformerConfig(
    vocab_size=VOCAB, num_layers=LAYERS, embed_dim=EMBED, num_heads=8, num_kv_heads=4, head_dim=6,
    mlp_dim=40, max_seq_len=SEQ, flatten_tokens=False,
)  # fmt: skip
GPT2 = dataclasses.replace(
    LLAMA, num_kv_heads=8, norm="layer", positions="learned", mlp="gelu", bias=True,
    tie_embeddings=True,
)  # fmt: skip
FORMS = {"llama": LLAMA, "gpt2": GPT2}
RULES = {
    "tensor": presets.tensor(),
    "sequence": presets.sequence_parallel(presets.tensor()),
}
# In bytes on one of data=2 × model=4 devices: an activation, the part of it that a device has
# between the layers of "sequence", a number for each position, the logits of a device's words, the
# scale of a norm.
WHOLE = BATCH // 2 * SEQ * EMBED * 4
PART = WHOLE // 4
EACH = BATCH // 2 * SEQ * 4
LOGITS = BATCH // 2 * SEQ * VOCAB // 4 * 4
SCALE = EMBED * 4


@pytest.fixture(scope="module")
def mesh():
    return make_mesh({"data": 2, "model": 4})


@pytest.fixture(scope="module")
def compiled(mesh):
    """``compiled(form, rules, gradient)``: graph definition, abstract parameters, program."""
    kept = {}

    def get(form, rules, gradient):
        key = form, rules, gradient
        if key not in kept:
            abstract = nnx.eval_shape(lambda: Transformer(FORMS[form], rngs=nnx.Rngs(0)))
            graphdef, params = nnx.split(abstract)
            placed = shardings(specs(params, mesh, RULES[rules]), mesh)
            params = jax.tree.map(
                lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), params, placed
            )
            by_data = NamedSharding(mesh, P("data"))
            tokens = jax.ShapeDtypeStruct((BATCH, SEQ), jnp.int32, sharding=by_data)
            run = loss_of(graphdef)
            run = jax.value_and_grad(run) if gradient else run
            with use_rules(mesh, RULES[rules]):
                kept[key] = graphdef, jax.jit(run).lower(params, tokens).compile()
        return kept[key]

    return get


def loss_of(graphdef):
    def loss(params, tokens):
        return next_token_loss(nnx.merge(graphdef, params), tokens, jnp.roll(tokens, -1, axis=1))

    return loss


def over_model(program, mesh, *, inside):
    """(kind, bytes) of each operand of a collective over ``model``, inside the layers or not."""
    return Counter(
        (c.kind, size)
        for c in collectives(program, mesh)
        if "model" in c.axes and (c.loops == (LAYERS,)) == inside
        for size in c.operand_bytes
    )


# A gradient flows into an activation from each product that reads it: queries, keys, values, and
# one or two hidden layers.
READERS = {"llama": 5, "gpt2": 4}


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_tensor_sums_twice_a_layer(compiled, mesh, form):
    if form == "llama":  # the other's forward pass is in its gradient too
        _, forward = compiled(form, "tensor", False)
        assert over_model(forward, mesh, inside=True) == {("all-reduce", WHOLE): 2}
    _, gradient = compiled(form, "tensor", True)
    assert over_model(gradient, mesh, inside=True) == {("all-reduce", WHOLE): 2 + READERS[form]}


@pytest.mark.parametrize("form", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_sequence_gathers_and_scatters_twice_a_layer(compiled, mesh, form):
    """On CPU the scatter is a sum of which each device keeps its part."""
    if form == "llama":
        _, forward = compiled(form, "sequence", False)
        assert over_model(forward, mesh, inside=True) == {
            ("all-gather", PART): 2,
            ("all-reduce", WHOLE): 2,
        }
    _, gradient = compiled(form, "sequence", True)
    assert over_model(gradient, mesh, inside=True) == {
        # Forward; what the norms gave, once more for gradients; gradients of what was scattered.
        ("all-gather", PART): 2 + 2 + 2,
        ("all-reduce", WHOLE): 2 + READERS[form],
        # Gradients of the norms' scales and biases, to which each position adds.
        ("all-reduce", SCALE): 2 if form == "llama" else 4,
    }


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("form", FORMS)
def test_neither_table_nor_logits_travel(compiled, mesh, form, rules):
    """Outside the layers: the embedded tokens and the gradient of the last activation, and two
    numbers and a maximum for each position in the loss."""
    if form == "llama":
        _, forward = compiled(form, rules, False)
        once = {("all-reduce", WHOLE): 1, ("all-reduce", EACH): 3}
        gathered = {("all-gather", PART): 1} if rules == "sequence" else {}
        assert over_model(forward, mesh, inside=False) == once | gathered
    _, gradient = compiled(form, rules, True)
    found = over_model(gradient, mesh, inside=False)
    assert found[("all-reduce", WHOLE)] == 2
    assert found[("all-reduce", EACH)] == 3
    assert max(size for _, size in found) == WHOLE < LOGITS
    if rules == "tensor":
        assert set(found) == {("all-reduce", WHOLE), ("all-reduce", EACH)}
    for c in collectives(gradient, mesh):
        if c.axes == ("data",):  # gradients, in shards
            assert c.kind == "all-reduce"


@pytest.mark.parametrize(("form", "rules"), [("llama", "sequence"), ("gpt2", "tensor")])
def test_gradients_equal_those_of_one_device(compiled, mesh, form, rules):
    graphdef, program = compiled(form, rules, True)
    model = jax.jit(lambda: nnx.state(Transformer(FORMS[form], rngs=nnx.Rngs(0))))()
    tokens = jax.random.randint(jax.random.key(5), (BATCH, SEQ), 0, VOCAB)
    placed = shard(model, mesh, specs(model, mesh, RULES[rules]))
    loss, grads = program(placed, jax.device_put(tokens, NamedSharding(mesh, P("data"))))
    with no_mesh():
        wanted, wanted_grads = jax.jit(jax.value_and_grad(loss_of(graphdef)))(model, tokens)
    assert float(loss) == pytest.approx(float(wanted), rel=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), grads, wanted_grads
    )


@pytest.mark.parametrize(
    ("change", "leaf", "mend"),
    [
        ({"num_heads": 6, "num_kv_heads": 2}, "key/kernel", "make it 4; divide it over 2;"),
        ({"num_heads": 6, "num_kv_heads": 6}, "key/kernel", "make it 4 or 8; divide it over 3;"),
        ({"vocab_size": 97}, "embed/embedding", "make it 96 or 100; or leave"),
    ],
)
def test_an_axis_that_does_not_divide_is_named(mesh, change, leaf, mend):
    config = dataclasses.replace(LLAMA, **change)
    model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=rf"{leaf}: .* axis 'model' \(size 4\).*{mend}"):
        specs(model, mesh, RULES["tensor"])
