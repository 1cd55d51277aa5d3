import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdml.communicate.codecs import e3m0

CODEC = e3m0(16)
LEAST, GREATEST = -120, 127  # exponents of a block's greatest power


@jax.jit
def round_trip(x):
    encoded = CODEC.encode(x)
    return CODEC.decode(encoded), encoded.payload["exponent"]


def exponents(largest):
    """Of the power of two nearest to each, ties upwards, in f64."""
    mantissa, exponent = np.frexp(largest)
    return np.clip(exponent - (mantissa < 0.75), LEAST, GREATEST)


@pytest.mark.parametrize("largest", [1.0, 3.3e38, 0.7, 2.0**-115, 2.0**-122, 2.0**-130])
def test_says_the_nearest_of_fifteen_levels(largest):
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, (64, 16)) * 2.0 ** -rng.integers(0, 9, (64, 16))
    x[:, 3] = -1
    x = (x * largest).astype(np.float32)
    decoded, exponent = round_trip(x)
    top = exponents(np.abs(x.astype(np.float64)).max(1))
    # Blocks of one encoded row: the first run's, then the second's.
    np.testing.assert_array_equal(exponent[0], top + 127)
    levels = np.exp2(top[:, None] - np.arange(7.0))
    levels = np.concatenate([-levels, np.zeros((64, 1)), levels], axis=1)[:, None, :]
    away = np.abs(x[..., None] - levels)
    nearest = np.take_along_axis(levels[:, 0], away.argmin(-1), axis=1)
    np.testing.assert_array_equal(decoded, nearest)


@pytest.mark.parametrize("exponent", [-114, 0, 127])
def test_powers_of_two_say_themselves(exponent):
    x = np.exp2(exponent - np.arange(7.0))
    x = np.concatenate([x, -x, [0, 0]]).astype(np.float32)
    decoded, _ = round_trip(x)
    np.testing.assert_array_equal(np.asarray(decoded), x)


def test_ties_go_away_from_zero():
    x = np.zeros(32, np.float32)
    x[:6] = 1.5, -1.5, 0.75, 3 * 2.0**-7, 2.0**-6, np.nextafter(np.float32(2.0**-6), 0)
    decoded, exponent = round_trip(x)
    np.testing.assert_array_equal(exponent[0], [128, 7])  # the other run is zeros
    np.testing.assert_array_equal(decoded[:6], [2, -2, 1, 2.0**-5, 2.0**-5, 0])


def test_what_is_not_finite_is_e8m0s_nan():
    x = np.ones((4, 16), np.float32)
    x[1, 3], x[2, 0], x[3, 15] = np.nan, np.inf, -np.inf
    decoded, exponent = round_trip(x)
    np.testing.assert_array_equal(exponent[0], [127, 255, 255, 255])
    np.testing.assert_array_equal(decoded[0], x[0])
    assert np.isnan(decoded[1:]).all()


def test_the_scale_is_a_byte():
    encoded = jax.eval_shape(lambda x: e3m0().encode(x), jnp.zeros(1 << 20))
    assert encoded.nbytes == (1 << 19) + (1 << 20) // 512
    assert e3m0().bits_per_element(1 << 20) == 4 + 8 / 512


def test_refuses():
    with pytest.raises(ValueError, match=r"e3m0\(block=0\): expected a positive int"):
        e3m0(0)
