"""PowerSGD against a dense reference in NumPy, in its limit cases, and its bytes on the wire."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from jdml.aggregate import average_params, mean_gradients
from jdml.communicate import all_reduce_mean
from jdml.communicate.codecs import power_sgd
from jdml.sharding import collectives, make_mesh
from jdml.train import make_step
from tests.aggregate.optimiser_references import drawn, low_rank_round
from tests.train.problems import make_batch, pytree_problem

K = 4


@pytest.fixture(scope="module")
def mesh():
    return make_mesh({"data": K}, devices=jax.devices()[:K])


def gaussian(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def of_rank(rank, *shape, seed=0):
    """``[*stack, n, m]`` of this rank."""
    *stack, n, m = shape
    return gaussian(*stack, n, rank, seed=seed) @ gaussian(*stack, rank, m, seed=seed + 100)


def first_state(codec, tree):
    """The state before the first round, residuals with a worker dim."""
    state = codec.init(jax.tree.map(lambda x: jnp.asarray(x)[0], tree))
    return state._replace(
        residual=jax.tree.map(lambda e: np.zeros((K, *e.shape), np.float32), state.residual)
    )


@functools.cache
def compiled_round(mesh, codec, treedef):
    """One program for all rounds of a codec on trees of one structure."""

    def body(tree, state, key):
        tree, residual = jax.tree.map(lambda a: a[0], (tree, state.residual))
        state = state._replace(residual=residual)
        mean, state = all_reduce_mean(tree, "data", codec, residual=state, key=key)
        return mean, state._replace(residual=jax.tree.map(lambda a: a[None], state.residual))

    leaves = jax.tree.unflatten(treedef, range(treedef.num_leaves))
    specs = jax.tree.map(lambda _: P(), leaves)
    specs = specs._replace(residual=jax.tree.map(lambda _: P("data"), leaves.residual))
    return jax.jit(
        jax.shard_map(body, mesh=mesh, in_specs=(P("data"), specs, P()), out_specs=(P(), specs))
    )


def rounds(mesh, codec, trees, state=None, key=None):
    """Means and states of one round per tree; leaves have a leading worker dim."""
    state = first_state(codec, trees[0]) if state is None else state
    f = compiled_round(mesh, codec, jax.tree.structure(state))
    out = []
    for i, tree in enumerate(trees):
        mean, state = f(tree, state, None if key is None else jax.random.fold_in(key, i))
        out.append((jax.tree.map(np.asarray, mean), jax.tree.map(np.asarray, state)))
    return out


def relative(x, y):
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    return np.linalg.norm(x - y) / np.linalg.norm(y)


@pytest.mark.parametrize("warm_start", [True, False])
def test_equals_the_dense_reference(mesh, warm_start):
    n, m, r = 12, 20, 3
    codec = power_sgd(r, warm_start, min_ratio=1)
    xs = [gaussian(K, n, m, seed=i) for i in range(4)]
    found = rounds(mesh, codec, [{"w": x} for x in xs], key=jax.random.key(5))
    owed, q = np.zeros((K, n, m)), np.zeros((m, r))
    for i, (x, (mean, state)) in enumerate(zip(xs, found, strict=True)):
        key = jax.random.fold_in(jax.random.key(0 if warm_start else 5), i)
        (fresh,) = drawn(key, [(n, m)], r)
        d, owed, q = low_rank_round(x, owed, q if warm_start else np.zeros((m, r)), fresh)
        assert relative(mean["w"], d) < 1e-5
        assert relative(state.residual["w"], owed) < 1e-5
        if warm_start:
            assert relative(state.factors["w"], q.T) < 1e-5


def test_residuals_pay_their_debt(mesh):
    """Means so far and the residuals' mean make the sum of the exact means."""
    xs = [gaussian(K, 16, 24, seed=i) for i in range(6)]
    found = rounds(mesh, power_sgd(2), [{"w": x} for x in xs])
    total = 0
    for i, (mean, state) in enumerate(found):
        total = total + mean["w"]
        exact = np.sum([x.mean(0) for x in xs[: i + 1]], axis=0)
        np.testing.assert_allclose(total + state.residual["w"].mean(0), exact, atol=2e-5)
    assert state.residual["w"].any()


