"""Against the conversions of ml_dtypes, bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdml.communicate.codecs import fp8

FORMATS = {"e4m3": (jnp.float8_e4m3fn, 448.0), "e5m2": (jnp.float8_e5m2, 57344.0)}


def finite_values(dtype):
    values = np.arange(256, dtype=np.uint8).view(dtype).astype(np.float32)
    return values[np.isfinite(values)]


@pytest.mark.parametrize("name", FORMATS)
def test_codes_are_those_of_a_conversion(name):
    dtype, largest = FORMATS[name]
    values = np.unique(finite_values(dtype))
    ties = (values[1:] + values[:-1]) / 2
    rng = np.random.default_rng(0)
    drawn = rng.uniform(-1, 1, 4000) * largest * 2.0 ** -rng.integers(0, 36, 4000)
    x = np.concatenate([values, ties, np.nextafter(ties, 0), np.nextafter(ties, 1e9), drawn])
    x = np.concatenate([x, np.zeros(-x.size % 64)]).astype(np.float32).reshape(-1, 64)
    x[:, 0] = largest  # each block's scale is then 1
    payload = jax.jit(fp8(name, 64).encode_rows)(x.reshape(1, -1))
    expected = x.astype(dtype).view(np.uint8).reshape(1, -1)
    codes = np.asarray(payload["codes"]).reshape(1, -1)
    same = codes == expected
    # A zero's sign may differ, no more.
    assert (same | (codes & 0x7F == 0) & (expected & 0x7F == 0)).all()


@pytest.mark.parametrize("name", FORMATS)
def test_every_code_is_read_as_its_number(name):
    dtype, largest = FORMATS[name]
    values = finite_values(dtype)
    payload = {
        "codes": jnp.asarray(values.astype(dtype).view(np.uint8))[None, None],
        "largest": jnp.full((1, 1), largest),
    }
    decoded = fp8(name, values.size).decode_rows(payload, values.size)
    np.testing.assert_allclose(decoded[0], values, rtol=2e-7)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("scale", [1e-43, 1e-36, 1.0, 1e36])
def test_the_largest_is_exact(name, scale):
    x = (np.random.default_rng(1).standard_normal((8, 32)) * scale).astype(np.float32)
    codec = fp8(name, 32)
    decoded = np.asarray(jax.jit(lambda x: codec.decode(codec.encode(x)))(x))
    i = np.abs(x).argmax(1)
    np.testing.assert_array_equal(
        decoded[np.arange(8), i].view(np.int32), x[np.arange(8), i].view(np.int32)
    )


def test_refuses():
    with pytest.raises(ValueError, match=r"format='e3m4'\): expected one of \('e4m3', 'e5m2'\)"):
        fp8("e3m4")
    with pytest.raises(ValueError, match="positive int"):
        fp8(block=0)
