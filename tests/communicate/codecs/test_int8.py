import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdml.communicate.codecs import int8
from jdml.communicate.codecs.packing import pack, unpack


def round_trip(codec, x):
    return np.asarray(codec.decode(codec.encode(x)))


@pytest.mark.parametrize("block", [1, 16, 256])
def test_error_is_at_most_half_a_level_of_the_block(block):
    x = jax.random.normal(jax.random.key(0), (3, 512)) * 10.0 ** jnp.arange(-2, 1)[:, None]
    error = np.abs(round_trip(int8(block), x) - x).reshape(3, -1, block)
    largest = np.abs(x).reshape(3, -1, block).max(-1, keepdims=True)
    assert (error <= largest / 254 * (1 + 1e-6)).all()


def test_is_odd_and_keeps_the_largest_of_a_block():
    x = jax.random.normal(jax.random.key(1), (1, 64))
    codec = int8(64)
    np.testing.assert_array_equal(round_trip(codec, -x), -round_trip(codec, x))
    i = int(jnp.argmax(jnp.abs(x)))
    np.testing.assert_allclose(round_trip(codec, x)[0, i], x[0, i], rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_visible_in_its_block_alone(bad):
    x = jnp.ones((1, 8)).at[0, 1].set(bad)
    decoded = round_trip(int8(4), x)
    assert not np.isfinite(decoded[0, :4]).any()
    np.testing.assert_allclose(decoded[0, 4:], 1, rtol=1e-6)


@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-38, 3.0e38, float(np.finfo(np.float32).max)])
def test_extremes_of_f32_stay_finite_and_near(value):
    x = jnp.full((1, 4), value, jnp.float32).at[0, 1].multiply(-1)
    decoded = round_trip(int8(4), x)
    # Blocks of less than 127 smallest normal numbers are sent as zeros.
    expected = x if value > 127 * np.finfo(np.float32).tiny else np.zeros_like(x)
    np.testing.assert_allclose(decoded, expected, rtol=1e-6)


def test_packed_payload_has_the_stated_bytes_and_unpacks_to_itself():
    codec = int8(16)
    payload = codec.encode_rows(jax.random.normal(jax.random.key(2), (3, 64)))
    buffer = pack(payload)
    assert buffer.dtype == jnp.uint8
    assert buffer.shape == (3, codec.payload_bytes(64)) == (3, 64 + 4 * 4)
    for a, b in zip(
        jax.tree.leaves(payload), jax.tree.leaves(unpack(buffer, payload)), strict=True
    ):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int32", "int8", "uint8"])
def test_packing_keeps_every_bit_and_makes_no_dim_of_bytes(dtype):
    word = f"uint{8 * jnp.dtype(dtype).itemsize}"
    # All patterns of the top bits, NaNs with their payloads among them.
    bits = jnp.arange(256, dtype=word).reshape(2, 4, 32) << (jnp.iinfo(word).bits - 8) | 1
    payload = {"a": jax.lax.bitcast_convert_type(bits, dtype), "b": jnp.ones((2, 3), jnp.int8)}
    back = unpack(pack(payload), payload)
    assert back["a"].dtype == dtype
    np.testing.assert_array_equal(jax.lax.bitcast_convert_type(back["a"], word), bits)
    np.testing.assert_array_equal(back["b"], payload["b"])
    # A minor dim of 2 or 4 bytes is taken apart element by element on TPU: see packing.py.
    shapes = jax.make_jaxpr(lambda p: unpack(pack(p), p))(payload).jaxpr.eqns
    assert not {e.outvars[0].aval.shape[-1] for e in shapes} & {2, 4}


@pytest.mark.parametrize("block", [0, -1, 2.5, "256"])
def test_refuses_a_block_that_is_no_positive_int(block):
    with pytest.raises(ValueError, match="positive int"):
        int8(block)
