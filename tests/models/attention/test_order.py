"""Zig-zag order: who holds what, and that all agree on it."""

import jax
import numpy as np
import pytest

from jdml.models.attention import positions, unzigzag, zigzag
from jdml.models.attention.order import chunk_places


def test_each_device_holds_a_chunk_from_either_end():
    chunks = zigzag(np.arange(8), 4, dim=0).reshape(4, 2)
    np.testing.assert_array_equal(chunks, [[0, 7], [1, 6], [2, 5], [3, 4]])


@pytest.mark.parametrize("axis_size", [1, 2, 3, 4])
def test_the_order_is_the_same_wherever_it_is_asked(axis_size):
    tokens = np.random.default_rng(0).integers(100, size=(2, 24))
    moved = zigzag(tokens, axis_size)
    np.testing.assert_array_equal(moved, tokens[:, positions(24, axis_size, "zigzag")])
    np.testing.assert_array_equal(unzigzag(moved, axis_size), tokens)
    np.testing.assert_array_equal(jax.jit(zigzag, static_argnums=1)(tokens, axis_size), moved)
    np.testing.assert_array_equal(positions(24, axis_size, "contiguous"), np.arange(24))
    joined = moved.reshape(2, 2 * axis_size, -1)[:, chunk_places(axis_size, "zigzag")]
    if axis_size > 1:
        np.testing.assert_array_equal(joined.reshape(2, 24), tokens)


@pytest.mark.parametrize("axis_size", [2, 4, 8])
def test_everybody_has_the_same_causal_work(axis_size):
    """Keys that a device's queries see, summed; in contiguous order they differ by far."""
    seq = 8 * axis_size
    counts = {
        order: (np.asarray(positions(seq, axis_size, order)) + 1).reshape(axis_size, -1).sum(axis=1)
        for order in ("zigzag", "contiguous")
    }
    assert len(set(counts["zigzag"])) == 1
    assert counts["contiguous"].max() > 1.4 * counts["contiguous"].mean()


@pytest.mark.parametrize(
    ("length", "message"), [(12, "2 × 4 chunks.*8 or 16"), (3, "nearest lengths are 8")]
)
def test_refuses_unequal_chunks(length, message):
    for function in (zigzag, unzigzag):
        with pytest.raises(ValueError, match=message):
            function(np.zeros((2, length)), 4)
    with pytest.raises(ValueError, match=message):
        positions(length, 4, "zigzag")
    with pytest.raises(ValueError, match=r"4 parts.*4 or 8"):
        positions(6, 4, "contiguous")
