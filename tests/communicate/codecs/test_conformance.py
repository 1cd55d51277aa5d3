"""What every codec must do, whatever it is; the codecs are listed in ``registry.py``."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdml.communicate.codecs.packing import pack, unpack
from tests.communicate.codecs.registry import CODECS
from tests.marks import slow

# Compiling is what costs: the tests of a codec run one after the other and share its program.
# Variants of a codec beside them are slow.
SLOW = (
    "int8, odd block",
    "int4, block of one",
    "int2, two-sided",
    "int2, stochastic",
    "fp8",
    "terngrad",
    "qsgd, one level",
    "qsgd, most levels",
)


def each_codec_that(promises):
    chosen = [slow(n) if n in SLOW else n for n, case in CODECS.items() if promises(case)]
    return pytest.mark.parametrize("name", chosen, scope="module")


each_codec = each_codec_that(lambda case: True)

ONE_OF_EACH_CLASS = {type(case.codec): n for n, case in CODECS.items()}.values()
QUICK = ("bf16", "identity", "fp8, e5m2", "e3m0", "threshold")

LARGEST = np.finfo(np.float32).max
# What XLA moves at the width that it has: it widens 4-bit integers, 8-bit floats and, on CPU, bf16.
WIRE_DTYPES = {"uint8", "int8", "uint16", "int16", "uint32", "int32", "float32"}


def key_of(codec, seed=7):
    return jax.random.key(seed) if codec.needs_key else None


def length_of(codec, least=512):
    """A whole number of blocks."""
    return -(-least // codec.granularity) * codec.granularity


@functools.cache
def compiled(codec):
    """One program for all tests of a codec: of three rows, what is sent, read and summed."""
    length = length_of(codec)

    @jax.jit
    def run(rows, key):
        payload = codec.encode_rows(rows, key)
        return payload, codec.decode_rows(payload, length), codec.decode_sum(payload, length)

    return run


def exchange(codec, rows, seed=7):
    """Payload, decoded rows and their sum, of ``[3, length]``."""
    payload, decoded, total = compiled(codec)(jnp.asarray(rows, jnp.float32), key_of(codec, seed))
    return payload, np.asarray(decoded), np.asarray(total)


def round_trip(codec, x, seed=7):
    """The same row three times, decoded; a codec that draws decodes three different ones."""
    return exchange(codec, np.broadcast_to(x, (3, length_of(codec))), seed)[1]


def gaussian(codec, *leading, seed=0):
    shape = (*leading, length_of(codec))
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def relative_error(decoded, x):
    """Of several draws, averaged."""
    x = np.asarray(x, np.float64)
    return ((decoded.astype(np.float64) - x) ** 2).sum() / len(decoded) / (x**2).sum()


SHAPES = [((3, 5, 7), "float16"), ((), "float32"), ((5,), "bfloat16"), ((2, 129), "float64")]


# Shapes and dtypes are what Codec itself sees to: all of them for one of each class.
@pytest.mark.parametrize(
    ("name", "shape", "dtype"),
    [
        *((n, *SHAPES[0]) if n in ONE_OF_EACH_CLASS else slow(n, *SHAPES[0]) for n in CODECS),
        *((n, *x) if n in QUICK else slow(n, *x) for n in ONE_OF_EACH_CLASS for x in SHAPES[1:]),
    ],
)
def test_any_shape_and_float_dtype_with_the_stated_bytes(name, shape, dtype):
    codec = CODECS[name].codec

    def there_and_back(x, key):
        encoded = codec.encode(x, key)
        return encoded, codec.decode(encoded)

    with jax.enable_x64(dtype == "float64"):
        x = jnp.asarray(np.random.default_rng(1).standard_normal(shape), dtype)
        encoded, decoded = jax.jit(there_and_back)(x, key_of(codec))
    assert decoded.shape == shape
    assert decoded.dtype == x.dtype == dtype
    assert np.isfinite(decoded.astype(np.float32)).all()
    stated = codec.payload_bytes(codec.whole(x.size))
    assert encoded.nbytes == stated
    assert codec.bits_per_element(x.size) == 8 * stated / x.size


@each_codec
def test_nothing_takes_no_bytes(name):
    codec = CODECS[name].codec
    encoded = codec.encode(jnp.zeros((0, 3), jnp.bfloat16), key_of(codec))
    assert encoded.nbytes == 0
    assert codec.decode(encoded).shape == (0, 3)


@each_codec
def test_bits_per_element_are_those_of_the_docstring(name):
    case = CODECS[name]
    for blocks in (1, 3, 16):
        length = blocks * length_of(case.codec)
        assert case.codec.payload_bytes(length) * 8 / length == pytest.approx(case.bits(length))


@each_codec
def test_the_payload_travels_as_bytes_and_comes_back(name):
    codec = CODECS[name].codec
    payload, decoded, _ = exchange(codec, gaussian(codec, 3))
    for leaf in jax.tree.leaves(payload):
        assert leaf.shape[0] == 3
        assert leaf.dtype.name in WIRE_DTYPES
    buffer, back = jax.jit(lambda x: (pack(x), unpack(pack(x), x)))(payload)
    assert buffer.dtype == jnp.uint8
    assert buffer.shape == (3, codec.payload_bytes(length_of(codec)))
    jax.tree.map(np.testing.assert_array_equal, back, payload)
    assert decoded.shape == (3, length_of(codec))


@each_codec
def test_the_key_decides_what_is_drawn(name):
    codec = CODECS[name].codec
    rows = np.tile(gaussian(codec), (3, 1))
    one, decoded, _ = exchange(codec, rows)
    again, _, _ = exchange(codec, rows)
    jax.tree.map(np.testing.assert_array_equal, one, again)
    if codec.needs_key:
        assert (decoded != exchange(codec, rows, seed=8)[1]).any()
        assert (decoded[0] != decoded[1]).any()  # rows share a key, not what they draw
        with pytest.raises(ValueError, match="random numbers"):
            codec.encode(jnp.ones(3))
    else:
        np.testing.assert_array_equal(decoded[0], decoded[1])


@each_codec
def test_rows_say_nothing_of_each_other(name):
    codec = CODECS[name].codec
    rows = gaussian(codec, 3)
    changed = rows.copy()
    changed[1] *= 1000
    one, other = exchange(codec, rows)[0], exchange(codec, changed)[0]
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a[::2], b[::2])


@each_codec
def test_sum_of_rows_equals_the_rows_summed(name):
    codec = CODECS[name].codec
    _, decoded, total = exchange(codec, gaussian(codec, 3))
    np.testing.assert_allclose(total, decoded.sum(0), rtol=1e-5, atol=1e-5)


@each_codec
def test_zeros_are_exact_beside_anything(name):
    codec = CODECS[name].codec
    rows = np.zeros((3, length_of(codec)), np.float32)
    rows[1, 0] = 1
    rows[2, -1] = np.nan
    _, decoded, _ = exchange(codec, rows)
    assert not decoded[0].any()
    assert np.isfinite(decoded[1]).all()


@each_codec
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_seen_in_its_row_alone(name, bad):
    codec = CODECS[name].codec
    rows = gaussian(codec, 3)
    for where in (0, length_of(codec) // 2, length_of(codec) - 1):
        broken = rows.copy()
        broken[1, where] = bad
        _, decoded, total = exchange(codec, broken)
        assert not np.isfinite(decoded[1]).all(), where
        assert np.isfinite(decoded[::2]).all()
        assert not np.isfinite(total).all()


@each_codec
def test_the_largest_numbers_overflow_nothing(name):
    case = CODECS[name]
    signs = np.sign(gaussian(case.codec))
    one = np.zeros_like(signs)
    one[3] = -1
    for x in (signs, np.ones_like(signs), one):
        decoded = round_trip(case.codec, x * LARGEST)
        assert np.isfinite(decoded).all()
        bound = case.contraction(x * LARGEST)
        if bound < 1 and not case.codec.needs_key:
            assert relative_error(decoded, x * LARGEST) <= bound + 1e-6


@each_codec
@pytest.mark.parametrize("kind", ["gaussian", "heavy-tailed", "sparse"])
def test_error_is_within_the_bound_at_any_scale(name, kind):
    """From subnormal numbers to nearly the largest."""
    case = CODECS[name]
    x = gaussian(case.codec, seed=len(kind)).astype(np.float64)
    x = {"gaussian": x, "heavy-tailed": x**5, "sparse": x * (np.abs(x) > 2)}[kind]
    scales = [1.0, 1e-30, 1e-36, 1e-37, 1e-38, 1e-40, 1e-43, 1e34] if case.keeps_scale else [1.0]
    for scale in scales:
        scaled = (x * scale).astype(np.float32)
        draws = 4 if case.codec.needs_key else 1
        errors = [relative_error(round_trip(case.codec, scaled, k), scaled) for k in range(draws)]
        # Half of the smallest number for each element is beyond any format.
        least = x.size * 2.0**-300 / (scaled.astype(np.float64) ** 2).sum()
        bound = (np.sqrt(case.contraction(scaled)) + np.sqrt(least)) ** 2
        # Twelve draws scatter about their mean.
        assert np.mean(errors) <= bound * (1.3 if case.codec.needs_key else 1 + 1e-5), scale


@each_codec_that(lambda case: case.keeps_scale)
def test_every_subnormal_number_is_said_as_well_as_any(name):
    case = CODECS[name]
    count = np.arange(length_of(case.codec))
    bits = np.random.default_rng(0).integers(0, 1 << 23, count.size)
    x = np.asarray((bits >> count % 24) | (count % 2) << 31, np.uint32).view(np.float32)
    errors = [relative_error(round_trip(case.codec, x, k), x) for k in range(4)]
    assert np.mean(errors) <= case.contraction(x) * (1.3 if case.codec.needs_key else 1) + 1e-9


@each_codec_that(lambda case: case.unbiased)
def test_unbiased_where_claimed(name):
    """Each element's mean over N draws is within six of its deviations."""
    case = CODECS[name]
    x = gaussian(case.codec, seed=3)
    draws = np.concatenate([round_trip(case.codec, x, seed) for seed in range(150)])
    draws = draws.astype(np.float64)
    deviation = draws.std(0)
    # An element that is drawn nearly always the same shows too small a deviation of its own.
    deviation = np.maximum(deviation / np.sqrt(len(draws)), 3 * deviation.mean() / len(draws))
    assert (np.abs(draws.mean(0) - x) <= 6 * deviation + 1e-6).all()
    assert relative_error(draws, x) <= case.contraction(x) * 1.05


