"""The loss in pieces equals the loss at once, in value, gradient and not in memory."""

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest
from flax import nnx

from jdml.models import next_token_loss, token_losses

pytestmark = pytest.mark.usefixtures("one_device")


def plain_loss(model, inputs, targets, mask):
    """By definition: minus the mean log-probability."""
    log_p = jax.nn.log_softmax(model(inputs).astype(jnp.float32))
    chosen = jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]
    return -jnp.sum(chosen * mask) / jnp.sum(mask)


@pytest.mark.parametrize(
    ("chunk_size", "masked", "tie"),
    [
        (None, False, False),
        (None, True, False),
        (4, True, False),
        (5, False, False),
        (5, True, True),
    ],
)
def test_chunks_change_neither_loss_nor_gradients(make, tokens, chunk_size, masked, tie):
    graphdef, params = nnx.split(make(tie_embeddings=tie, num_layers=1))
    inputs, targets = tokens, jnp.roll(tokens, -1, axis=1)
    mask = (jnp.arange(12) < jnp.array([[12], [7], [3], [9]])).astype(jnp.float32)

    def chunked(params):
        model = nnx.merge(graphdef, params)
        given = mask if masked else None
        return next_token_loss(model, inputs, targets, given, chunk_size=chunk_size)

    def plain(params):
        used = mask if masked else jnp.ones_like(mask)
        return plain_loss(nnx.merge(graphdef, params), inputs, targets, used)

    got, wanted = (jax.jit(jax.value_and_grad(f))(params) for f in (chunked, plain))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), got, wanted)


class TableModel:
    """The least that the loss asks of a model, so that nothing else takes memory."""

    def __init__(self, table, kernel):
        self.table, self.kernel = table, kernel

    def hidden(self, tokens, *, key=None):
        return self.table[tokens]

    def head_kernel(self):
        return self.kernel

    def logits(self, hidden, kernel):
        return hidden @ kernel


def test_a_large_vocabulary_needs_far_less_memory_than_its_logits():
    batch, seq, vocab = 2, 2048, 32_768
    tokens = jax.ShapeDtypeStruct((batch, seq), jnp.int32)
    params = (
        jax.ShapeDtypeStruct((vocab, 8), "float32"),
        jax.ShapeDtypeStruct((8, vocab), "float32"),
    )

    def temporaries(chunk_size):
        def loss(params, tokens):
            return next_token_loss(TableModel(*params), tokens, tokens, chunk_size=chunk_size)

        compiled = jax.jit(jax.value_and_grad(loss)).lower(params, tokens).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    logits = batch * seq * vocab * 4
    assert temporaries(None) < 0.25 * logits  # 128 positions of 2,048 at a time, by default
    assert temporaries(16) < 0.05 * logits
    assert temporaries(seq) > logits  # else this test would measure nothing


def test_a_uniform_model_costs_the_log_of_the_vocabulary(make, tokens):
    model = make(num_layers=1)
    model.norm.scale[...] = jnp.zeros_like(model.norm.scale[...])
    assert float(next_token_loss(model, tokens, tokens)) == pytest.approx(np.log(24), rel=1e-6)


def test_targets_outside_the_vocabulary(make, tokens):
    """NaN, unless masked: then neither the loss nor a gradient knows of them."""
    targets = tokens.at[2, 3].set(-1)
    mask = targets >= 0
    graphdef, params = nnx.split(make(num_layers=1))

    @jax.jit
    def run(params):
        def loss(params, mask):
            return next_token_loss(nnx.merge(graphdef, params), tokens, targets, mask)

        return loss(params, None), *jax.value_and_grad(loss)(params, mask)

    without, loss, grads = run(params)
    assert bool(jnp.isnan(without))
    assert bool(jnp.isfinite(loss))
    assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(grads))


def test_token_losses_in_forward_and_reverse_mode():
    logits = jax.random.normal(jax.random.key(0), (3, 7)) * 3
    targets = jnp.array([0, 6, 2])
    jax.test_util.check_grads(
        lambda x: token_losses(x, targets), (logits,), order=1, atol=0.02, rtol=0.02
    )


def test_a_mask_that_keeps_nothing_gives_zero(make, tokens):
    assert float(next_token_loss(make(num_layers=1), tokens, tokens, jnp.zeros_like(tokens))) == 0.0


def test_refuses_shapes_that_differ(make, tokens):
    with pytest.raises(ValueError, match="targets"):
        next_token_loss(make(), tokens, tokens[:, :-1])
    with pytest.raises(ValueError, match="mask"):
        next_token_loss(make(), tokens, tokens, tokens[:1])
    with pytest.raises(ValueError, match="chunk_size"):
        next_token_loss(make(), tokens, tokens, chunk_size=0)
