"""A round of mixing against ``W @ X`` on one device, and the bytes in the compiled program."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jdml.communicate import Wire, error_feedback, on_shards
from jdml.communicate.codecs import Codec, int8
from jdml.communicate.topology import (
    complete,
    exponential,
    from_edges,
    mix,
    neighbour_sum,
    one_peer_exponential,
    random_pairs,
    random_regular,
    ring,
    star,
    torus,
)
from jdml.sharding import collectives, make_mesh

GRAPHS = {
    "ring": ring(8),
    "torus": torus(2, 4),
    "exponential": exponential(8),
    "star": star(8),
    "regular": random_regular(8, 3, 0),
    "directed": from_edges(
        8, [(i, (i + 1) % 8) for i in range(8)] + [(0, 3), (0, 5), (2, 7)], directed=True
    ),
    "one-peer": one_peer_exponential(8),
    "pairs of 7": random_pairs(7, 3, 0),
    "ring of 5": ring(5),
    "pair": ring(2),
    "alone": ring(1),
}


def mesh_of(n):
    return make_mesh({"data": n}, devices=jax.devices()[:n])


def compiled(mesh, graph, axis="data", step=None, codec=None, key=None, f=mix, check_vma=True):
    """``mix`` of trees whose leaves have a leading worker dim; ``step`` may be an argument."""

    def body(x, *steps):
        local = jax.tree.map(lambda a: a[0], x)
        out = f(local, axis, graph, steps[0] if steps else step, codec, key)
        return jax.tree.map(lambda a: a[None], out)

    specs = (P(axis), P())

    def call(x, *steps):
        g = jax.shard_map(
            body,
            mesh=mesh,
            in_specs=specs[: 1 + len(steps)],
            out_specs=P(axis),
            check_vma=check_vma,
        )
        return g(x, *steps)

    return jax.jit(call)


def values(n, *shape, seed=0):
    return np.random.default_rng(seed).normal(size=(n, *shape)).astype(np.float32)


@pytest.mark.parametrize("name", GRAPHS)
def test_equals_the_dense_product(name):
    graph = GRAPHS[name]
    n = graph.num_workers
    x = {"a": values(n, 3, 5), "b": [values(n), values(n, 0, 2)]}
    for step in range(graph.period):
        mixed = compiled(mesh_of(n), graph, step=step)(x)
        w = graph.at(step)
        expected = jax.tree.map(lambda a, w=w: np.einsum("ij,j...->i...", w, a.astype(float)), x)
        for got, want in zip(jax.tree.leaves(mixed), jax.tree.leaves(expected), strict=True):
            assert got.dtype == np.float32
            np.testing.assert_allclose(got, want, atol=3e-7)  # f32 rounding of at most 8 terms


def test_the_step_chooses_the_round_at_run_time():
    graph = one_peer_exponential(8)
    mixed = compiled(mesh_of(8), graph)
    x = values(8, 7)
    for step in range(5):
        np.testing.assert_allclose(mixed(x, jnp.int32(step)), graph.at(step) @ x, atol=3e-7)
    for step in range(5, 8):  # any three rounds in a row are the mean
        x = np.asarray(mixed(x, jnp.int32(step)))
    np.testing.assert_allclose(x, np.tile(values(8, 7).mean(0), (8, 1)), atol=1e-6)
    # A graph that stays the same takes a step too, and branches on nothing.
    x = values(8, 7)
    same = compiled(mesh_of(8), ring(8))(x, jnp.int32(3))
    np.testing.assert_allclose(same, ring(8).weights @ x, atol=3e-7)


def test_the_complete_graph_is_the_mean():
    x = values(8, 33)

    def mean(x, axis, *_):
        return jax.lax.pcast(jax.lax.pmean(x, axis), axis, to="varying")

    mesh = mesh_of(8)
    expected = compiled(mesh, complete(8), f=mean)(x)
    np.testing.assert_allclose(compiled(mesh, complete(8))(x), expected, atol=3e-7)


@functools.cache
def round_trip(codec):
    return jax.jit(jax.vmap(lambda row: codec.decode(codec.encode(row))))


@pytest.mark.parametrize("name", GRAPHS)
def test_a_codec_loses_nothing_of_the_sum(name):
    """int8 in blocks of 16: what neighbours read is decoded, and the sum stays."""
    graph = GRAPHS[name]
    n, codec = graph.num_workers, int8(16)
    x = values(n, 50)
    mixed = np.asarray(compiled(mesh_of(n), graph, step=0, codec=codec)(x))
    read = np.asarray(round_trip(codec)(x))
    w = graph.at(0)
    own = np.diag(np.diag(w))
    expected = x - (np.eye(n) - own) @ read + (w - own) @ read
    np.testing.assert_allclose(mixed, expected, atol=1e-6)
    np.testing.assert_allclose(mixed.sum(0), x.sum(0), atol=5e-6)
    assert n == 1 or np.abs(mixed - w @ x).max() > 1e-4  # it did lose something


def test_what_was_heard_and_what_was_said():
    graph, codec = GRAPHS["directed"], int8(16)
    x = values(8, 20)
    heard, said = compiled(mesh_of(8), graph, codec=codec, f=neighbour_sum)(x)
    read = np.asarray(round_trip(codec)(x))
    np.testing.assert_allclose(said, read, rtol=3e-7)  # decoding, compiled otherwise, rounds
    w = graph.weights - np.diag(np.diag(graph.weights))
    np.testing.assert_allclose(heard, w @ read, atol=1e-6)


@dataclasses.dataclass(frozen=True)
class Plain(Codec):
    """Sends f32 and one byte that says so, without which nothing can be read."""

    @property
    def granularity(self):
        return 4

    def encode_rows(self, rows, key=None):
        return {"values": rows, "sent": jnp.ones((rows.shape[0], 1), jnp.uint8)}

    def decode_rows(self, payload, length):
        return payload["values"] / payload["sent"].astype(jnp.float32)

    def payload_bytes(self, length):
        return 4 * length + 1


@dataclasses.dataclass(frozen=True)
class Dithered(Plain):
    """Adds one draw to everything that is sent."""

    needs_key = True

    def encode_rows(self, rows, key=None):
        return super().encode_rows(rows + jax.random.normal(key, (rows.shape[0], 1)))


def test_draws_differ_by_worker_and_bucket_and_follow_the_key():
    graph, codec = ring(4), Dithered()
    x = {"a": np.zeros((4, 8), np.float32), "big": np.zeros((4, 1 << 20), np.float32)}
    mesh = mesh_of(4)

    def said(seed):
        run = compiled(mesh, graph, codec=codec, key=jax.random.key(seed), f=neighbour_sum)
        return jax.tree.map(lambda a: np.asarray(a)[:, 0], run(x)[1])

    first = said(0)
    draws = [*first["a"].tolist(), *first["big"].tolist()]
    assert len(set(draws)) == 8
    np.testing.assert_array_equal(first["a"], said(0)["a"])
    assert not set(draws) & set(said(1)["a"].tolist())


@pytest.mark.parametrize("codec", [None, int8(16)])
def test_a_value_that_is_not_finite_reaches_the_neighbours_alone(codec):
    mixed = compiled(mesh_of(8), star(8), codec=codec)
    for bad in (np.nan, np.inf):
        x = np.ones((8, 20), np.float32)
        x[3, 2] = bad
        finite = np.isfinite(mixed(x)).all(1)
        assert finite.tolist() == [i not in (0, 3) for i in range(8)]  # 3 is heard by the centre


def test_who_hears_nothing_in_a_permutation_reads_nothing():
    """Zero bytes, as ppermute leaves where nobody sends, are 0 / 0 to this codec."""
    x = values(8, 16)
    mixed = compiled(mesh_of(8), star(8), codec=Plain())(x)
    np.testing.assert_allclose(mixed, star(8).weights @ x, atol=1e-6)


def test_dtypes_are_kept_and_sums_are_f32():
    x = {"h": jnp.asarray(values(8, 9), jnp.bfloat16), "f": jnp.asarray(values(8, 9), jnp.float16)}
    mixed = compiled(mesh_of(8), exponential(8))(x)
    for name, leaf in x.items():
        assert mixed[name].dtype == leaf.dtype
        exact = exponential(8).weights @ np.asarray(leaf, np.float64)
        eps = float(jnp.finfo(leaf.dtype).eps)  # rounded once, at the end
        assert (np.abs(np.asarray(mixed[name], np.float64) - exact) <= eps * np.abs(exact)).all()


def found(mesh, graph, tree, codec=None, step=None, dynamic=False):
    n = graph.num_workers
    shapes = jax.tree.map(lambda size: jax.ShapeDtypeStruct((n, size), jnp.float32), tree)
    steps = (jax.ShapeDtypeStruct((), jnp.int32),) if dynamic else ()
    program = compiled(mesh, graph, codec=codec, step=step).lower(shapes, *steps).compile()
    return collectives(program, mesh)


@pytest.mark.parametrize("name", ["ring", "torus", "exponential", "star", "regular", "pair"])
@pytest.mark.parametrize("codec", [None, int8(16)])
def test_one_permute_per_permutation_with_the_bytes_stated(name, codec):
    graph = GRAPHS[name]
    tree = {"a": 100, "b": 7, "c": 33}
    seen = found(mesh_of(graph.num_workers), graph, tree, codec)
    assert [c.kind for c in seen] == ["collective-permute"] * len(graph.permutations[0])
    blocks = sum(-(-size // 16) for size in tree.values())
    payload = 4 * 140 if codec is None else codec.payload_bytes(16 * blocks)
    assert {c.sent_bytes for c in seen} == {payload}
    assert {c.dtype for c in seen} == {"f32" if codec is None else "u8"}
    assert {c.axes for c in seen} == {("data",)}
    pairs = sorted(pair for c in seen for pair in c.groups)
    assert pairs == sorted(pair for p in graph.permutations[0] for pair in p.pairs)


def test_a_round_of_a_sequence_is_one_permute():
    graph = one_peer_exponential(8)
    (one,) = found(mesh_of(8), graph, {"a": 100}, step=2)
    assert (one.sent_bytes, one.conditional) == (400, False)
    branches = found(mesh_of(8), graph, {"a": 100}, dynamic=True)
    assert [(c.sent_bytes, c.conditional) for c in branches] == [(400, True)] * 3


def test_several_axes_count_workers_in_row_major_order():
    mesh = make_mesh({"slice": 2, "data": 4})
    x = values(8, 5)
    # ppermute itself numbers workers in the mesh's order, whatever the order of the names.
    for axes in [("slice", "data"), ("data", "slice")]:
        mixed = compiled(mesh, exponential(8), axis=axes)(x)
        np.testing.assert_allclose(mixed, exponential(8).weights @ x, atol=3e-7)


def test_on_the_shards_of_other_axes():
    mesh = make_mesh({"data": 4, "model": 2})
    x = {"kernel": values(4, 6, 8), "scale": values(4)}
    specs = {"kernel": P(None, "model"), "scale": P()}
    wire = Wire(None, ("model",), tuple(specs.items()))
    graph, codec = ring(4), int8(16)

    def body(x):
        local = jax.tree.map(lambda a: a[0], x)
        (mixed,) = on_shards(lambda t: (mix(t, "data", graph, codec=codec),), wire, (local,))
        return jax.tree.map(lambda a: a[None], mixed)

    call = jax.jit(
        jax.shard_map(body, mesh=mesh, in_specs=P("data"), out_specs=P("data"), axis_names={"data"})
    )
    placed = {k: jax.device_put(v, NamedSharding(mesh, P("data", *specs[k]))) for k, v in x.items()}
    mixed = call(placed)
    for name, leaf in x.items():
        expected = np.einsum("ij,j...->i...", graph.weights, leaf)
        np.testing.assert_allclose(mixed[name], expected, atol=2e-2)  # int8: 1/254 of the largest
        np.testing.assert_allclose(mixed[name].sum(0), leaf.sum(0), atol=2e-6)
    seen = collectives(call.lower(placed).compile(), mesh)
    assert {c.axes for c in seen} == {("data",)}
    assert {c.dtype for c in seen} == {"u8"}


@pytest.mark.slow
def test_works_in_a_shard_map_without_varying_types():
    x = values(8, 20)
    for graph, steps in [(ring(8), ()), (one_peer_exponential(8), (jnp.int32(1),))]:
        mixed = [
            compiled(mesh_of(8), graph, codec=int8(16), check_vma=check)(x, *steps)
            for check in (True, False)
        ]
        np.testing.assert_array_equal(*mixed)


def test_refuses_what_cannot_work():
    mesh, x = mesh_of(4), values(4, 8)

    def run(graph, x=x, **kwargs):
        return compiled(mesh, graph, **kwargs)(x)

    with pytest.raises(ValueError, match=r"ring\(8\).* has 8 workers but axis 'data' has 4"):
        run(ring(8))
    with pytest.raises(ValueError, match="forget to call the factory"):
        run(ring)
    with pytest.raises(ValueError, match="pass step="):
        run(one_peer_exponential(4))
    with pytest.raises(ValueError, match="send differences"):
        run(ring(4), codec=error_feedback(int8()))
    with pytest.raises(ValueError, match="pass key="):
        run(ring(4), codec=Dithered())
    with pytest.raises(ValueError, match="leaf 'n' has dtype int32"):
        run(ring(4), {"n": x.astype(np.int32)})
    with pytest.raises(ValueError, match="'model' is not bound"):
        mix(jnp.ones(3), "model", ring(4))
    with pytest.raises(ValueError, match="step varies over axis 'data'"):
        run(one_peer_exponential(4), f=lambda x, a, g, *_: mix(x, a, g, jax.lax.axis_index(a)))
