"""Numbers of any size, against NumPy, which flushes none."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdml.communicate.codecs.lifting import lift, lift_for, lower
from jdml.communicate.codecs.reductions import ends, larger, largest, total

SUBNORMAL = np.array([1, 2, 3, 1 << 22, (1 << 23) - 1], np.uint32).view(np.float32)


def of_all_sizes(shape, seed=0):
    rng = np.random.default_rng(seed)
    exponent = rng.integers(-149, 127, (*shape[:-1], 1))
    return np.ldexp(rng.uniform(-2, 2, shape), exponent).astype(np.float32)


def test_lifted_and_lowered_is_the_same():
    x = np.concatenate([of_all_sizes((500, 1)).ravel(), SUBNORMAL, -SUBNORMAL, [0, 1e-45]])
    x = np.append(x, [np.finfo(np.float32).max, 2.0**-126, 2.0**80, 2.0**-80]).astype(np.float32)

    @jax.jit
    def there_and_back(x):
        by = lift_for(jnp.abs(x))
        lifted = lift(x, by)
        return lifted, by.factor, lower(lifted, by)

    lifted, factor, back = there_and_back(x)
    np.testing.assert_array_equal(lifted, x.astype(np.float64) * np.asarray(factor, np.float64))
    np.testing.assert_array_equal(back.view(np.int32), x.view(np.int32))


def test_lowers_to_the_nearest_multiple_of_the_smallest_number():
    by = lift_for(jnp.full(8, SUBNORMAL[-1]))
    y = np.array([0.4, 0.6, 1.4, -2.6, 1e3, 2.0**21 - 0.6, 2.0**23 - 0.5, 2.0**24]) * 2.0**-49
    expected = np.round(y * 2.0**49) * 2.0**-149
    np.testing.assert_array_equal(lower(jnp.asarray(y, jnp.float32), by), expected)


@pytest.mark.parametrize("length", [1, 7, 32, 48, 100, 256, 1024])
def test_reductions(length):
    x = of_all_sizes((40, length), seed=length)
    found, low, high = jax.jit(lambda x: (largest(x), *ends(x)))(x)
    np.testing.assert_array_equal(found, np.abs(x).max(1))
    np.testing.assert_array_equal(low, x.min(1))
    np.testing.assert_array_equal(high, x.max(1))
    ones = np.arange(length, dtype=np.float32)
    assert total(jnp.asarray(ones)) == ones.sum()


def test_what_is_not_finite_is_the_largest():
    x = jnp.array([[1, np.nan, np.inf], [1, -np.inf, 2], [np.inf, 3, -np.inf], [1, -np.nan, 2]])
    np.testing.assert_array_equal(largest(x), [np.nan, np.inf, np.inf, np.nan])
    low, high = ends(x)
    assert not np.isfinite(larger(low, high)).any()
