"""The loss in pieces equals the loss at once, in value, gradient and not in memory."""

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest
from flax import nnx

from jdml.models import next_token_loss, token_losses


class TableModel:
    """The least that the loss asks of a model, so that nothing else takes time or memory."""

    def __init__(self, params):
        self.table, self.kernel = params

    def hidden(self, tokens, *, key=None):
        return self.table[tokens]

    def head_kernel(self):
        return self.kernel

    def logits(self, hidden, kernel):
        return jnp.matmul(hidden, kernel, preferred_element_type=jnp.float32)


@pytest.fixture
def params():
    first, second = jax.random.split(jax.random.key(6))
    return jax.random.normal(first, (24, 8)), jax.random.normal(second, (8, 24))


@pytest.fixture
def mask():
    return (jnp.arange(12) < jnp.array([[12], [7], [3], [9]])).astype(jnp.float32)


def plain_loss(logits, targets, mask):
    """By definition: minus the mean log-probability."""
    log_p = jax.nn.log_softmax(logits)
    chosen = jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]
    return -jnp.sum(chosen * mask) / jnp.sum(mask)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("chunk_size", [None, 4, 5, 1])
def test_chunks_change_neither_loss_nor_gradients(params, tokens, mask, chunk_size, masked):
    targets = jnp.roll(tokens, -1, axis=1)

    @jax.jit
    def chunked(params):
        given = mask if masked else None
        model = TableModel(params)
        return next_token_loss(model, tokens, targets, given, chunk_size=chunk_size)

    @jax.jit
    def plain(params):
        used = mask if masked else jnp.ones_like(mask)
        return plain_loss(params[0][tokens] @ params[1], targets, used)

    got, wanted = (jax.value_and_grad(f)(params) for f in (chunked, plain))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), got, wanted)


def test_many_chunks_do_not_wear_out_a_bfloat16_gradient():
    """256 gradients of the kernel, each 1/256 of the sum, added in float32."""
    table, kernel = jax.random.normal(jax.random.key(7), (2, 8, 8))
    tokens = jax.random.randint(jax.random.key(8), (2, 256), 0, 8)

    def loss(kernel, chunk_size):
        model = TableModel((table.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16)))
        return next_token_loss(model, tokens, tokens, chunk_size=chunk_size)

    many, once = (jax.jit(jax.grad(loss), static_argnums=1)(kernel, n) for n in (1, 256))
    np.testing.assert_allclose(many, once, atol=0.01 * float(jnp.abs(once).max()))


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
def test_chunks_of_a_decoder_whose_head_is_its_embedding(make, tokens, mask):
    graphdef, params = nnx.split(make(tie_embeddings=True))

    def chunked(params):
        return next_token_loss(nnx.merge(graphdef, params), tokens, tokens, mask, chunk_size=5)

    def plain(params):
        return plain_loss(nnx.merge(graphdef, params)(tokens), tokens, mask)

    got, wanted = (jax.jit(jax.value_and_grad(f))(params) for f in (chunked, plain))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), got, wanted)


def test_a_large_vocabulary_needs_far_less_memory_than_its_logits():
    batch, seq, vocab = 2, 2048, 32_768
    tokens = jax.ShapeDtypeStruct((batch, seq), jnp.int32)
    shapes = tuple(jax.ShapeDtypeStruct(s, jnp.float32) for s in ((vocab, 8), (8, vocab)))

    def temporaries(chunk_size):
        def loss(params, tokens):
            return next_token_loss(TableModel(params), tokens, tokens, chunk_size=chunk_size)

        compiled = jax.jit(jax.value_and_grad(loss)).lower(shapes, tokens).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    logits = batch * seq * vocab * 4
    assert temporaries(None) < 0.25 * logits  # 128 positions of 2,048 at a time, by default
    assert temporaries(16) < 0.05 * logits
    assert temporaries(seq) > logits  # else this test would measure nothing


def test_a_uniform_model_costs_the_log_of_the_vocabulary(params, tokens):
    model = TableModel((params[0], jnp.zeros_like(params[1])))
    assert float(next_token_loss(model, tokens, tokens)) == pytest.approx(np.log(24), rel=1e-6)


def test_targets_outside_the_vocabulary(params, tokens):
    """NaN, unless masked: then neither the loss nor a gradient knows of them."""
    targets = tokens.at[2, 3].set(-1)

    @jax.jit
    def loss(params, mask):
        return next_token_loss(TableModel(params), tokens, targets, mask)

    assert bool(jnp.isnan(loss(params, jnp.ones_like(tokens))))
    value, grads = jax.value_and_grad(loss)(params, targets >= 0)
    assert bool(jnp.isfinite(value))
    assert all(bool(jnp.isfinite(g).all()) for g in grads)


def test_token_losses_in_forward_and_reverse_mode():
    logits = jax.random.normal(jax.random.key(0), (3, 7)) * 3
    targets = jnp.array([0, 6, 2])
    jax.test_util.check_grads(
        lambda x: token_losses(x, targets), (logits,), order=1, atol=0.02, rtol=0.02
    )


def test_a_mask_that_keeps_nothing_gives_zero(params, tokens):
    nothing = jnp.zeros_like(tokens)
    assert float(next_token_loss(TableModel(params), tokens, tokens, nothing)) == 0.0


def test_refuses_shapes_that_differ(params, tokens):
    model = TableModel(params)
    with pytest.raises(ValueError, match="targets"):
        next_token_loss(model, tokens, tokens[:, :-1])
    with pytest.raises(ValueError, match="mask"):
        next_token_loss(model, tokens, tokens, tokens[:1])
    with pytest.raises(ValueError, match="chunk_size"):
        next_token_loss(model, tokens, tokens, chunk_size=0)
