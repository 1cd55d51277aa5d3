"""Every topology: equal results everywhere, exact without a codec, and errors that add up."""

import functools

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jdml.communicate import Wire, all_reduce_mean, error_feedback, on_shards
from jdml.communicate.codecs import int4, int8, power_sgd, top_k
from jdml.communicate.collectives.all_reduce import TOPOLOGIES
from jdml.sharding import collectives, make_mesh
from tests.marks import slow

CODECS = {
    "int8": int8(16),
    "stochastic": int4(8, rounding="stochastic"),
    "top_k": top_k(0.1, values=int8(8)),
}
SHAPES = {2: (2, 1), 3: (3, 1), 4: (2, 2), 8: (4, 2)}
"""Workers along the slow and the fast axis, for the topology that tells them apart."""
SIZE = 93
"""Of the leaf with which several tests share one compiled program."""


@functools.cache
def compiled(topology, codec, num_workers, feedback, shape=None, axes=None):
    """A jitted ``(x, residual, key) -> (mean, residual)`` on leaves ``[K, ...]``."""
    if axes is None:
        shape, axes = (num_workers,), ("data",)
        if topology == "hierarchical":
            shape, axes = SHAPES[num_workers], ("slow", "fast")
        mesh = make_mesh(dict(zip(axes, shape, strict=True)), devices=jax.devices()[:num_workers])
    else:
        mesh = make_mesh(dict(shape), devices=jax.devices()[:num_workers])

    def body(x, residual, key):
        local, owed = jax.tree.map(lambda a: a[0], (x, residual))
        axis = axes if len(axes) > 1 else axes[0]
        out = all_reduce_mean(local, axis, codec, topology, key=key, residual=owed)
        mean, rest = out if feedback else (out, None)
        assert not any(jax.typeof(leaf).mat.varying for leaf in jax.tree.leaves(mean))
        return jax.tree.map(lambda a: a[None], (mean, rest))

    in_specs, out_specs = (P(axes), P(axes), P()), P(axes)
    return jax.jit(jax.shard_map(body, mesh=mesh, in_specs=in_specs, out_specs=out_specs))


def mean_of(x, topology, codec=None, residual=None, key=None, **where):
    """Every worker's ``(mean, residual)``; all means are equal bit for bit."""
    num_workers = len(jax.tree.leaves(x)[0])
    f = compiled(topology, codec, num_workers, residual is not None, **where)
    means, rest = jax.tree.map(np.asarray, f(x, residual, key))
    for leaf in jax.tree.leaves(means):
        for other in leaf[1:]:
            np.testing.assert_array_equal(leaf[0], other)
    return jax.tree.map(lambda leaf: leaf[0], means), rest


def draw(num_workers, size, seed=0):
    return np.random.default_rng(seed).standard_normal((num_workers, size), np.float32)


# --- A dense reference, worker by worker --------------------------------------------------------


def quantised(row, block=16):
    """int8 with one scale per block, in NumPy."""
    blocks = row.reshape(-1, block)
    scale = np.abs(blocks).max(1, keepdims=True) / np.float32(127)
    inverse = np.where(scale > 0, 1 / np.where(scale > 0, scale, 1), 0).astype(np.float32)
    return (np.round(blocks * inverse).astype(np.int8) * scale).reshape(-1)


def chunks_of(x, num_chunks, block=16):
    fill = -x.shape[1] % (num_chunks * block)
    return np.pad(x, ((0, 0), (0, fill))).reshape(len(x), num_chunks, -1)


def say_means(totals, error, two_sided):
    """Each owner encodes its mean; ``totals`` ``[K, n]``."""
    num_workers = len(totals)
    mean = np.zeros_like(totals)
    for owner, total in enumerate(totals):
        chunk = total / num_workers
        mean[owner] = quantised(chunk)
        error[owner, owner] = num_workers * (chunk - mean[owner]) if two_sided else 0
    return mean.reshape(-1), error.reshape(num_workers, -1)


def dense_two_phase(x, two_sided):
    rows = chunks_of(x, len(x))
    error, totals = np.zeros_like(rows), np.zeros_like(rows[0])
    for owner in range(len(x)):
        for worker in range(len(x)):
            row = rows[worker, owner]
            said = row if worker == owner else quantised(row)
            totals[owner] += said
            error[worker, owner] = row - said
    return say_means(totals, error, two_sided)


def dense_ring(x, two_sided):
    num_workers = len(x)
    rows = chunks_of(x, num_workers)
    error, totals = np.zeros_like(rows), np.zeros_like(rows[0])
    for chunk in range(num_workers):
        part = np.zeros_like(rows[0, 0])
        for step in range(1, num_workers):  # starts beside its owner, ends at it
            worker = (chunk + step) % num_workers
            part = part + rows[worker, chunk]
            error[worker, chunk] = part - quantised(part)
            part = quantised(part)
        totals[chunk] = part + rows[chunk, chunk]
    return say_means(totals, error, two_sided)