@pytest.mark.parametrize("warm_start", [True, False])
def test_a_mean_of_low_rank_is_exact(mesh, warm_start):
    """It is the mean's rank that counts: each worker's matrix has any."""
    noise = gaussian(K, 16, 24, seed=1)
    x = of_rank(3, 16, 24) + noise - noise.mean(0)
    ((mean, state),) = rounds(mesh, power_sgd(4, warm_start), [{"w": x}], key=jax.random.key(0))
    assert relative(mean["w"], x.mean(0)) < 1e-5
    assert np.abs(state.residual["w"].mean(0)).max() < 1e-5 * np.abs(x).max()


@pytest.mark.parametrize(
    "shape", [(8, 20), *(pytest.param(s, marks=pytest.mark.slow) for s in [(20, 8), (8, 8)])]
)
def test_full_rank_is_the_exact_mean(mesh, shape):
    x = gaussian(K, *shape)
    ((mean, _),) = rounds(mesh, power_sgd(8, min_ratio=0), [{"w": x}])
    np.testing.assert_allclose(mean["w"], x.mean(0), atol=2e-5)


def test_power_iteration_goes_on_from_round_to_round(mesh):
    """Warm rounds on one matrix approach its best approximation; cold ones do not."""
    turn, _ = np.linalg.qr(gaussian(32, 32))
    values = 0.9 ** np.arange(32)
    matrix = (turn * values) @ np.linalg.qr(gaussian(32, 32, seed=1))[0]
    x = {"w": np.repeat(matrix[None].astype(np.float32), K, 0)}
    best = np.sqrt((values[2:] ** 2).sum() / (values**2).sum())

    def error(warm_start, num_rounds):
        state = first_state(power_sgd(2, warm_start), x)
        for i in range(num_rounds):
            key = jax.random.key(i)
            ((mean, after),) = rounds(mesh, power_sgd(2, warm_start), [x], state, key)
            state = after._replace(residual=state.residual)
        return relative(mean["w"], matrix)

    assert error(True, 1) > 1.05 * best
    assert error(True, 30) < 1.001 * best
    assert error(False, 3) > 1.05 * best


def test_any_leaf_shape_and_dtype(mesh):
    x = {
        "scalar": gaussian(K),
        "empty": np.zeros((K, 0, 3), np.float32),
        "bias": gaussian(K, 40),
        "small": gaussian(K, 4, 5),
        "bf16": jnp.asarray(of_rank(2, 32, 40) + np.zeros((K, 1, 1)), jnp.bfloat16),
        "f16": of_rank(2, 24, 40).astype(np.float16) + np.zeros((K, 1, 1), np.float16),
        "conv": of_rank(2, 36, 40).reshape(3, 3, 4, 40) + gaussian(K, 1, 1, 1, 1),
        "large": gaussian(K, (1 << 20) + 1),
    }
    ((mean, state),) = rounds(mesh, power_sgd(3), [x])
    for name, leaf in x.items():
        exact = np.asarray(leaf, np.float32).mean(0)
        assert mean[name].shape == leaf.shape[1:], name
        assert mean[name].dtype == leaf.dtype, name
        atol = 2 * float(jnp.finfo(leaf.dtype).eps) * np.abs(exact).max(initial=0)
        atol = max(atol, 1e-5)
        np.testing.assert_allclose(np.asarray(mean[name], np.float32), exact, atol=atol)
    # The rounding of a mean to its dtype is owed too.
    owed = np.asarray(x["bf16"], np.float32).mean(0) - np.asarray(mean["bf16"], np.float32)
    np.testing.assert_allclose(state.residual["bf16"].mean(0), owed, atol=1e-5)
    assert jax.tree.structure(state.factors) == jax.tree.structure(state.residual)
    assert {k for k, v in state.residual.items() if len(v)} == {"bf16", "f16", "conv"}


