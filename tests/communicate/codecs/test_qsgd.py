import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdml.communicate.codecs import qsgd

LARGEST = np.finfo(np.float32).max


def draws(codec, x, number):
    keys = jax.random.split(jax.random.key(0), number)
    one = jax.vmap(lambda key: codec.decode(codec.encode(jnp.asarray(x), key)))
    return np.asarray(jax.jit(one)(keys), np.float64)


@pytest.mark.parametrize("levels", [1, 5, 127])
def test_draws_a_level_beside_each_element(levels):
    x = np.random.default_rng(0).standard_normal(64).astype(np.float32)
    norm = np.sqrt((x.astype(np.float64) ** 2).sum())
    level = draws(qsgd(levels, 64), x, 50) / norm * levels
    np.testing.assert_allclose(level, np.round(level), atol=1e-4)
    assert (np.abs(level - x / norm * levels) < 1 + 1e-4).all()


@pytest.mark.parametrize(
    ("levels", "block"),
    [
        (4, 16),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [(1, 16), (2, 256), (16, 256), (127, 256)]
        ),
    ],
)
def test_variance_is_within_the_bound_of_the_paper(levels, block):
    """On what comes near it: all elements alike, or half a level high."""
    rng = np.random.default_rng(0)
    half = np.full(block, 0.5 / levels)
    half[0] = np.sqrt(max(1 - (half[1:] ** 2).sum(), 0))
    for x in (rng.standard_normal(block), np.ones(block), half):
        x = x.astype(np.float32)
        square = (x.astype(np.float64) ** 2).sum()
        variance = ((draws(qsgd(levels, block), x, 200) - x) ** 2).sum(1).mean()
        assert variance <= min(block / levels**2, np.sqrt(block) / levels) * square * 1.1


def test_a_norm_above_the_largest_f32_is_no_infinity():
    decoded = draws(qsgd(1, 64), np.full(64, LARGEST), 20)
    assert set(np.unique(decoded)) == {0, LARGEST}  # 8 × the largest, if f32 had it


def test_codes_take_as_many_bits_as_the_levels_need():
    bits = [qsgd(s, 64).payload_bytes(64) - 4 for s in (1, 2, 7, 8, 127)]
    assert bits == [16, 32, 32, 64, 64]


@pytest.mark.parametrize("levels", [0, -1, 2.5, True, "7", 128])
def test_refuses_levels_that_no_code_holds(levels):
    with pytest.raises(ValueError, match=r"qsgd\(levels=.*expected"):
        qsgd(levels)


def test_refuses_a_block_of_nothing():
    with pytest.raises(ValueError, match=r"qsgd\(block=0\)"):
        qsgd(7, 0)