def dense_tree(x, two_sided):
    num_workers = len(x)
    main = 1 << (num_workers.bit_length() - 1)
    held, error = list(chunks_of(x, 1)[:, 0]), np.zeros_like(chunks_of(x, 1)[:, 0])
    for extra in range(main, num_workers):
        said = quantised(held[extra])
        error[extra], held[extra - main] = held[extra] - said, held[extra - main] + said
    size = 1
    while size < main:
        said = [quantised(h) for h in held]
        for worker in range(main):
            error[worker] += (held[worker] - said[worker]) / size
        held = [said[w] + said[w ^ size] for w in range(main)]
        size *= 2
    mean = held[0] / num_workers
    if main < num_workers:
        if two_sided:
            error[:main] += (mean - quantised(mean)) * num_workers / main
        mean = quantised(mean)
    return mean, error


def dense_hierarchical(x, two_sided):
    slow, fast = SHAPES[len(x)]
    rows = chunks_of(x, fast).reshape(slow, fast, fast, -1)
    error, means = np.zeros_like(rows), []
    for place in range(fast):
        mean, rest = dense_two_phase(rows[:, :, place].mean(1), two_sided)
        length = rows.shape[-1]
        means.append(mean[:length])
        error[:, place, place] = fast * rest[:, :length]
    return np.concatenate(means), error.reshape(len(x), -1)


def dense_all_gather(x, two_sided):
    rows = chunks_of(x, 1)[:, 0]
    said = np.stack([quantised(row) for row in rows])
    return said.mean(0), rows - said


DENSE = {name: globals()[f"dense_{name}"] for name in TOPOLOGIES}


# As many workers as show what a topology is about, and what the tests below compile too.
OF_THREE, OF_FOUR = ("two_phase", "tree"), ("ring", "hierarchical", "all_gather")


@pytest.mark.parametrize("two_sided", [True, False])
@pytest.mark.parametrize(
    ("topology", "num_workers"),
    [
        *((t, 3) if t in OF_THREE else slow(t, 3) for t in TOPOLOGIES),
        *((t, 4) if t in OF_FOUR else slow(t, 4) for t in TOPOLOGIES),
    ],
)
def test_equals_the_dense_reference(topology, num_workers, two_sided):
    x, rest = draw(num_workers, SIZE), draw(num_workers, SIZE, seed=1) / 9
    codec = error_feedback(int8(16), two_sided)
    mean, owed = mean_of(x, topology, codec, rest)
    expected_mean, expected_owed = DENSE[topology](x + rest, two_sided)
    np.testing.assert_allclose(mean, expected_mean[:SIZE], atol=2e-6)
    np.testing.assert_allclose(owed, expected_owed[:, :SIZE], atol=1e-5)
    alone, _ = mean_of(x + rest, topology, int8(16))
    np.testing.assert_allclose(alone, expected_mean[:SIZE], atol=2e-6)


def some(topologies, quick=("hierarchical", "ring")):
    """The others are slow."""
    return [t if t in quick else slow(t) for t in topologies]


# --- What holds whatever the codec --------------------------------------------------------------


@pytest.mark.parametrize("num_workers", SHAPES)
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_without_a_codec_it_is_the_mean(topology, num_workers):
    x = {"odd": draw(num_workers, 37), "scalar": draw(num_workers, 1)[:, 0]}
    mean, _ = mean_of(x, topology)
    for name, leaf in x.items():
        np.testing.assert_allclose(mean[name], leaf.mean(0), atol=1e-6)


def check_debt(topology, codec, x, **where):
    """Two rounds, the second from residuals that are not zero: they average to what is owed."""
    num_workers, rest = len(x["a"]), jax.tree.map(np.zeros_like, x)
    for turn in range(2):
        said = jax.tree.map(np.add, x, rest)
        key = jax.random.key(turn)
        mean, rest = mean_of(x, topology, error_feedback(codec), rest, key, **where)
        for name in x:
            owed = said[name].mean(0) - mean[name]
            assert np.abs(owed).max() > 1e-4
            np.testing.assert_allclose(rest[name].mean(0), owed, atol=2e-6 * num_workers)


@pytest.mark.parametrize(
    ("num_workers", "codec"),
    # Three and four workers with int8: their residuals equal the dense reference's, above.
    [
        slow(2, "int8"),
        slow(8, "int8"),
        slow(4, "stochastic"),
        (3, "stochastic"),
        slow(4, "top_k"),
    ],
)
@pytest.mark.parametrize("topology", some(TOPOLOGIES))
def test_residuals_average_to_what_the_mean_still_owes(topology, num_workers, codec):
    x = {"a": draw(num_workers, 77), "b": draw(num_workers, 16, seed=1)}
    check_debt(topology, CODECS[codec], x)