@pytest.mark.parametrize(
    ("path", "shape", "view"),
    [
        ("w", (64, 96), (1, 64, 96)),
        ("attention/query", (64, 4, 32), (1, 64, 128)),
        ("attention/out", (4, 32, 64), (1, 128, 64)),
        ("conv", (3, 3, 64, 128), (1, 576, 128)),
        ("layers/up", (6, 64, 96), (6, 64, 96)),
        ("layers/attention/out", (6, 4, 32, 64), (6, 128, 64)),
        ("layers/0/up", (64, 96), (1, 64, 96)),
        ("layers/norm", (600, 64), None),
        ("bias", (4096,), None),
        ("small", (16, 16), None),
        ("scalar", (), None),
        ("empty", (0, 64, 64), None),
    ],
)
def test_leaves_are_seen_as_matrices(path, shape, view):
    found = power_sgd(4).view(path, jax.ShapeDtypeStruct(shape, jnp.float32))
    assert view == (found and (found.num_matrices, found.num_rows, found.num_columns))


def test_compresses_only_what_it_makes_shorter_by_min_ratio():
    leaf = jax.ShapeDtypeStruct((16, 48), jnp.float32)  # (16 + 48) · 4 = 256 of 768
    assert power_sgd(4, min_ratio=2.99).view("w", leaf)
    assert not power_sgd(4, min_ratio=3.0).view("w", leaf)


def test_stacked_matrices_have_factors_of_their_own(mesh):
    x = {"layers": {"w": of_rank(2, 3, 24, 32)[None] + np.zeros((K, 1, 1, 1), np.float32)}}
    ((mean, state),) = rounds(mesh, power_sgd(2), [x])
    assert relative(mean["layers"]["w"], x["layers"]["w"][0]) < 1e-5
    assert state.factors["layers"]["w"].shape == (3, 2, 32)


@pytest.mark.slow
def test_recovers_after_gradients_of_zeros_and_of_low_rank(mesh):
    zeros = np.zeros((K, 24, 32), np.float32)
    one, four = (of_rank(r, 24, 32, seed=r) + zeros for r in (1, 4))
    found = rounds(mesh, power_sgd(4), [{"w": x} for x in (zeros, zeros, four, one, one, four)])
    for (mean, state), x in zip(found, (zeros, zeros, four, one, one, four), strict=True):
        assert np.isfinite(state.factors["w"]).all()
        # Directions that the factors had lost come back from the 0.1 % that is drawn anew, known
        # to f32's rounding over that.
        assert np.linalg.norm(mean["w"] - x[0]) <= 1e-3 * np.linalg.norm(x[0])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_reaches_the_mean_and_is_not_kept(mesh, bad):
    x = of_rank(2, 24, 32) + np.zeros((K, 1, 1), np.float32)
    broken = x.copy()
    broken[1, 3, 5] = bad
    other = gaussian(K, 24, 32)
    trees = [{"w": w, "x": other} for w in (x, broken, x, x)]
    (_, (mean, state), (after, _), _) = rounds(mesh, power_sgd(2), trees)
    assert not np.isfinite(mean["w"]).any()
    assert np.isfinite(mean["x"]).all()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
    np.testing.assert_allclose(after["w"], x[0], atol=1e-4)


@pytest.mark.parametrize("scale", [1e35, 1e-30])
def test_any_scale(mesh, scale):
    x = gaussian(K, 24, 32)
    ((mean, _),) = rounds(mesh, power_sgd(2), [{"w": x}])
    ((scaled, _),) = rounds(mesh, power_sgd(2), [{"w": x * np.float32(scale)}])
    assert relative(scaled["w"].astype(np.float64) / scale, mean["w"]) < 1e-4


def test_one_worker_says_nothing_and_loses_nothing():
    mesh = make_mesh({"data": 1}, devices=jax.devices()[:1])
    x = {"w": gaussian(1, 24, 32), "b": gaussian(1, 5)}
    codec = power_sgd(2)
    state = codec.init(jax.tree.map(lambda a: jnp.asarray(a)[0], x))
    state = state._replace(residual={"w": np.ones((1, 24, 32), np.float32), "b": ()})
    ((mean, state),) = rounds(mesh, codec, [x], state)
    np.testing.assert_array_equal(mean["w"], x["w"][0] + 1)
    np.testing.assert_array_equal(mean["b"], x["b"][0])
    assert not state.residual["w"].any()


