import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdml.communicate.codecs import terngrad


def draws(codec, x, number):
    keys = jax.random.split(jax.random.key(0), number)
    one = jax.vmap(lambda key: codec.decode(codec.encode(jnp.asarray(x), key)))
    return np.asarray(jax.jit(one)(keys), np.float64)


def test_draws_the_largest_either_way_or_zero_with_the_variance_of_the_paper():
    x = np.random.default_rng(0).standard_normal(64).astype(np.float32)
    decoded = draws(terngrad(64), x, 2000)
    largest = np.abs(x).max()
    assert set(np.unique(np.abs(decoded))) == {0, largest}
    assert (np.sign(decoded) * np.sign(x) >= 0).all()
    variance = ((decoded - x) ** 2).sum(1).mean()
    assert variance == pytest.approx(largest * np.abs(x).sum() - (x**2).sum(), rel=0.02)


def test_clips_at_a_number_of_deviations_from_zero():
    x = np.ones(64, np.float32)
    x[5] = -100
    top = 1.5 * np.sqrt((x.astype(np.float64) ** 2).mean())
    decoded = draws(terngrad(64, clip=1.5), x, 500)
    np.testing.assert_allclose(decoded[:, 5], -top, rtol=1e-6)
    rest = np.delete(decoded, 5, axis=1)
    assert rest.mean() == pytest.approx(1, abs=4 * rest.std() / np.sqrt(rest.size))


def test_clipping_leaves_a_constant_leaf_alone():
    x = np.full(5, 0.25, np.float32)
    np.testing.assert_allclose(draws(terngrad(64, clip=2.5), x, 2), 0.25, rtol=1e-6)


def test_refuses():
    with pytest.raises(ValueError, match="positive int"):
        terngrad(0)
    for clip in (0, 0.5, -1, float("inf"), float("nan"), "2.5", True):
        with pytest.raises(ValueError, match=r"terngrad\(clip=.*2.5"):
            terngrad(clip=clip)