@pytest.mark.parametrize("topology", some(TOPOLOGIES, ("hierarchical",)))
def test_several_axes_in_another_order_than_the_mesh_has(topology):
    x = {"a": draw(8, 50)}
    check_debt(topology, int8(16), x, shape=(("a", 2), ("b", 2), ("c", 2)), axes=("c", "a", "b"))


@pytest.mark.parametrize("topology", some(TOPOLOGIES, ("hierarchical",)))
def test_each_device_exchanges_the_shard_it_holds(topology):
    """Inside a region that is manual over the workers, with another axis left to the partitioner;
    one leaf is divided over it, the other is not and comes back as one."""
    slow, axes = {"slow": 2, "fast": 2}, ("slow", "fast")
    mesh = make_mesh({**slow, "model": 2})
    wire = Wire(key=None, other_axes=("model",), specs=(("w", P(None, "model")), ("b", P())))
    x = {"w": draw(4, 60).reshape(4, 3, 20), "b": draw(4, 5, seed=1)}

    def body(x):
        local = jax.tree.map(lambda a: a[0], x)
        f = lambda t: (all_reduce_mean(t, axes, int8(4), topology),)  # noqa: E731
        (mean,) = on_shards(f, wire, (local,))
        return mean

    mapped = jax.shard_map(body, mesh=mesh, in_specs=P(axes), out_specs=P(), axis_names=set(axes))
    mean = jax.jit(mapped)(x)
    for name, leaf in x.items():
        bound = np.abs(leaf).max() / 254 * 4
        assert 0 < np.abs(np.asarray(mean[name]) - leaf.mean(0)).max() < bound
        shards = [np.asarray(s.data) for s in mean[name].addressable_shards]
        assert all(
            np.array_equal(s, np.asarray(mean[name])[o.index])
            for s, o in zip(shards, mean[name].addressable_shards, strict=True)
        )


def test_one_slow_worker_is_exact():
    x, where = draw(4, 50), {"shape": (("slow", 1), ("fast", 4)), "axes": ("slow", "fast")}
    mean, rest = mean_of(x, "hierarchical", error_feedback(int8()), np.zeros_like(x), **where)
    np.testing.assert_allclose(mean, x.mean(0), atol=1e-6)
    assert not rest.any()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("topology", some(TOPOLOGIES, OF_THREE))
def test_a_value_that_is_not_finite_reaches_the_mean_alone(topology, bad):
    x = np.ones((3, SIZE), np.float32)
    x[2, 60] = bad
    mean, rest = mean_of(x, topology, error_feedback(int8(16)), np.zeros_like(x))
    assert not np.isfinite(mean[60])
    assert np.isfinite(mean[:30]).all()
    assert np.isfinite(rest).all()


@pytest.mark.parametrize("topology", some(TOPOLOGIES))
def test_error_feedback_pays_its_debt_over_rounds(topology):
    """The sum of T means differs from the sum of exact ones by one residual, not by T errors."""
    x = draw(4, SIZE)
    rest, total = np.zeros_like(x), 0
    for _ in range(20):
        mean, rest = mean_of(x, topology, error_feedback(int8(16)), rest)
        total = total + mean
    np.testing.assert_allclose(total + rest.mean(0), 20 * x.mean(0), atol=1e-4)
    assert np.abs(rest).max() < 0.2


@pytest.mark.slow
def test_a_ring_of_eight_is_as_small_a_program_as_one_of_three():
    listed = {}
    for num_workers in (3, 8):
        x = jax.ShapeDtypeStruct((num_workers, 200), np.float32)
        program = compiled("ring", int8(16), num_workers, False).lower(x, None, None).compile()
        hops = [c for c in collectives(program) if c.kind == "collective-permute"]
        listed[num_workers] = sorted(c.count for c in hops)
    assert listed == {3: [1, 1], 8: [1, 6]}


def test_refuses_what_has_no_such_topology():
    x = np.ones((4, 8), np.float32)
    with pytest.raises(ValueError, match=r'one last: axis=\("slow", "fast"\)'):
        all_reduce_mean(x, "data", int8(), "hierarchical")
    with pytest.raises(ValueError, match="needs slow axes and a fast one"):
        all_reduce_mean(x, ("data",), int8(), "hierarchical")
    with pytest.raises(ValueError, match="a way of its own, not by topology='ring'"):
        all_reduce_mean(x, "data", power_sgd(2), "ring")
    with pytest.raises(ValueError, match="tuple of different names"):
        all_reduce_mean(x, ("data", "data"), int8())