@pytest.mark.slow
def test_a_round_may_stand_alone(mesh):
    x = of_rank(2, 24, 32) + np.zeros((K, 1, 1), np.float32)
    f = jax.shard_map(
        lambda x: all_reduce_mean(x[0], "data", power_sgd(2)),
        mesh=mesh,
        in_specs=P("data"),
        out_specs=P(),
    )
    np.testing.assert_allclose(jax.jit(f)(x), x[0], atol=1e-4)
    unchecked = jax.shard_map(
        lambda x: all_reduce_mean(x[0], "data", power_sgd(2)),
        mesh=mesh,
        in_specs=P("data"),
        out_specs=P(),
        check_vma=False,
    )
    np.testing.assert_array_equal(jax.jit(unchecked)(x), jax.jit(f)(x))


@pytest.mark.slow
def test_workers_on_two_axes_and_shards_of_the_users_own():
    """A leaf that is not divided over a manual axis stays equal along it; a shard is a matrix."""
    mesh = make_mesh({"group": 2, "member": 2, "model": 2})
    x = {"whole": gaussian(K, 24, 32), "divided": of_rank(2, 24, 64) + np.zeros((K, 1, 1))}
    x = jax.tree.map(lambda a: np.float32(a).reshape(2, 2, *a.shape[1:]), x)
    workers, codec = ("group", "member"), power_sgd(2)

    def body(x):
        return all_reduce_mean(jax.tree.map(lambda a: a[0, 0], x), workers, codec)

    f = jax.shard_map(
        body,
        mesh=mesh,
        in_specs=({"whole": P(*workers), "divided": P(*workers, None, "model")},),
        out_specs={"whole": P(), "divided": P(None, "model")},
    )
    mean = jax.jit(f)(x)
    assert relative(mean["divided"], x["divided"][0, 0]) < 1e-5
    ((expected, _),) = rounds(
        make_mesh({"data": K}, devices=jax.devices()[:K]),
        codec,
        [{"a": np.zeros((K, 24, 32), np.float32), "whole": x["whole"].reshape(K, 24, 32)}],
    )
    assert relative(mean["whole"], expected["whole"]) < 1e-5


def test_starts_exact(mesh):
    xs = [gaussian(K, 16, 24, seed=i) for i in range(4)]
    found = rounds(mesh, power_sgd(2, start_step=2), [{"w": x} for x in xs])
    plain = rounds(mesh, power_sgd(2), [{"w": x} for x in xs[2:]])
    for x, (mean, state) in zip(xs[:2], found[:2], strict=True):
        np.testing.assert_allclose(mean["w"], x.mean(0), atol=1e-6)
        assert not state.residual["w"].any()
    assert relative(found[2][0]["w"], xs[2].mean(0)) > 0.1
    assert relative(found[2][0]["w"], plain[0][0]["w"]) > 0  # another random start
    assert found[3][1].residual["w"].any()


def compiled_step(shape, tx):
    num_devices = int(np.prod(list(shape.values())))
    mesh = make_mesh(shape, devices=jax.devices()[:num_devices])
    problem = pytree_problem(mesh)
    init, step = make_step(problem.loss_fn, tx, mesh, specs=problem.specs)
    state = init.abstract(problem.params)
    return mesh, state, step.lower(state, make_batch(0)).compile()


def of_kind(found, axis):
    return [c for c in found if c.axes == (axis,)]


def test_the_wire_carries_two_factors_of_each_matrix(mesh):
    codec = power_sgd(4)
    shapes = {"w": (64, 96), "layers": {"up": (3, 32, 64)}, "bias": (96,)}
    tree = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s, jnp.float32), shapes, is_leaf=lambda s: type(s) is tuple
    )
    x = jax.tree.map(lambda s: jax.ShapeDtypeStruct((K, *s.shape), s.dtype), tree)
    f = jax.shard_map(
        lambda x: all_reduce_mean(jax.tree.map(lambda a: a[0], x), "data", codec),
        mesh=mesh,
        in_specs=P("data"),
        out_specs=P(),
    )
    found = collectives(jax.jit(f).lower(x).compile(), mesh)
    assert [c.kind for c in found] == ["all-reduce"] * 2
    assert all(c.axes == ("data",) and c.dtype == "f32" for c in found)
    numbers = 4 * (64 + 96) + 3 * 4 * (32 + 64) + 96
    assert sum(c.payload_bytes for c in found) == 4 * numbers
    assert codec.num_elements(tree) == numbers