@each_codec_that(lambda case: case.codec.fill == "wrap")
def test_a_constant_leaf_that_fills_no_block_stays_constant(name):
    """What fills the last block up must not drag its scale."""
    codec = CODECS[name].codec
    x = jnp.full(codec.granularity + 3, -0.75)
    decoded = jax.jit(lambda x, key: codec.decode(codec.encode(x, key)))(x, key_of(codec))
    np.testing.assert_allclose(decoded, x, rtol=1e-6)


@pytest.mark.parametrize(
    "name", [n if n in QUICK else slow(n) for n in ONE_OF_EACH_CLASS], scope="module"
)
def test_traced_says_the_same_as_eager(name):
    """One of each class: what is not traced compiles every operation by itself."""
    codec = CODECS[name].codec
    rows = gaussian(codec, 3)
    eager = codec.encode_rows(jnp.asarray(rows), key_of(codec))
    decoded = codec.decode_rows(eager, length_of(codec))
    # A multiplication fused with an addition may move an element that lies on a boundary.
    same = np.isclose(exchange(codec, rows)[1], decoded, rtol=1e-6, atol=1e-6)
    assert same.mean() > (0.99 if codec.needs_key else 0.9999)


@each_codec
def test_refuses_integers_and_complex_numbers(name):
    codec = CODECS[name].codec
    for dtype in ("int32", "complex64", "bool"):
        with pytest.raises(ValueError, match=f"got dtype {dtype}"):
            codec.encode(jnp.ones(4, dtype), key_of(codec))


@each_codec
def test_is_a_value(name):
    codec = CODECS[name].codec
    assert codec == CODECS[name].codec
    assert hash(codec) is not None
    assert type(codec).__name__ in repr(codec)
