import jax
import jax.numpy as jnp
import numpy as np

from jdml.communicate.codecs import bf16, identity


def round_trip(codec, x):
    return np.asarray(jax.jit(lambda x: codec.decode(codec.encode(x)))(x))


def some_of_all_bits():
    """Every upper half with lower halves about the tie: subnormal, NaN and infinity among them."""
    upper = np.arange(1 << 16, dtype=np.uint32) << 16
    lower = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    return (upper[:, None] | lower).view(np.float32)


def test_bf16_is_the_nearest_ties_to_even():
    x = some_of_all_bits()
    with np.errstate(over="ignore", invalid="ignore"):
        expected = x.astype(jnp.bfloat16).astype(np.float32)
    decoded = round_trip(bf16(), x)
    saturated = np.isfinite(x) & ~np.isfinite(expected)
    np.testing.assert_array_equal(np.isnan(decoded), np.isnan(x))
    exact = ~np.isnan(x) & ~saturated
    np.testing.assert_array_equal(decoded[exact].view(np.int32), expected[exact].view(np.int32))
    largest = float(jnp.finfo(jnp.bfloat16).max)
    np.testing.assert_array_equal(decoded[saturated], np.sign(x[saturated]) * np.float32(largest))


def test_identity_keeps_every_bit():
    x = some_of_all_bits()
    np.testing.assert_array_equal(round_trip(identity(), x).view(np.int32), x.view(np.int32))


def test_bytes():
    assert bf16().payload_bytes(10) == 20
    assert identity().payload_bytes(10) == 40