@pytest.mark.slow
def test_sends_as_little_where_leaves_are_divided_and_gathers_none():
    """Over the model axis thin factors are summed; over the workers', a device's part of them."""
    tx = optax.chain(mean_gradients("data", power_sgd(1, min_ratio=1)), optax.sgd(0.1))
    exact = optax.chain(mean_gradients("data"), optax.sgd(0.1))
    shape = {"data": 4, "model": 2}
    mesh, _, compiled = compiled_step(shape, tx)
    found = collectives(compiled, mesh)
    before = collectives(compiled_step(shape, exact)[-1], mesh)
    gradients = [c for c in of_kind(found, "data") if c.payload_bytes > 8]
    assert [c.kind for c in gradients] == ["all-reduce"] * 2
    # in/kernel 8 × (16), out/kernel (16) × 4, the bias of (16) and the scale; in brackets what
    # the model axis divides. The loss and its metric are means of one number each.
    numbers = (8 + 8) + (8 + 4) + 8 + 1
    assert sum(c.payload_bytes for c in of_kind(found, "data")) <= 4 * (numbers + 2)
    largest_part = 4 * 8 * 8
    added = of_kind(found, "model")[len(of_kind(before, "model")) :]
    assert added
    assert all(c.payload_bytes < largest_part / 2 for c in added)
    assert not {c.axes for c in found} - {("data",), ("model",)}


@pytest.mark.parametrize(
    "name", ["mean_gradients", pytest.param("average_params", marks=pytest.mark.slow)]
)
def test_only_the_residual_is_per_worker(name):
    codec = power_sgd(1, min_ratio=1)
    tx = {
        "mean_gradients": optax.chain(mean_gradients("data", codec), optax.sgd(0.1)),
        "average_params": optax.chain(optax.sgd(0.1), average_params("data", 2, codec=codec)),
    }[name]
    _, state, _ = compiled_step({"data": 4}, tx)
    paths = {
        jax.tree_util.keystr(path): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state)
    }
    factors = [shape for path, shape in paths.items() if ".factors" in path]
    residuals = [shape for path, shape in paths.items() if ".residual.residual" in path]
    assert factors == [(1, 16), (1, 4)]
    assert residuals == [(4, 8, 16), (4, 16, 4)]


def test_refuses_what_cannot_work(mesh):
    for bad in (0, -1, 2.0, True, "4"):
        with pytest.raises(ValueError, match="rank="):
            power_sgd(bad)
    for bad in (-1, float("inf"), float("nan"), "2"):
        with pytest.raises(ValueError, match="min_ratio="):
            power_sgd(2, min_ratio=bad)
    for bad in (-1, 0.5):
        with pytest.raises(ValueError, match="start_step="):
            power_sgd(2, start_step=bad)
    with pytest.raises(ValueError, match="stacked="):
        power_sgd(2, stacked=["layers/up"])
    tree = {"layer": {"w": jnp.ones((4, 64))}}
    with pytest.raises(
        ValueError, match=r"leaf 'layer/w' \[4, 64\] is taken as 4 × 64, whose rank"
    ):
        power_sgd(5, min_ratio=0).init(tree)
    power_sgd(5).init(tree)  # travels exactly
    with pytest.raises(ValueError, match="draws random numbers"):
        rounds(mesh, power_sgd(2, warm_start=False), [{"w": gaussian(K, 24, 32)}])
    with pytest.raises(ValueError, match="dtype int32"):
        rounds(mesh, power_sgd(2), [{"w": np.ones((K, 24, 32), np.int32)}])


def test_is_a_value():
    assert power_sgd(4) == power_sgd(4, stacked="layers")
    assert hash(power_sgd(4)) == hash(power_sgd(4))
    assert power_sgd(4) != power_sgd(4, warm_start=False)
