import jax
import numpy as np
import pytest

from jdml.communicate.codecs import one_bit

SCALES = [1.0, 1e-42, 1e-38, 1e30, 3e37]


def round_trip(codec, x):
    return np.asarray(jax.jit(lambda x: codec.decode(codec.encode(x)))(x))


def gaussian(scale=1.0, size=512):
    return (np.random.default_rng(0).standard_normal(size) * scale).astype(np.float32)


@pytest.mark.parametrize("scale", SCALES)
def test_is_the_sign_times_the_mean_magnitude(scale):
    x = gaussian(scale)
    blocks = x.astype(np.float64).reshape(-1, 64)
    expected = np.sign(blocks) * np.abs(blocks).mean(1, keepdims=True)
    # The mean of subnormal numbers is to the nearest 2^-149.
    decoded = round_trip(one_bit(64), x)
    np.testing.assert_allclose(decoded, expected.reshape(-1), rtol=1e-6, atol=2.0**-150)


@pytest.mark.parametrize("scale", SCALES)
def test_mean_per_sign(scale):
    x = gaussian(scale)
    blocks = x.astype(np.float64).reshape(-1, 64)
    below = blocks < 0
    low = (blocks * below).sum(1, keepdims=True) / below.sum(1, keepdims=True)
    high = (blocks * ~below).sum(1, keepdims=True) / (~below).sum(1, keepdims=True)
    decoded = round_trip(one_bit(64, "mean_per_sign"), x)
    expected = np.where(below, low, high).reshape(-1)
    np.testing.assert_allclose(decoded, expected, rtol=1e-6, atol=2.0**-150)


def test_error_of_gaussian_elements():
    """``1 - E|x|^2 = 1 - 2 / pi``."""
    x = gaussian(size=1 << 16)
    error = ((round_trip(one_bit(), x) - x) ** 2).sum() / (x**2).sum()
    assert error == pytest.approx(1 - 2 / np.pi, abs=0.01)


def test_mean_per_sign_errs_less_and_says_two_values_exactly():
    x = gaussian() + 0.5
    errors = [((round_trip(one_bit(64, s), x) - x) ** 2).sum() for s in ("mean", "mean_per_sign")]
    assert errors[1] < errors[0]
    x = np.where(x < 0, np.float32(-0.5), np.float32(2))
    np.testing.assert_allclose(round_trip(one_bit(64, "mean_per_sign"), x), x, rtol=1e-6)


def test_a_block_of_one_sign_has_no_mean_of_the_other():
    x = np.abs(gaussian(size=64))
    np.testing.assert_allclose(
        round_trip(one_bit(64, "mean_per_sign"), x), np.full(64, x.mean()), rtol=1e-6
    )


@pytest.mark.parametrize("scale", ["mean", "mean_per_sign"])
def test_takes_at_most_0_035_of_f32(scale):
    codec = one_bit(scale=scale)
    assert codec.bits_per_element(1 << 20) <= 0.035 * 32


def test_refuses():
    with pytest.raises(ValueError, match=r"one_bit\(block=12\): expected a multiple of 8.*16"):
        one_bit(12)
    with pytest.raises(ValueError, match="positive int"):
        one_bit(0)
    with pytest.raises(ValueError, match=r"scale='median'\): expected one of"):
        one_bit(scale="median")
