import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdml.communicate.codecs.packing import cut, join_planes, pack, split_planes, unpack


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


@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_planes_hold_the_low_bits_of_each_run(width):
    values = jnp.asarray(np.random.default_rng(0).integers(-128, 128, (3, 16, 5)), jnp.int32)
    runs = cut(values, 8 // width)
    joined = join_planes(runs, width)
    assert joined.dtype == jnp.uint8
    assert joined.size == values.size * width // 8
    for run, back in zip(runs, split_planes(joined, width), strict=True):
        np.testing.assert_array_equal(back, run & ((1 << width) - 1))
