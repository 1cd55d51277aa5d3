"""Plain data as bytes and back: the same bits, the same structure."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdml.train.saving.pack import pack, unpack


def there_and_back(value):
    outline, data = pack(value)
    assert data.dtype == np.uint8
    return unpack(json.loads(json.dumps(outline)), data)


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        -3,
        "a",
        0.1,
        (),
        [],
        {},
        {3: (1, [2, "x"]), "b": {1, 2}, 4: None},
        (math.inf, -math.inf),
    ],
)
def test_containers_and_numbers(value):
    assert there_and_back(value) == value


@pytest.mark.parametrize(
    "dtype", ["float64", "float32", "bfloat16", "int64", "uint8", "bool", "complex128", "int4"]
)
@pytest.mark.parametrize("shape", [(), (3,), (0, 2), (2, 3)])
def test_arrays_keep_their_bits_and_dtype(dtype, shape):
    x = np.random.default_rng(0).standard_normal(shape) * 3
    x = np.asarray(x).astype(jnp.dtype(dtype))
    out = there_and_back({"x": x, "n": 1})["x"]
    assert out.dtype == x.dtype
    assert out.shape == x.shape
    np.testing.assert_array_equal(out, x)
    assert not out.flags.writeable


def test_nan_and_order_and_jax():
    nan = there_and_back(float("nan"))
    assert math.isnan(nan)
    x = np.asfortranarray(np.arange(6.0).reshape(2, 3))
    np.testing.assert_array_equal(there_and_back(x), x)
    np.testing.assert_array_equal(there_and_back(x.astype(">f8")), x)
    np.testing.assert_array_equal(there_and_back(jnp.arange(3)), [0, 1, 2])
    assert there_and_back(np.float64(2.5)) == 2.5
    key = jax.random.key(3)
    assert (jax.random.key_data(there_and_back(key)) == jax.random.key_data(key)).all()


def test_what_is_there_twice_is_written_once():
    x = np.arange(1000.0)
    outline, data = pack([x, x, {"x": x}])
    assert data.nbytes == 8000
    a, b, c = unpack(outline, data)
    assert a is b is c["x"]


@pytest.mark.parametrize("value", [object(), {(1, 2): 3}, np.array([None]), b"bytes"])
def test_refused(value):
    with pytest.raises(ValueError, match="cannot save"):
        pack(value)
