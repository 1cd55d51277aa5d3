"""Products of 8-bit floats against float32, within what their formats round by."""

import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import SingleDeviceSharding

from jdml.models.transformer.fp8 import fp8_matmul, has_fp8_products
from jdml.sharding import no_mesh

ROWS, INPUTS, OUTPUTS = 24, 32, 16
HALF_E4M3, HALF_E5M2 = 2.0**-4, 2.0**-3  # half a unit of the last place, of the value


@jax.jit
def passes(x, kernel, gradient):
    y, back = jax.vjp(fp8_matmul, x, kernel)
    return (y, *back(gradient))


def drawn(*shape, seed):
    return jax.random.normal(jax.random.key(seed), shape)


def least(x, dtype):
    """What a value too small to have all its bits is rounded by: half the format's last step."""
    info = jnp.finfo(dtype)
    return float(jnp.max(jnp.abs(x))) / float(info.max) * float(info.smallest_subnormal) / 2


def test_errors_are_what_the_formats_round_by():
    x, kernel = drawn(ROWS, INPUTS, seed=0), drawn(INPUTS, OUTPUTS, seed=1)
    gradient = drawn(ROWS, OUTPUTS, seed=2)
    found = passes(x, kernel, gradient)
    a, w, g = (np.abs(np.asarray(v, np.float64)) for v in (x, kernel, gradient))
    # |q(a) q(b) − a b| ≤ |a||b| (u + v + u v), and what is lost below the smallest normal value.
    off = {
        "x": (HALF_E4M3, least(x, jnp.float8_e4m3fn)),
        "w": (HALF_E4M3, least(kernel, jnp.float8_e4m3fn)),
        "g": (HALF_E5M2, least(gradient, jnp.float8_e5m2)),
    }

    def bound(left, right, of_left, of_right):
        (u, small), (v, tiny) = off[of_left], off[of_right]
        wide_left, wide_right = left * (1 + u) + small, right * (1 + v) + tiny
        return wide_left @ wide_right - left @ right + 1e-4

    x64, w64, g64 = (np.asarray(v, np.float64) for v in (x, kernel, gradient))
    for got, wanted, most in (
        (found[0], x64 @ w64, bound(a, w, "x", "w")),
        (found[1], g64 @ w64.T, bound(g, w.T, "g", "w")),
        (found[2], x64.T @ g64, bound(a.T, g, "x", "g")),
    ):
        error = np.abs(np.asarray(got) - wanted)
        assert np.all(error <= most)
        assert np.max(error) > 0


def test_what_the_formats_hold_is_multiplied_exactly():
    """Small integers beside a peak that makes the scale 1: sums of products are exact."""
    draws = np.random.default_rng(0)
    x = draws.integers(-8, 9, (ROWS, INPUTS)).astype(np.float32)
    kernel = draws.integers(-8, 9, (INPUTS, OUTPUTS)).astype(np.float32)
    gradient = draws.integers(-4, 5, (ROWS, OUTPUTS)).astype(np.float32)
    x[0, 0] = kernel[0, 0] = 448
    gradient[1, 1] = 57_344
    for got, wanted in zip(
        passes(x, kernel, gradient), (x @ kernel, gradient @ kernel.T, x.T @ gradient), strict=True
    ):
        np.testing.assert_array_equal(got, wanted)


def test_a_power_of_two_passes_through():
    x, kernel = drawn(ROWS, INPUTS, seed=0), drawn(INPUTS, OUTPUTS, seed=1)
    gradient = drawn(ROWS, OUTPUTS, seed=2)
    small = passes(x * 2.0**-40, kernel, gradient)
    np.testing.assert_array_equal(small[0] * 2.0**40, passes(x, kernel, gradient)[0])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_seen(bad):
    x = drawn(ROWS, INPUTS, seed=0).at[3, 5].set(bad)
    kernel, gradient = drawn(INPUTS, OUTPUTS, seed=1), drawn(ROWS, OUTPUTS, seed=2)
    assert not np.any(np.isfinite(passes(x, kernel, gradient)[0][3]))
    of_zeros = passes(x * 0 + bad * 0 if bad != bad else jnp.zeros_like(x), kernel, gradient)
    assert np.all(np.isnan(of_zeros[0])) if bad != bad else np.all(of_zeros[0] == 0)


def test_a_decoder_in_fp8_beside_one_in_float32(make, tokens):
    """Emulated: gradients point where float32's do; refused where it would gain nothing."""
    found = {}
    for matmul in ("dtype", "fp8_emulated"):
        graphdef, params = nnx.split(make(matmul=matmul))

        def loss_of(params, graphdef=graphdef):
            logits = nnx.merge(graphdef, params)(tokens)
            chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], -1)
            return -jnp.mean(chosen)

        with no_mesh():
            loss, of_params = jax.jit(jax.value_and_grad(loss_of))(params)
        leaves = [np.ravel(x) for x in jax.tree.leaves(of_params)]
        found[matmul] = float(loss), np.concatenate(leaves)
    (wide, g), (narrow, g8) = found["dtype"], found["fp8_emulated"]
    assert narrow != wide
    np.testing.assert_allclose(narrow, wide, rtol=0.02)
    assert g @ g8 > 0.98 * np.linalg.norm(g) * np.linalg.norm(g8)

    with no_mesh(), pytest.raises(ValueError, match="matmul='fp8_emulated'"):
        make(matmul="fp8")(tokens)


@pytest.mark.tpu_compile
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu not installed")
def test_the_compiled_products_are_of_8_bits():
    """All three, for a TPU that multiplies them."""
    from jax.experimental import topologies

    (old, new) = (
        topologies.get_topology_desc(platform="tpu", topology_name=name).devices[0]
        for name in ("v5e:2x2", "tpu7x:2x2x1")
    )
    assert not has_fp8_products(old)
    assert has_fp8_products(new)
    one = SingleDeviceSharding(new)
    shapes = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=one)
        for shape, dtype in (
            ((1024, 512), jnp.bfloat16),
            ((512, 256), jnp.float32),
            ((1024, 256), jnp.bfloat16),
        )
    ]
    text = passes.lower(*shapes).compile().as_text()
    kinds = re.findall(r"(f8e4m3fn|f8e5m2)\[[\d,]*\]\S* (?:%|parameter|fusion|convert)", text)
    assert {"f8e4m3fn", "f8e5m2"} <= set(kinds)
    assert operands(text) == [
        ("f8e4m3fn", "f8e4m3fn"), ("f8e4m3fn", "f8e5m2"), ("f8e4m3fn", "f8e5m2"),
    ]  # fmt: skip


def operands(text):
    """Dtypes of what each convolution (a TPU's matrix product) of a program multiplies, sorted."""
    dtypes = dict(re.findall(r"(%[\w.-]+) = (\w+)\[", text))
    products = re.findall(r"convolution\((%[\w.-]+), (%[\w.-]+)\)", text)
    return sorted(tuple(sorted((dtypes[a], dtypes[b]))) for a, b in products)
