import jax
import numpy as np
import pytest

from jdml.communicate.codecs import e3m0_row
from tests.communicate.codecs.test_e3m0 import exponents

LENGTH = 48
FIRST = np.arange(LENGTH) % (LENGTH // 2) < 8  # those that share a byte with a bit of the scale


@jax.jit
def round_trip(rows):
    payload = e3m0_row().encode_rows(rows)
    assert payload.nbytes == rows.size // 2
    return e3m0_row().decode_rows(payload, LENGTH)


@pytest.mark.parametrize("largest", [1.0, 3.3e38, 0.7, 2.0**-115, 2.0**-130])
def test_says_the_nearest_power_within_reach(largest):
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, (64, LENGTH)) * 2.0 ** -rng.integers(0, 9, (64, LENGTH))
    x[:, 3] = -1
    x = (x * largest).astype(np.float32)
    decoded = round_trip(x)
    top = exponents(np.abs(x.astype(np.float64)).max(1))
    for first, octaves in ((True, 5), (False, 7)):
        levels = np.exp2(top[:, None] - np.arange(octaves))
        levels = np.concatenate([-levels, np.zeros((64, 1)), levels], axis=1)
        chosen = x[:, first == FIRST]
        nearest = np.abs(chosen[..., None] - levels[:, None, :]).argmin(-1)
        expected = np.take_along_axis(levels, nearest, axis=1)
        np.testing.assert_array_equal(np.asarray(decoded)[:, first == FIRST], expected)


def test_every_scale_arrives():
    x = np.zeros((248, LENGTH), np.float32)
    x[:, 20] = np.exp2(np.arange(-120, 128))
    x[:, 0], x[:, 24] = -x[:, 20], x[:, 20] / 16
    np.testing.assert_array_equal(round_trip(x), x)


def test_what_is_not_finite_makes_its_row_so():
    x = np.ones((4, LENGTH), np.float32)
    x[1, 0], x[2, 30], x[3, 47] = np.nan, np.inf, -np.inf
    decoded = np.asarray(round_trip(x))
    np.testing.assert_array_equal(decoded[0], x[0])
    assert np.isnan(decoded[1:]).all()


def test_half_a_byte_an_element():
    assert e3m0_row().bits_per_element(3596) == 4
    assert [e3m0_row().whole(n) for n in (1, 16, 17)] == [16, 16, 18]
