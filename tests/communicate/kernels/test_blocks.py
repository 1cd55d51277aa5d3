"""The fused kernel in interpret mode against the plain form, bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jdml.communicate.codecs import e3m0, fp8, int2, int4, int8, one_bit, qsgd, terngrad
from jdml.communicate.kernels.blocks import encode_blocks, fits
from jdml.communicate.kernels.here import kernels_run_here, traced_for_tpu
from jdml.sharding import make_mesh

CODECS = {
    "int8": (int8(256), 300),  # the last tile is not full
    "int8, long blocks": (int8(1024), 128),
    "int4": (int4(128), 512),
    "int2": (int2(128), 512),
    "fp8": (fp8(), 128),
    "fp8, e5m2": (fp8("e5m2"), 128),
    "e3m0": (e3m0(128), 256),
}


def hard_blocks(num_rows, n, block):
    """Blocks of every size, some of subnormal numbers, some of none, some not finite."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((num_rows, n, block)) * 10.0 ** rng.integers(-44, 38, (num_rows, n, 1))
    with np.errstate(over="ignore"):
        x = x.astype(np.float32)
    x[0, 0] = 0
    x[0, 1, 3], x[0, 2, 5], x[1, 3, 7] = np.nan, np.inf, -np.inf
    x[1, 4, :2] = np.finfo(np.float32).max, -np.finfo(np.float32).max
    x[1, 5, :2] = 2.0**-149, -(2.0**-149)
    x[0, 6] = np.arange(block)  # ties
    return x


def kernel(codec, blocks):
    return encode_blocks(blocks, codec.width, codec._codes_of, interpret=True)


@pytest.mark.parametrize("name", CODECS)
def test_equals_the_plain_form_bit_for_bit(name):
    codec, n = CODECS[name]
    assert codec.fused
    x = hard_blocks(2, n, codec.block)

    @jax.jit
    def fused(x):
        codes, largest = kernel(codec, x)
        return codes, largest, codec.of_largest(largest)

    codes, largest, sent = fused(x)
    plain = dict(jax.jit(codec.encode_rows)(x.reshape(2, -1)))
    plain_codes = plain.pop("codes")
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(bits, sent), jax.tree.map(bits, plain))
    finite = np.isfinite(largest)
    assert finite.sum() == finite.size - np.count_nonzero(~np.isfinite(x).all(-1))
    # The codes of a block that is not finite mean nothing.
    means = finite.reshape(2, 8 // codec.width, -1).all(1)
    np.testing.assert_array_equal(np.asarray(codes)[means], np.asarray(plain_codes)[means])


def bits(x):
    x = np.asarray(x)
    return x.view(np.int32) if x.dtype == np.float32 else x


def test_in_a_region_inside_another_as_exchanges_call_it():
    """Manual over the workers outside, over the other axes inside: there a kernel may be called."""
    mesh = make_mesh({"data": 2, "model": 2}, devices=jax.devices()[:4])
    codec = int8(128)
    x = hard_blocks(2, 2 * 128, 128)

    def outer(x):
        inner = jax.shard_map(
            lambda x: kernel(codec, x), in_specs=P(None, "model"), out_specs=P(None, "model"),
            axis_names={"model"}, check_vma=False,
        )  # fmt: skip
        return jax.tree.map(lambda a: a[None], inner(x[0]))

    mapped = jax.shard_map(
        outer, mesh=mesh, in_specs=P("data"), out_specs=P("data"), axis_names={"data"},
        check_vma=False,  # JAX's interpreter of kernels loses types; compiled, they are checked
    )  # fmt: skip
    codes, largest = jax.jit(mapped)(np.stack([x, -x]))
    for sign, got, scales in zip((1, -1), codes, largest, strict=True):
        plain = codec.encode_rows(sign * x.reshape(2, -1))
        np.testing.assert_array_equal(bits(scales), bits(plain["largest"]))
        finite = np.isfinite(plain["largest"])
        np.testing.assert_array_equal(np.asarray(got)[finite], np.asarray(plain["codes"])[finite])


def test_takes_no_codec_that_draws_or_measures_more():
    assert not int8(rounding="stochastic").fused
    assert not int8(scaling="two_sided").fused
    assert not any(codec.fused for codec in (one_bit(), terngrad(), qsgd(4)))


@pytest.mark.parametrize(
    ("shape", "width", "expected"),
    [
        ((4, 1024, 256), 8, True),
        ((4, 1001, 256), 8, True),
        ((4, 1024, 128), 4, True),
        ((4, 1001, 128), 4, False),  # two runs of whole registers' rows
        ((4, 1024, 100), 8, False),
        ((4, 1024, 1 << 14), 8, False),  # 128 blocks do not fit the memory
        ((4, 16, 256), 8, False),  # too few
    ],
)
def test_what_fits(shape, width, expected):
    assert fits(shape, width) == expected


def test_is_never_chosen_off_tpu():
    assert not traced_for_tpu()
    mesh = make_mesh({"data": 4}, devices=jax.devices()[:4])
    chosen = []

    def body(x):
        chosen.append(kernels_run_here())
        return int8().encode_rows(x)

    x = jax.ShapeDtypeStruct((4, 1 << 18), jnp.float32)
    program = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=P("data"), out_specs=P("data")))
    assert "pallas" not in str(program.trace(x).jaxpr)
    assert chosen == [False]
