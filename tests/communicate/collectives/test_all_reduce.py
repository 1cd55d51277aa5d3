"""The compressed mean against a dense reference in NumPy, and the bytes in the compiled program."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jdml.communicate import all_reduce_mean, error_feedback
from jdml.communicate.codecs import int8
from jdml.sharding import collectives, make_mesh

K = 4


@pytest.fixture(scope="module")
def mesh():
    return make_mesh({"data": K}, devices=jax.devices()[:K])


def run(mesh, x, codec=None, residual=None, check_vma=True):
    """``all_reduce_mean`` of a tree whose leaves have a leading worker dim."""

    def body(x, residual):
        local = jax.tree.map(lambda a: a[0], (x, residual))
        out = all_reduce_mean(local[0], "data", codec, residual=local[1])
        mean, rest = out if residual is not None else (out, None)
        return mean, jax.tree.map(lambda a: a[None], rest)

    out_specs = (P(), P("data"))
    f = jax.shard_map(body, mesh=mesh, in_specs=P("data"), out_specs=out_specs, check_vma=check_vma)
    return jax.jit(f)(x, residual)


def reference(x, residual, block, two_sided):
    """Two-phase int8 mean of ``[K, size]`` with its residual, worker by worker."""

    def quantise(row):
        blocks = row.reshape(-1, block)
        scale = np.abs(blocks).max(1, keepdims=True) / np.float32(127)
        inverse = np.where(scale > 0, 1 / np.where(scale > 0, scale, 1), 0).astype(np.float32)
        return (np.round(blocks * inverse).astype(np.int8) * scale).reshape(-1)

    size = x.shape[1]
    p = np.pad(x + residual, ((0, 0), (0, -size % (K * block)))).reshape(K, K, -1)
    mean, error = np.zeros_like(p[0]), np.zeros_like(p)
    for owner in range(K):
        shares = []
        for worker in range(K):
            sent = p[worker, owner] if worker == owner else quantise(p[worker, owner])
            error[worker, owner] = p[worker, owner] - sent
            shares.append(sent)
        chunk = np.mean(shares, axis=0, dtype=np.float32)
        mean[owner] = quantise(chunk)
        if two_sided:
            error[owner, owner] = K * (chunk - mean[owner])
    return mean.reshape(-1)[:size], error.reshape(K, -1)[:, :size]


@pytest.mark.parametrize("two_sided", [True, False])
@pytest.mark.parametrize("size", [1, 7, 64, 1001])
def test_int8_equals_the_dense_reference(mesh, size, two_sided):
    x, e = np.asarray(jax.random.normal(jax.random.key(size), (2, K, size)))
    mean, rest = run(mesh, x, error_feedback(int8(16), two_sided), e)
    expected_mean, expected_rest = reference(x, e, 16, two_sided)
    np.testing.assert_allclose(mean, expected_mean, atol=2e-6)
    np.testing.assert_allclose(rest, expected_rest, atol=1e-5)


def test_two_sided_residuals_sum_to_what_the_mean_still_owes(mesh):
    x = np.asarray(jax.random.normal(jax.random.key(0), (K, 1001)))
    mean, rest = run(mesh, x, error_feedback(int8(16)), np.zeros_like(x))
    np.testing.assert_allclose(np.mean(rest, axis=0), x.mean(0) - mean, atol=1e-6)


def test_error_feedback_pays_its_debt_over_rounds(mesh):
    """The sum of T means differs from the sum of exact ones by one residual, not by T errors."""
    x = np.asarray(jax.random.normal(jax.random.key(3), (K, 256)))
    e, total = np.zeros_like(x), 0
    for _ in range(20):
        mean, e = run(mesh, x, error_feedback(int8(256)), e)
        total = total + np.asarray(mean)
    np.testing.assert_allclose(total + np.mean(e, axis=0), 20 * x.mean(0), atol=1e-4)


@pytest.mark.parametrize("codec", [None, int8(16)])
def test_any_leaf_shape_and_dtype(mesh, codec):
    keys = iter(jax.random.split(jax.random.key(1), 6))
    x = {
        "scalar": jax.random.normal(next(keys), (K,)),
        "empty": jnp.zeros((K, 0, 3)),
        "odd": jax.random.normal(next(keys), (K, 3, 5, 7)),
        "block": jax.random.normal(next(keys), (K, 16 * K)),
        "bf16": jax.random.normal(next(keys), (K, 33), jnp.bfloat16),
        "f16": jax.random.normal(next(keys), (K, 9)).astype(jnp.float16),
        "large": jax.random.normal(next(keys), (K, (1 << 20) + 1)),
    }
    mean, _ = run(mesh, x, codec)
    for name, leaf in x.items():
        assert mean[name].shape == leaf.shape[1:], name
        assert mean[name].dtype == leaf.dtype, name
        exact = np.asarray(leaf, np.float32).mean(0)
        # Two roundings to 1/254 of the block's largest, besides the dtype's own.
        bound = 0 if codec is None else 2 * np.abs(leaf).max(initial=0) / 254
        bound += 4 * float(jnp.finfo(leaf.dtype).eps)
        assert np.abs(np.asarray(mean[name], np.float32) - exact).max(initial=0) <= bound, name


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("codec", [None, int8(16), error_feedback(int8(16))])
def test_a_value_that_is_not_finite_reaches_the_mean(mesh, codec, bad):
    x = np.ones((K, 200), np.float32)
    x[2, 133] = bad
    residual = np.zeros_like(x) if codec == error_feedback(int8(16)) else None
    mean, rest = run(mesh, x, codec, residual)
    assert not np.isfinite(mean[133])
    assert np.isfinite(mean[:100]).all()
    if residual is not None:
        assert np.isfinite(rest).all()


def test_one_worker_says_nothing_and_loses_nothing():
    mesh = make_mesh({"data": 1}, devices=jax.devices()[:1])
    x = np.asarray(jax.random.normal(jax.random.key(0), (1, 50)))
    mean, rest = run(mesh, x, error_feedback(int8(16)), np.ones_like(x))
    np.testing.assert_array_equal(mean, x[0] + 1)
    assert not np.any(rest)


def test_works_in_a_shard_map_without_varying_types(mesh):
    x = np.asarray(jax.random.normal(jax.random.key(0), (K, 50)))
    checked, _ = run(mesh, x, int8(16))
    unchecked, _ = run(mesh, x, int8(16), check_vma=False)
    np.testing.assert_array_equal(checked, unchecked)


def test_the_wire_carries_bytes_and_as_many_as_stated(mesh):
    size, codec = 1000, int8(16)
    mapped = jax.shard_map(
        lambda x: all_reduce_mean(x[0], "data", codec), mesh=mesh, in_specs=P("data"), out_specs=P()
    )
    compiled = jax.jit(mapped).lower(jax.ShapeDtypeStruct((K, size), jnp.float32)).compile()
    found = collectives(compiled, mesh)
    assert sorted(c.kind for c in found) == ["all-gather", "all-to-all"]
    for c in found:
        assert c.axes == ("data",)
        assert set(c.dtypes) <= {"u8", "s8"}
    chunk = codec.payload_bytes(-(-size // (K * 16)) * 16)
    assert sum(c.sent_bytes for c in found) == 2 * (K - 1) * chunk


def test_refuses_what_cannot_work(mesh):
    x = np.ones((K, 8), np.float32)
    with pytest.raises(ValueError, match="leaf 'a' has dtype int32"):
        run(mesh, {"a": x.astype(np.int32)})
    with pytest.raises(ValueError, match="dtype complex64"):
        run(mesh, x.astype(np.complex64))
    with pytest.raises(ValueError, match="forget to call"):
        run(mesh, x, int8)
    with pytest.raises(ValueError, match="needs residual="):
        run(mesh, x, error_feedback(int8()))
    with pytest.raises(ValueError, match="only with codec=error_feedback"):
        run(mesh, x, int8(), x)
    with pytest.raises(ValueError, match="'model' is not bound"):
        all_reduce_mean(jnp.ones(3), "model")
    with pytest.raises(ValueError, match="not one of"):
        all_reduce_mean(jnp.ones(3), "data", topology="star")
    with pytest.raises(ValueError, match="expected a codec"):
        error_feedback(None)
