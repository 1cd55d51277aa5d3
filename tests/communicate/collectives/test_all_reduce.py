"""The mean of trees of leaves, exact and compressed; what it refuses."""

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


@pytest.mark.parametrize("codec", [pytest.param(None, marks=pytest.mark.slow), int8(16)])
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


def test_one_worker_says_nothing_and_loses_nothing():
    mesh = make_mesh({"data": 1}, devices=jax.devices()[:1])
    x = np.asarray(jax.random.normal(jax.random.key(0), (1, 50)))
    mean, rest = run(mesh, x, error_feedback(int8(16)), np.ones_like(x))
    np.testing.assert_array_equal(mean, x[0] + 1)
    assert not np.any(rest)


@pytest.mark.slow
def test_works_in_a_shard_map_without_varying_types(mesh):
    x = np.asarray(jax.random.normal(jax.random.key(0), (K, 50)))
    checked, _ = run(mesh, x, int8(16))
    unchecked, _ = run(mesh, x, int8(16), check_vma=False)
    np.testing.assert_array_equal(checked, unchecked)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_value_that_is_not_finite_reaches_the_exact_mean(mesh, bad):
    x = np.ones((K, 200), np.float32)
    x[2, 133] = bad
    mean, _ = run(mesh, x)
    assert not np.isfinite(mean[133])
    assert np.isfinite(mean[:133]).all()


def exact_operands(mesh, sizes, **where):
    """Sizes of the arrays in the all-reduces of an exact mean of leaves ``[K, 2, size / 2]``."""
    mapped = jax.shard_map(
        lambda x: all_reduce_mean(x, "data"), mesh=mesh, in_specs=P("data"), out_specs=P(), **where
    )
    x = [jax.ShapeDtypeStruct((K, 2, size // 2), jnp.float32) for size in sizes]
    found = collectives(jax.jit(mapped).lower(x).compile(), mesh)
    assert {c.kind for c in found} == {"all-reduce"}
    return sorted(n // 4 for c in found for n in c.operand_bytes)


def test_small_exact_leaves_travel_as_one_array(mesh):
    """Even in one all-reduce, each array of its own costs a message where Gloo sends it."""
    assert exact_operands(mesh, [100, 1 << 17, 300, 2]) == [402, 1 << 17]


def test_leaves_that_another_axis_may_divide_are_left_as_they_lie():
    mesh = make_mesh({"data": K, "model": 2})
    assert exact_operands(mesh, [100, 300], axis_names={"data"}) == [100, 300]


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
