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


@pytest.mark.parametrize(
    ("shape", "num_scales", "lines"),
    [
        ((512, 128), 512, 512 + 16),  # whole lines of scales
        ((520, 128), 130, 520 + 5),  # 4 * 130 bytes share five lines
        ((66_000,), 7, 516),  # 66,028 bytes of which no array is made of lines
    ],
)
def test_long_rows_go_in_lines_filled_up_with_less_than_one(shape, num_scales, lines):
    rng = np.random.default_rng(0)
    payload = {
        "codes": jnp.asarray(rng.integers(0, 256, (2, *shape)), jnp.uint8),
        "scales": jnp.asarray(rng.standard_normal((2, num_scales)), jnp.float32),
    }
    buffer = pack(payload)
    assert buffer.shape == (2, lines, 128)
    stated = sum(x[0].nbytes for x in payload.values())
    assert 0 <= buffer[0].nbytes - stated < 128
    jax.tree.map(np.testing.assert_array_equal, unpack(buffer, payload), payload)
