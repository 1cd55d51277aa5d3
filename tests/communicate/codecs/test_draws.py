import jax
import numpy as np

from jdml.communicate.codecs.draws import uniform

SHAPE = (4, 64, 64)


def drawn(seed=0, num_runs=1):
    return np.concatenate(uniform(jax.random.key(seed), SHAPE, num_runs), axis=1)


def test_is_uniform():
    u = drawn()
    assert u.min() >= -0.5
    assert u.max() < 0.5
    counts = np.histogram(u, 256, (-0.5, 0.5))[0]
    expected = u.size / 256
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert abs(chi_square - 255) < 5 * np.sqrt(2 * 255)
    assert (u * 2**24 % 2 == 1).mean() > 0.45  # the last bit is drawn too


def test_elements_blocks_rows_and_keys_draw_on_their_own():
    u = drawn()
    others = [u[:, :, 1:], u[:, 1:], u[1:], drawn(seed=1)]
    these = [u[:, :, :-1], u[:, :-1], u[:-1], u]
    for a, b in zip(these, others, strict=True):
        correlation = np.corrcoef(a.ravel(), b.ravel())[0, 1]
        assert abs(correlation) < 5 / np.sqrt(a.size)
    assert len(np.unique(u)) > 0.99 * u.size


def test_runs_are_cut_from_one_stream():
    np.testing.assert_array_equal(drawn(num_runs=4), drawn())
