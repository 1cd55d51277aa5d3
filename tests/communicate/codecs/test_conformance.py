"""What every codec must do, whatever it is; the codecs are listed in ``registry.py``."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdml.communicate.codecs import Codec
from jdml.communicate.codecs.packing import pack, unpack
from tests.communicate.codecs.registry import CODECS

each_codec = pytest.mark.parametrize("name", CODECS)

LARGEST = float(np.finfo(np.float32).max)
KEY = jax.random.key(7)
# What XLA moves at the width that it has: it widens 4-bit integers, 8-bit floats and, on CPU, bf16.
WIRE_DTYPES = {"uint8", "int8", "uint16", "int16", "uint32", "int32", "float32"}


def key_of(codec: Codec, seed: int = 7):
    return jax.random.key(seed) if codec.needs_key else None


def row_length(codec: Codec, least: int = 256) -> int:
    """A whole number of blocks."""
    return -(-least // codec.granularity) * codec.granularity


def gaussian(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def round_trip(codec, x, seed=7):
    @jax.jit
    def f(x, key):
        return codec.decode(codec.encode(x, key))

    return np.asarray(f(x, key_of(codec, seed)))


def from_bits(bits):
    return np.asarray(bits, np.uint32).view(np.float32)


def relative_error(decoded, x):
    decoded, x = np.asarray(decoded, np.float64), np.asarray(x, np.float64)
    return ((decoded - x) ** 2).sum() / (x**2).sum()


@each_codec
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("shape", [(), (1,), (0, 3), (5,), (3, 5, 7), (2, 128), (257,)])
def test_any_shape_and_float_dtype_with_the_stated_bytes(name, shape, dtype):
    codec = CODECS[name].codec
    with jax.enable_x64(dtype == "float64"):
        x = jnp.asarray(gaussian(*shape), dtype)
        encoded = codec.encode(x, key_of(codec))
        decoded = codec.decode(encoded)
    assert decoded.shape == shape
    assert decoded.dtype == x.dtype == dtype
    assert np.isfinite(decoded.astype(jnp.float32)).all()
    if not x.size:
        assert encoded.nbytes == 0
        return
    length = x.size + -x.size % codec.granularity
    stated = codec.payload_bytes(length)
    assert encoded.nbytes == stated
    assert pack(encoded.payload).shape == (1, stated)
    assert codec.bits_per_element(x.size) == 8 * stated / x.size


@each_codec
def test_bits_per_element_are_those_of_the_docstring(name):
    case = CODECS[name]
    for blocks in (1, 3, 16):
        length = blocks * row_length(case.codec)
        assert case.codec.payload_bytes(length) * 8 / length == pytest.approx(case.bits(length))


@each_codec
def test_the_payload_travels_as_bytes_and_comes_back(name):
    codec = CODECS[name].codec
    length = row_length(codec)
    payload = codec.encode_rows(jnp.asarray(gaussian(3, length)), key_of(codec))
    for leaf in jax.tree.leaves(payload):
        assert leaf.shape[0] == 3
        assert leaf.dtype.name in WIRE_DTYPES
    buffer = pack(payload)
    assert buffer.dtype == jnp.uint8
    assert buffer.shape == (3, codec.payload_bytes(length))
    back = unpack(buffer, payload)
    jax.tree.map(np.testing.assert_array_equal, back, payload)
    assert codec.decode_rows(back, length).shape == (3, length)


@each_codec
def test_the_key_decides_what_is_drawn(name):
    codec = CODECS[name].codec
    length = row_length(codec)
    rows = jnp.tile(gaussian(length), (2, 1))
    one, again = (codec.encode_rows(rows, key_of(codec)) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, one, again)
    decoded = np.asarray(codec.decode_rows(one, length))
    if codec.needs_key:
        other = codec.decode_rows(codec.encode_rows(rows, key_of(codec, 8)), length)
        assert (decoded != other).any()
        assert (decoded[0] != decoded[1]).any()  # rows share a key, not what they draw
        with pytest.raises(ValueError, match="random numbers"):
            codec.encode(rows)
    else:
        np.testing.assert_array_equal(decoded[0], decoded[1])


@each_codec
def test_rows_say_nothing_of_each_other(name):
    codec = CODECS[name].codec
    rows = gaussian(3, row_length(codec))
    changed = rows.copy()
    changed[1] *= 1000
    one, other = (codec.encode_rows(jnp.asarray(r), key_of(codec)) for r in (rows, changed))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a[::2], b[::2])


@each_codec
def test_sum_of_rows_equals_the_rows_summed(name):
    codec = CODECS[name].codec
    length = row_length(codec)
    payload = codec.encode_rows(jnp.asarray(gaussian(3, length)), key_of(codec))
    rows = np.asarray(codec.decode_rows(payload, length))
    total = codec.decode_sum(payload, length)
    np.testing.assert_allclose(total, rows.sum(0), rtol=1e-5, atol=1e-5)


@each_codec
def test_zeros_are_exact_beside_anything(name):
    codec = CODECS[name].codec
    length = row_length(codec)
    assert not np.any(round_trip(codec, np.zeros(length, np.float32)))
    x = np.zeros((2 * length,), np.float32)
    x[0] = 1
    decoded = round_trip(codec, x)
    assert np.isfinite(decoded).all()
    assert not decoded[length:].any()


@each_codec
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_seen_in_its_row_alone(name, bad):
    codec = CODECS[name].codec
    length = row_length(codec)
    rows = gaussian(3, length)
    for where in (0, length // 2, length - 1):
        broken = rows.copy()
        broken[1, where] = bad
        payload = codec.encode_rows(jnp.asarray(broken), key_of(codec))
        decoded = np.asarray(codec.decode_rows(payload, length))
        assert not np.isfinite(decoded[1]).all(), where
        assert np.isfinite(decoded[::2]).all()
        assert not np.isfinite(codec.decode_sum(payload, length)).all()


@each_codec
def test_the_largest_numbers_overflow_nothing(name):
    case = CODECS[name]
    length = row_length(case.codec)
    signs = np.where(gaussian(length) < 0, -1, 1).astype(np.float32)
    one = np.zeros(length, np.float32)
    one[3] = -LARGEST
    for x in (signs * np.float32(LARGEST), np.full(length, LARGEST, np.float32), one):
        decoded = round_trip(case.codec, x)
        assert np.isfinite(decoded).all()
        if case.contraction(x) < 1 and not case.codec.needs_key:
            assert relative_error(decoded, x) <= case.contraction(x) + 1e-6


@each_codec
@pytest.mark.parametrize("seed", range(3))
def test_error_is_within_the_bound_at_any_scale(name, seed):
    """From subnormal to nearly the largest, on Gaussian, heavy-tailed and sparse rows."""
    case = CODECS[name]
    length = row_length(case.codec, 1024)
    x = gaussian(length, seed=seed)
    x = [x, x**5, x * (np.abs(x) > 2)][seed]
    x = np.asarray(x, np.float32)
    scales = [1.0, 1e-30, 1e-36, 1e-37, 1e-38, 1e-40, 1e-43, 1e33] if case.keeps_scale else [1.0]
    keys = 8 if case.codec.needs_key else 1
    for scale in scales:
        scaled = (x.astype(np.float64) * scale).astype(np.float32)
        errors = [relative_error(round_trip(case.codec, scaled, k), scaled) for k in range(keys)]
        # Half of the smallest number for each element is beyond any format.
        least = length * 2.0**-300 / (scaled.astype(np.float64) ** 2).sum()
        bound = case.contraction(scaled) + least
        # Eight draws scatter about their mean.
        assert np.mean(errors) <= bound * (1.3 if case.codec.needs_key else 1 + 1e-5), scale


@each_codec
def test_every_subnormal_number_is_said_as_well_as_any(name):
    case = CODECS[name]
    if not case.keeps_scale:
        pytest.skip("has no scale")
    length = row_length(case.codec)
    bits = np.random.default_rng(0).integers(0, 1 << 23, length)
    bits = (bits >> np.arange(length) % 24) | (np.arange(length) % 2) << 31
    x = from_bits(bits)
    errors = [relative_error(round_trip(case.codec, x, k), x) for k in range(4)]
    assert np.mean(errors) <= case.contraction(x) * (1.3 if case.codec.needs_key else 1) + 1e-9


@each_codec
def test_unbiased_where_claimed(name):
    """Each element's mean over N keys is within five deviations of it."""
    case = CODECS[name]
    if not case.unbiased:
        pytest.skip("claims no unbiasedness")
    length, num_keys = row_length(case.codec, 128), 512
    x = gaussian(length, seed=3)
    keys = jax.random.split(KEY, num_keys)
    decoded = np.asarray(
        jax.jit(jax.vmap(lambda k: case.codec.decode(case.codec.encode(jnp.asarray(x), k))))(keys)
    )
    deviation = decoded.std(0) / np.sqrt(num_keys)
    # An element that is nearly always drawn the same way shows too small a deviation of its own.
    deviation = np.maximum(deviation, decoded.std(0).mean() / num_keys)
    assert (np.abs(decoded.mean(0) - x) <= 5 * deviation + 1e-6).all()
    error = ((decoded.astype(np.float64) - x) ** 2).sum(1).mean()
    assert error <= case.contraction(x) * (x.astype(np.float64) ** 2).sum() * 1.05


