import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdml.communicate.codecs import int8, threshold, top_k


def gaussian(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@functools.cache
def compiled(codec):
    return jax.jit(lambda x: codec.decode(codec.encode(x)))


def round_trip(codec, x):
    return np.asarray(compiled(codec)(x))


@pytest.mark.parametrize(
    ("value", "capacity"),
    [
        (0, 0.5),
        (0.7, 1500),
        (9.0, 1500),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in [(0, 1.0), (1.2, 1500)]),
    ],
)
def test_sends_what_is_above_while_there_is_room(value, capacity):
    x = gaussian(3000)
    x[::7] = 0
    decoded = round_trip(threshold(value, capacity), x)
    if (np.abs(x) > value).sum() > threshold(value, capacity).num_slots(3000):
        np.testing.assert_array_equal(decoded, round_trip(top_k(capacity), x))
    else:
        np.testing.assert_array_equal(decoded, np.where(np.abs(x) > value, x, 0))


@pytest.mark.slow
@pytest.mark.parametrize("values", [None, int8(16)])
def test_slots_that_are_not_used_say_nothing(values):
    x = np.zeros(1000, np.float32)
    x[[0, 500, 999]] = [2, -3, 4]
    codec = threshold(1.0, 100, values)
    decoded = round_trip(codec, x)
    np.testing.assert_allclose(decoded[[0, 500, 999]], [2, -3, 4], rtol=1e-2)
    assert (decoded != 0).sum() == 3
    payload = codec.encode_rows(jnp.asarray(np.stack([x, np.zeros_like(x), x])))
    np.testing.assert_allclose(codec.decode_sum(payload, 1000), 2 * decoded)
    assert not round_trip(codec, np.full(1000, 0.9, np.float32)).any()


@pytest.mark.slow
def test_overflow_sends_the_largest_and_leaves_the_rest():
    x = gaussian(3000)
    decoded = round_trip(threshold(0.5, 30), x)
    np.testing.assert_array_equal(decoded, round_trip(top_k(30), x))


@pytest.mark.parametrize("value", [1.0, 1e-42, 2.0**-150, 0.1 + 1e-12, 0.1 - 1e-12, 3e38])
def test_compares_exactly(value):
    """Around any value, also one that f32 does not have."""
    near = np.float32(value)
    x = np.asarray([np.nextafter(near, np.float32(s), dtype=np.float32) for s in (0, np.inf)])
    x = np.concatenate([x, [near], -x, [0]]).astype(np.float32)
    decoded = round_trip(threshold(value, 1.0), x)
    sent = np.abs(x.astype(np.float64)) > value
    np.testing.assert_array_equal(decoded.view(np.uint32), np.where(sent, x, 0).view(np.uint32))


def test_what_is_not_finite_has_the_first_right_to_a_slot():
    x = gaussian(500) * 1e30
    x[[10, 400]] = [np.nan, -np.inf]
    decoded = round_trip(threshold(3e38, 2), x.astype(np.float32))
    assert np.isnan(decoded[10])
    assert decoded[400] == -np.inf


def test_bytes_do_not_depend_on_what_qualifies():
    codec = threshold(1.0, 0.1)
    assert codec.encode(gaussian(1000)).nbytes == codec.encode(jnp.zeros(1000)).nbytes
    assert codec.payload_bytes(1000) == top_k(0.1).payload_bytes(1000)


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf"), 1e39, "1", True, None])
def test_refuses_a_value_that_is_no_magnitude(value):
    with pytest.raises(ValueError, match=r"threshold\(value=.*finite number >= 0"):
        threshold(value, 10)


def test_refuses_a_capacity_that_does_not_fit():
    with pytest.raises(ValueError, match=r"threshold\(capacity=0\)"):
        threshold(1.0, 0)
    with pytest.raises(ValueError, match=r"threshold\(capacity=11\).*row of 10"):
        threshold(1.0, 11).encode(jnp.ones(10))
    with pytest.raises(ValueError, match=r"threshold\(values="):
        threshold(1.0, 10, values="int8")
