import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdml.communicate.codecs import int2, int4, int8

FAMILY = {"int8": int8, "int4": int4, "int2": int2}


def round_trip(codec, x, key=None):
    return np.asarray(jax.jit(lambda x, key: codec.decode(codec.encode(x, key)))(x, key))


def from_bits(bits):
    return np.asarray(bits, np.uint32).view(np.float32)


@pytest.mark.parametrize("block", [1, 16, 256])
@pytest.mark.parametrize("name", FAMILY)
def test_error_is_at_most_half_a_step(name, block):
    steps = {"int8": 127, "int4": 7, "int2": 1}[name]
    x = np.random.default_rng(0).standard_normal((3, 512)) * [[0.01], [1], [100]]
    x = x.astype(np.float32)
    error = np.abs(round_trip(FAMILY[name](block), x) - x).reshape(3, -1, block)
    largest = np.abs(x).reshape(3, -1, block).max(-1, keepdims=True)
    assert (error <= largest / (2 * steps) * (1 + 1e-6)).all()


@pytest.mark.parametrize("name", FAMILY)
def test_two_sided_error_is_at_most_half_a_step_between_the_ends(name):
    steps = {"int8": 255, "int4": 15, "int2": 3}[name]
    x = np.random.default_rng(0).standard_normal(512).astype(np.float32) + 5
    decoded = round_trip(FAMILY[name](64, "two_sided"), x).reshape(-1, 64)
    x = x.reshape(-1, 64)
    low, high = x.min(1, keepdims=True), x.max(1, keepdims=True)
    assert (np.abs(decoded - x) <= (high - low) / (2 * steps) * (1 + 1e-4)).all()
    np.testing.assert_array_equal(decoded.min(1, keepdims=True), low)
    np.testing.assert_array_equal(decoded.max(1, keepdims=True), high)


@pytest.mark.parametrize("name", FAMILY)
def test_is_odd_and_keeps_the_largest_of_a_block_bit_for_bit(name):
    # At all magnitudes: subnormal, barely normal, ordinary, nearly the largest.
    exponent = np.linspace(-148, 127, 64).astype(int).repeat(16).reshape(64, 16)
    x = np.ldexp(np.random.default_rng(1).uniform(-1, 1, (64, 16)), exponent).astype(np.float32)
    codec = FAMILY[name](16)
    decoded = round_trip(codec, x)
    np.testing.assert_array_equal(round_trip(codec, -x), -decoded)
    largest = np.abs(x).argmax(1)[:, None]
    np.testing.assert_array_equal(
        np.take_along_axis(decoded, largest, 1).view(np.int32),
        np.take_along_axis(x, largest, 1).view(np.int32),
    )


def test_blocks_of_fewer_than_127_times_the_smallest_number_are_exact():
    x = np.stack([from_bits(np.arange(1, 17) * k) for k in range(1, 8)])  # at most 112 * 2^-149
    x[:, 1::2] *= -1
    np.testing.assert_array_equal(round_trip(int8(16), x).view(np.int32), x.view(np.int32))


def test_a_constant_block_is_exact_on_both_sides():
    for value in (0.1, -3e38, 1e-45, 1e-39, 0):
        x = np.full(32, value, np.float32)
        decoded = round_trip(int4(16, "two_sided"), x)
        np.testing.assert_array_equal(decoded.view(np.int32), x.view(np.int32))


@pytest.mark.parametrize("scaling", ["absmax", "two_sided"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_visible_in_its_block_alone(scaling, bad):
    x = np.ones(8, np.float32)
    x[1] = bad
    decoded = round_trip(int8(4, scaling), x)
    assert not np.isfinite(decoded[:4]).any()
    np.testing.assert_array_equal(decoded[4:], 1)


def test_stochastic_rounding_takes_one_of_the_two_neighbours():
    x = np.random.default_rng(2).standard_normal(4096).astype(np.float32)
    decoded = round_trip(int4(rounding="stochastic"), x, jax.random.key(0)).reshape(-1, 128)
    x = x.reshape(-1, 128)
    step = np.abs(x).max(1, keepdims=True) / 7
    assert (np.abs(decoded - x) < step * (1 + 1e-6)).all()
    assert (np.abs(decoded - x) > step / 2 * (1 + 1e-6)).any()


@pytest.mark.slow
def test_codes_share_bytes():
    sent = {
        name: make(128).encode_rows(jnp.ones((2, 1024)))["codes"] for name, make in FAMILY.items()
    }
    assert [sent[name].size for name in FAMILY] == [2048, 1024, 512]
    assert all(x.dtype == jnp.uint8 for x in sent.values())


@pytest.mark.parametrize("block", [0, -1, 2.5, "256", True])
@pytest.mark.parametrize("name", FAMILY)
def test_refuses_a_block_that_is_no_positive_int(name, block):
    with pytest.raises(ValueError, match=rf"{name}\(block=.*positive int"):
        FAMILY[name](block)


def test_refuses_unknown_options():
    with pytest.raises(ValueError, match=r"int4\(scaling='max'\): expected one of"):
        int4(scaling="max")
    with pytest.raises(ValueError, match=r"int8\(rounding='up'\): expected one of"):
        int8(rounding="up")
