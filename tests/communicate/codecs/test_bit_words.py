import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdml.communicate.codecs.bit_words import Layout, first, layout_of, places, set_bits

LAYOUTS = [Layout(1, 1), Layout(1, 5), Layout(3, 2), layout_of(5000)]


def masks(layout, seed=0):
    """One row each: none, all, one in ten, one in two, the last alone."""
    n = layout.num_places
    rng = np.random.default_rng(seed)
    last = np.arange(n) == n - 1
    return np.stack([last & False, last | True, rng.random(n) < 0.1, rng.random(n) < 0.5, last])


@pytest.mark.parametrize("length", [1, 31, 32, 33, 4095, 4096, 4097, 32768, 1_000_001])
def test_a_layout_wastes_little(length):
    layout = layout_of(length)
    assert length <= layout.num_places < length + 32 * layout.groups
    assert layout.width <= 128


@pytest.mark.parametrize("layout", LAYOUTS)
def test_places_of_a_mask_are_its_elements(layout):
    mask = masks(layout)

    @jax.jit
    def f(mask):
        words = layout.words(mask)
        assert words.shape == (5, layout.num_words)
        return layout.count(mask), places(words, layout.num_places + 3)

    count, found = f(mask)
    np.testing.assert_array_equal(count, mask.sum(1))
    found = np.asarray(found)
    for row, place in zip(mask, found, strict=True):
        member = place[place < layout.num_places]
        assert (np.diff(member) > 0).all()
        assert (place[member.size :] == layout.num_places).all()
        elements = np.asarray(layout.elements(jnp.asarray(member)))
        np.testing.assert_array_equal(np.sort(elements), np.flatnonzero(row))
    beyond = layout.elements(jnp.asarray([layout.num_places]))
    assert beyond[0] >= layout.num_places


@pytest.mark.parametrize("layout", LAYOUTS)
def test_first_keeps_the_lowest_places(layout):
    @jax.jit
    def f(mask, n):
        words = layout.words(mask)
        return places(words, layout.num_places), places(first(words, n), layout.num_places)

    for n in (-1, 0, 1, 7, 100, 10**6):
        every, kept = f(masks(layout), jnp.full(5, n, jnp.int32))
        expected = np.array(every)
        expected[:, max(n, 0) :] = layout.num_places
        np.testing.assert_array_equal(kept, expected)


def test_bits_that_are_set_are_found_and_others_dropped():
    where = jnp.asarray([[0, 31, 32, 95, 96], [3, 4, 5, 96, 200]], jnp.int32)
    words = jax.jit(lambda p: set_bits(p, 3))(where)
    np.testing.assert_array_equal(words, [[0x80000001, 1, 0x80000000], [0b111000, 0, 0]])
    some, few = jax.jit(lambda w: (places(w, 5), places(w, 2)))(words)
    np.testing.assert_array_equal(some, [[0, 31, 32, 95, 96], [3, 4, 5, 96, 96]])
    np.testing.assert_array_equal(few, [[0, 31], [3, 4]])
