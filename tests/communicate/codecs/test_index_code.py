import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdml.communicate.codecs.index_code import IndexCode, index_code


@pytest.mark.parametrize("low_bits", [0, 8, 16])
@pytest.mark.parametrize("num_places", [32, pytest.param(256, marks=pytest.mark.slow), 65536 + 32])
@pytest.mark.parametrize("num_slots", [pytest.param(2, marks=pytest.mark.slow), 32])
def test_comes_back(num_places, num_slots, low_bits):
    code = IndexCode(num_places, num_slots, low_bits)
    rng = np.random.default_rng(num_places)
    lists = [
        np.sort(rng.choice(num_places, num_slots, replace=False)),
        np.arange(num_slots),
        num_places - num_slots + np.arange(num_slots),
        np.where(np.arange(num_slots) < num_slots // 2, np.arange(num_slots), num_places),
        np.full(num_slots, num_places),  # none
    ]
    places = jnp.asarray(np.stack(lists), jnp.int32)
    payload = jax.jit(code.encode)(places)
    np.testing.assert_array_equal(jax.jit(code.decode)(payload), places)
    assert sum(x[0].nbytes for x in jax.tree.leaves(payload)) == code.nbytes


@pytest.mark.parametrize(
    ("part", "low_bits", "bytes_per_index"),
    [(1e-4, 16, 2.145), (1e-3, 8, 1.613), (1e-2, 8, 1.174), (0.1, 8, 1.13), (0.5, 0, 0.25)],
)
def test_takes_the_code_of_fewest_bytes(part, low_bits, bytes_per_index):
    """Close to the entropy of which elements are sent, from one in ten thousand to one in two."""
    num_places = 1 << 20
    num_slots = int(part * num_places)
    code = index_code(num_places, num_slots)
    assert code.low_bits == low_bits
    assert code.nbytes / num_slots == pytest.approx(bytes_per_index, rel=0.01)
    entropy = -(part * np.log2(part) + (1 - part) * np.log2(1 - part)) / 8
    assert entropy <= code.nbytes / num_places <= 2 * entropy
