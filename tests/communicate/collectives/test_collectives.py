"""Reduce-scatter, all-gather, all-to-all and broadcast against NumPy, with codecs and without."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jdml.communicate import (
    all_gather,
    all_to_all,
    broadcast,
    error_feedback,
    reduce_scatter_mean,
)
from jdml.communicate.codecs import int8, power_sgd, random_k
from jdml.sharding import collectives, make_mesh

K = 4
COLLECTIVES = {f.__name__: f for f in (all_gather, all_to_all, broadcast, reduce_scatter_mean)}
BLOCK = 8


def run(f, x, residual=None, shape=None, axis="data", check_vma=True):
    """``f(local, residual)`` on leaves ``[K, ...]``; results have a leading worker dim too."""
    mesh = make_mesh(shape or {"data": K}, devices=jax.devices()[:K])
    names = mesh.axis_names

    def body(x, residual):
        return jax.tree.map(lambda a: a[None], f(*jax.tree.map(lambda a: a[0], (x, residual))))

    mapped = jax.shard_map(
        body, mesh=mesh, in_specs=P(names), out_specs=P(names), check_vma=check_vma
    )
    return jax.tree.map(np.asarray, jax.jit(mapped)(x, residual))


def leaves(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "a": rng.standard_normal((K, 8, 3), np.float32),
        "b": rng.standard_normal((K, 4), np.float32),
        "half": rng.standard_normal((K, 4, 2, 4), np.float32).astype(jnp.bfloat16),
        "none": np.zeros((K, 4, 0), np.float32),
    }


def dense(name, x, dim=0):
    """What worker k holds after the exact collective on ``x``, ``[K, ...]`` f32."""
    parts = [np.split(worker, K, axis=dim) for worker in x]
    if name == "all_gather":
        return [np.concatenate(x, axis=dim)] * K
    if name == "all_to_all":
        return [np.concatenate([p[k] for p in parts], axis=dim) for k in range(K)]
    if name == "broadcast":
        return [x[2]] * K
    return [np.mean([p[k] for p in parts], axis=0) for k in range(K)]


def arguments(name, dim=0):
    if name == "broadcast":
        return {"root": 2}
    return {"split_dim": dim, "join_dim": dim} if name == "all_to_all" else {"dim": dim}


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("name", COLLECTIVES)
def test_exact_on_a_tree(name, check_vma):
    x = leaves()
    f = COLLECTIVES[name]
    out = run(lambda x, _: f(x, "data", **arguments(name)), x, check_vma=check_vma)
    for key, leaf in x.items():
        expected = dense(name, np.asarray(leaf, np.float32))
        assert out[key].dtype == leaf.dtype
        eps = 1e-6 if leaf.dtype == np.float32 else 1e-2  # bf16 means are rounded to bf16
        for got, want in zip(out[key], expected, strict=True):
            if name == "reduce_scatter_mean":
                np.testing.assert_allclose(np.asarray(got, np.float32), want, rtol=eps, atol=eps)
            else:
                np.testing.assert_array_equal(np.asarray(got, np.float32), want)


@pytest.mark.parametrize("name", COLLECTIVES)
def test_int8_is_within_its_bound_and_what_is_shared_is_equal(name):
    x = leaves()["a"]
    out = run(lambda x, _: COLLECTIVES[name](x, "data", int8(BLOCK), **arguments(name)), x)
    for got, want in zip(out, dense(name, x), strict=True):
        assert 0 < np.abs(got - want).max() <= np.abs(x).max() / 254 * 1.001
        if name in ("all_gather", "broadcast"):
            np.testing.assert_array_equal(got, out[0])


@pytest.mark.parametrize("name", COLLECTIVES)
def test_the_residual_is_what_was_not_said(name):
    """What arrives is ``x + e`` less the new residual, for a second round too."""
    x, codec = {"a": leaves()["a"], "b": leaves()["b"]}, error_feedback(int8(BLOCK))
    rest = jax.tree.map(np.zeros_like, x)
    if name == "broadcast":
        x = jax.tree.map(lambda a: np.broadcast_to(a[2], a.shape), x)  # only the root says anything
    for _ in range(2):
        said = jax.tree.map(np.add, x, rest)
        out, rest = run(
            lambda x, e: COLLECTIVES[name](x, "data", codec, residual=e, **arguments(name)), x, rest
        )
        for key in x:
            told = dense(name, said[key] - rest[key])
            np.testing.assert_allclose(out[key], np.stack(told), atol=1e-6)
        assert np.abs(rest["a"]).max() > 1e-3


def test_workers_draw_apart_and_keys_make_the_draw():
    x, codec = np.ones((K, 64), np.float32), random_k(0.25)

    def f(x, _):
        keys = [jax.random.key(i) for i in (0, 0, 1)]
        return [all_gather(x, "data", codec, key=key) for key in keys]

    first, again, other = run(f, x)
    np.testing.assert_array_equal(first, again)
    assert np.any(first != other)
    assert len({tuple(part) for part in first[0].reshape(K, -1)}) == K


@pytest.mark.parametrize("codec", [None, int8(1)])
@pytest.mark.parametrize("name", ["all_gather", "all_to_all", "reduce_scatter_mean"])
def test_any_dim(name, codec):
    x = np.random.default_rng(0).standard_normal((K, 2, 4, 8), np.float32)
    for dim in (1, 2):
        out = run(
            lambda x, _, dim=dim: COLLECTIVES[name](x, "data", codec, **arguments(name, dim)), x
        )
        np.testing.assert_allclose(out, np.stack(dense(name, x, dim)), rtol=2e-6, atol=1e-6)


def test_all_to_all_cuts_one_dim_and_joins_another():
    """As from heads to sequence and back."""
    x = np.random.default_rng(0).standard_normal((K, 2, 8, 3), np.float32)

    def there_and_back(x, _):
        there = all_to_all(x, "data", split_dim=1, join_dim=0)
        return there, all_to_all(there, "data", split_dim=0, join_dim=1)

    there, back = run(there_and_back, x)
    for k in range(K):
        np.testing.assert_array_equal(there[k], np.concatenate(x[:, :, 2 * k : 2 * k + 2]))
    np.testing.assert_array_equal(back, x)


@pytest.mark.parametrize("name", COLLECTIVES)
def test_several_axes_in_any_order(name):
    x = np.random.default_rng(0).standard_normal((K, 8), np.float32)
    shape, axis = {"a": 2, "b": 2}, ("b", "a")
    out = run(lambda x, _: COLLECTIVES[name](x, axis, **arguments(name)), x, shape=shape)
    order = [0, 2, 1, 3]  # b major, where the mesh has a major
    np.testing.assert_allclose(out[order], np.stack(dense(name, x[order])), atol=1e-6)


@pytest.mark.parametrize("size", [5, 40_000, 160_001])
@pytest.mark.parametrize("root", [0, 3])
def test_broadcast_down_the_tree_and_down_the_chain(size, root):
    """160,001 elements go in 16 pieces, the last one short; 40,000 in 4."""
    x = np.random.default_rng(0).standard_normal((K, size), np.float32)
    out = run(lambda x, _: broadcast(x, "data", root=root), x)
    np.testing.assert_array_equal(out, np.broadcast_to(x[root], x.shape))


@pytest.mark.parametrize("codec", [None, int8(BLOCK)])
@pytest.mark.parametrize("name", COLLECTIVES)
def test_small_leaves_share_a_message_and_bytes_stay_bytes(name, codec):
    x = [np.ones((K, 8, 1 + i), jnp.bfloat16) for i in range(5)]
    mesh = make_mesh({"data": K}, devices=jax.devices()[:K])
    mapped = jax.shard_map(
        lambda x: COLLECTIVES[name]([a[0] for a in x], "data", codec, **arguments(name)),
        mesh=mesh,
        in_specs=P("data"),
        out_specs=P("data") if name in ("all_to_all", "reduce_scatter_mean") else P(),
    )
    found = collectives(jax.jit(mapped).lower(x).compile(), mesh)
    assert len(found) == (2 if name == "broadcast" else 1)  # two levels of the tree
    sums = codec is None and name == "reduce_scatter_mean"
    assert {c.dtype for c in found} <= ({"f32"} if sums else {"u8", "s8"})


@pytest.mark.parametrize("codec", [None, int8(BLOCK)])
@pytest.mark.parametrize("name", COLLECTIVES)
def test_a_value_that_is_not_finite_arrives(name, codec):
    x = np.ones((K, 64), np.float32)
    x[2, 1] = np.nan
    out = run(lambda x, _: COLLECTIVES[name](x, "data", codec, **arguments(name)), x)
    assert np.isnan(out).any()
    assert np.isfinite(out).any()


@pytest.mark.parametrize("name", COLLECTIVES)
def test_a_lone_worker_keeps_what_it_has(name):
    f, x = COLLECTIVES[name], np.arange(6, dtype=np.float32).reshape(1, 6)
    mesh = make_mesh({"data": 1}, devices=jax.devices()[:1])
    mapped = jax.shard_map(
        lambda x, e: f(x[0], "data", error_feedback(int8()), residual=e[0]),
        mesh=mesh,
        in_specs=P("data"),
        out_specs=P("data"),
    )
    out, rest = jax.jit(mapped)(x, np.ones_like(x))
    np.testing.assert_array_equal(out, x[0] + 1)
    assert not np.any(rest)


@pytest.mark.parametrize("name", COLLECTIVES)
def test_refuses_what_cannot_work(name):
    f, x = COLLECTIVES[name], np.ones((K, 8), np.float32)

    def attempt(x, *args, residual=None, **kwargs):
        return run(lambda x, e: f(x, "data", *args, residual=e, **kwargs), x, residual)

    with pytest.raises(ValueError, match=f"{name}: leaf 'a' has dtype int32"):
        attempt({"a": x.astype(np.int32)})
    with pytest.raises(ValueError, match="dtype complex64"):
        attempt(x.astype(np.complex64))
    with pytest.raises(ValueError, match="forget to call"):
        attempt(x, int8)
    with pytest.raises(ValueError, match=r"means of its own.*such as int8\(\)"):
        attempt(x, power_sgd(2))
    with pytest.raises(ValueError, match="pass key="):
        attempt(x, random_k(0.5))
    with pytest.raises(ValueError, match="needs residual="):
        attempt(x, error_feedback(int8()))
    with pytest.raises(ValueError, match="only with codec=error_feedback"):
        attempt(x, int8(), residual=x)
    with pytest.raises(ValueError, match="'model' is not bound"):
        f(jnp.ones(4), "model")
    with pytest.raises(ValueError, match="tuple of different names"):
        f(jnp.ones(4), ("data", "data"))


def test_refuses_dims_and_roots_that_are_not_there():
    with pytest.raises(ValueError, match=r"shape \(6,\) cannot be cut along dim 0 .* 4 workers"):
        run(lambda x, _: reduce_scatter_mean(x, "data"), np.ones((K, 6), np.float32))
    with pytest.raises(ValueError, match=r"no dim 2; choose one below 2"):
        run(lambda x, _: all_gather(x, "data", dim=2), np.ones((K, 4, 4), np.float32))
    with pytest.raises(ValueError, match="reshape it to"):
        run(lambda x, _: all_gather(x, "data"), np.ones(K, np.float32))
    with pytest.raises(ValueError, match="has workers 0 to 3"):
        run(lambda x, _: broadcast(x, "data", root=4), np.ones((K, 4), np.float32))
