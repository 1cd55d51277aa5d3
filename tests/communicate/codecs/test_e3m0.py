import jax
import numpy as np
import pytest

from jdml.communicate.codecs import e3m0

CODEC = e3m0(16)
LEVELS = np.array([0, *(2.0**-k for k in range(6, -1, -1))])
LEVELS = np.concatenate([-LEVELS[:0:-1], LEVELS])


@jax.jit
def round_trip(x):
    return CODEC.decode(CODEC.encode(x))


@pytest.mark.parametrize("largest", [1.0, 3.0e38, 0.7, 2.0**-130])
def test_says_the_nearest_of_fifteen_levels(largest):
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, (64, 16)) * 2.0 ** -rng.integers(0, 9, (64, 16))
    x[:, 3] = -1
    x = (x * largest).astype(np.float32)
    decoded = np.asarray(round_trip(x))
    levels = LEVELS * np.float64(np.float32(largest))
    nearest = levels[np.abs(x[..., None] - levels).argmin(-1)]
    np.testing.assert_allclose(decoded, nearest, rtol=1e-6, atol=2.0**-150)
    np.testing.assert_array_equal(decoded[:, 3].view(np.int32), x[:, 3].view(np.int32))


def test_levels_say_themselves():
    x = np.concatenate([LEVELS, [0]]).astype(np.float32) * np.float32(0.3)
    decoded = np.asarray(round_trip(x))
    np.testing.assert_array_equal(decoded, x)


def test_refuses():
    with pytest.raises(ValueError, match=r"e3m0\(block=0\): expected a positive int"):
        e3m0(0)