@each_codec
def test_a_constant_leaf_that_fills_no_block_stays_constant(name):
    """What fills the last block up must not drag its scale."""
    codec = CODECS[name].codec
    if codec.fill == "zeros":
        pytest.skip("zeros do not change its scale")
    x = np.full(codec.granularity + 3, -0.75, np.float32)
    np.testing.assert_allclose(round_trip(codec, x), x, rtol=1e-6)


@each_codec
def test_traced_says_the_same_as_eager(name):
    codec = CODECS[name].codec
    x = jnp.asarray(gaussian(row_length(codec, 512)))
    eager = codec.decode(codec.encode(x, key_of(codec)))
    # A multiplication fused with an addition may move an element that lies on a boundary.
    assert np.mean(~np.isclose(round_trip(codec, x), eager, rtol=1e-6)) < 1e-2


@each_codec
def test_refuses_integers_and_complex_numbers(name):
    codec = CODECS[name].codec
    for dtype in ("int32", "complex64", "bool"):
        with pytest.raises(ValueError, match=f"got dtype {dtype}"):
            codec.encode(jnp.ones(4, dtype), KEY)


@each_codec
def test_is_a_value(name):
    codec = CODECS[name].codec
    assert codec == CODECS[name].codec
    assert hash(codec) is not None
    assert type(codec).__name__ in repr(codec)
