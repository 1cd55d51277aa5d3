"""One device: blocks of scores give what all scores give, and are never all there."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdml.models.attention import divided_attention, plain_attention, positions
from jdml.models.attention.blocks import all_pairs, block_size, causal_pairs
from jdml.models.attention.gathered import Gathered
from jdml.models.attention.ulysses import Ulysses
from tests.models.attention.passes import with_gradients

pytestmark = pytest.mark.usefixtures("one_device")
SIZES = (2, 6, 2, 24, 8)  # batch, heads, kv_heads, seq, head_dim


@pytest.mark.parametrize("causal", [True, False])
def test_the_reference_equals_jax(arrays, expected, causal):
    heads_last = [x.transpose(0, 2, 1, 3) for x in arrays(*SIZES)[:3]]
    attend = jax.jit(functools.partial(jax.nn.dot_product_attention, is_causal=causal))
    wanted = attend(*heads_last).transpose(0, 2, 1, 3)
    np.testing.assert_allclose(expected(causal, *SIZES)[0], wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("causal", "block"), [(True, 4), (True, 24), (False, 6)])
def test_equals_all_scores_at_once(arrays, expected, causal, block):
    attend = functools.partial(divided_attention, causal=causal, block=block)
    got = jax.jit(with_gradients(attend))(*arrays(*SIZES))
    for a, b in zip(got, expected(causal, *SIZES), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_large_scores_do_not_overflow(arrays):
    """Scores of some 1e4: exponentials of them would be infinite."""
    query, key, value, gradient = arrays(*SIZES)
    args = (300 * query, 300 * key, value, gradient)
    attend = functools.partial(divided_attention, block=4)
    got = jax.jit(with_gradients(attend))(*args)
    wanted = jax.jit(with_gradients(plain_attention))(*args)
    assert all(bool(jnp.isfinite(x).all()) for x in got)
    np.testing.assert_allclose(got[0], wanted[0], atol=1e-5)


def test_bfloat16_stays_near_float32(arrays, expected):
    args = tuple(x.astype(jnp.bfloat16) for x in arrays(*SIZES))
    got = jax.jit(with_gradients(functools.partial(divided_attention, block=4)))(*args)
    for a, b in zip(got, expected(True, *SIZES), strict=True):
        assert a.dtype == jnp.bfloat16
        # A bfloat16 has 8 bits; operands and weights are rounded, sums are not.
        np.testing.assert_allclose(a.astype(jnp.float32), b, atol=0.03 * float(jnp.abs(b).max()))


def test_scores_are_never_whole():
    """The compiled program's temporaries are a fraction of one [seq, seq] array."""
    seq, block = 2048, 128
    shape = jax.ShapeDtypeStruct((1, 1, seq, 8), jnp.float32)
    run = jax.jit(with_gradients(functools.partial(divided_attention, block=block)))
    temporary = run.lower(*[shape] * 4).compile().memory_analysis().temp_size_in_bytes
    assert temporary < 4 * seq * seq / 8
    plain = jax.jit(with_gradients(plain_attention)).lower(*[shape] * 4).compile()
    assert plain.memory_analysis().temp_size_in_bytes > 4 * seq * seq


def test_invisible_blocks_are_not_in_the_list():
    assert causal_pairs(24, 4).count == 6 * 7 // 2
    assert all_pairs(8, 24, 4).count == 2 * 6


@pytest.mark.parametrize(
    ("form", "order"), [(Gathered, "zigzag"), (Ulysses, "zigzag"), (Ulysses, "contiguous")]
)
@pytest.mark.parametrize(
    ("length", "block", "num_pieces"),
    [
        (8, 2, 2),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in [(8, 1, 4), (4, 2, 1)]),
    ],
)
def test_pieces_meet_each_visible_pair_once(form, order, length, block, num_pieces):
    """Two devices; a block is known by its first position of the text."""
    size = 2
    attention = form("x", size, True, order, block)
    cut, text = attention.cut(length), np.asarray(positions(size * length, size, order))
    assert cut.pieces == num_pieces
    parts = text.reshape(size, 1, 1, length, 1)
    seen, counts = [[] for _ in range(size)], set()

    def table(number):
        count, pair = cut.pairs(number, attention.meeting())
        counts.add(count)
        return jnp.stack(jax.vmap(pair)(jnp.arange(count)), axis=1)

    for number in range(cut.pieces):
        keys = np.concatenate([np.ravel(cut.take(jnp.asarray(x), number)) for x in parts])
        tables = jax.vmap(lambda _, n=number: table(n), axis_name="x")(jnp.arange(size))
        for device, found in enumerate(np.asarray(tables)):
            own = text[device * length :][:length] if form is Gathered else text
            queries, met, distance = own[found[:, 0]], keys[found[:, 1]], found[:, 2]
            far = (distance >= block) & (queries - met >= block)
            assert np.all((distance == queries - met) | far)
            seen[device] += zip(queries.tolist(), met.tolist(), strict=True)
    for device in range(size):
        own = text[device * length :][:length] if form is Gathered else text
        wanted = [(q, k) for q in own[::block].tolist() for k in range(0, q + 1, block)]
        assert sorted(seen[device]) == sorted(wanted)
    assert len(counts) == 1


def test_block_sizes():
    assert [block_size(*x) for x in ((12, 512), (1024, 512), (1536, 1000), (96, 64))] == [
        12, 512, 768, 48,
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"1021.*no divisor from 64 to 512.*512 and 1024"):
        block_size(1021, 512)
    for wrong in (0, True, 2.0):
        with pytest.raises(ValueError, match="block must be"):
            block_size(8, wrong)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": (2, 4, 24, 8)}, "divisor of heads"),
        ({"key": (2, 2, 23, 8)}, "expected queries"),
        ({"value": (2, 1, 24, 8)}, "expected queries"),
        ({"query": (2, 24, 8)}, "expected queries"),
    ],
)
def test_refuses_arrays_that_do_not_fit(change, message):
    shapes = {"query": (2, 6, 24, 8), "key": (2, 2, 24, 8), "value": (2, 2, 24, 8)} | change
    with pytest.raises(ValueError, match=message):
        divided_attention(**{name: jnp.zeros(shape) for name, shape in shapes.items()})


def test_refuses_words_it_does_not_know():
    x = jnp.zeros((1, 1, 4, 2))
    with pytest.raises(ValueError, match=r"form must be one of.*'star'"):
        divided_attention(x, x, x, "star")
    with pytest.raises(ValueError, match=r"order must be one of.*'spiral'"):
        divided_attention(x, x, x, order="spiral")
    with pytest.raises(ValueError, match="one float dtype"):
        divided_attention(x, x.astype(jnp.bfloat16), x)


def test_masks_of_all_pairs_are_nowhere():
    """Not before layers that are scanned and computed again, where JAX puts what it knows early."""
    block = 8

    @jax.checkpoint
    def layer(x, weight):
        return x + divided_attention(x * weight, x, x, block=block), None

    def loss(weights, x):
        return jax.lax.scan(layer, x, weights)[0].sum()

    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((2,), (1, 2, 64, 4))]
    text = str(jax.make_jaxpr(jax.grad(loss))(*shapes))
    masks = [math.prod(map(int, dims.split(","))) for dims in re.findall(r"bool\[([\d,]+)\]", text)]
    assert masks
    assert max(masks) <= 2 * block**2
