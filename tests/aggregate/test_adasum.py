"""The adaptive sum against its definition, pair by pair."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from jdml.aggregate import adasum
from jdml.communicate import error_feedback
from jdml.communicate.codecs import int8
from jdml.sharding import collectives, make_mesh
from jdml.train import make_step


def pair(a, b):
    dot = a @ b
    return (1 - dot / (2 * a @ a)) * a + (1 - dot / (2 * b @ b)) * b


def tree_sum(vectors):
    while len(vectors) > 1:
        joined = [pair(a, b) for a, b in zip(vectors[::2], vectors[1::2], strict=False)]
        vectors = joined + vectors[len(vectors) // 2 * 2 :]
    return vectors[0]


def run(x, codec=None, num_workers=4):
    mesh = make_mesh({"data": num_workers}, devices=jax.devices()[:num_workers])

    def body(x):
        local = jax.tree.map(lambda a: a[0], x)
        return adasum("data", codec).update(local, optax.EmptyState())[0]

    return jax.jit(jax.shard_map(body, mesh=mesh, in_specs=P("data"), out_specs=P()))(x)


@pytest.mark.parametrize("num_workers", [2, 3, 4, 8])
def test_equals_its_definition_leaf_by_leaf(num_workers):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = {"a": (5, 7), "b": (1,), "c": (301,)}
    x = {
        name: np.asarray(1 + jax.random.normal(key, (num_workers, *shape)))
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
    out = run(x, num_workers=num_workers)
    for name, leaf in x.items():
        rows = leaf.astype(np.float64).reshape(num_workers, -1)
        np.testing.assert_allclose(
            np.ravel(out[name]), tree_sum(list(rows)), rtol=2e-5, atol=1e-5, err_msg=name
        )


def test_equal_gradients_are_averaged_and_orthogonal_ones_added():
    same = np.tile(np.arange(1.0, 5.0, dtype=np.float32), (4, 1))
    np.testing.assert_allclose(run(same), same[0], rtol=1e-6)
    np.testing.assert_allclose(run(np.eye(4, dtype=np.float32)), np.ones(4), rtol=1e-6)
    np.testing.assert_array_equal(run(np.zeros((4, 6), np.float32)), 0)


def test_a_large_leaf_stands_alone():
    x = np.asarray(jax.random.normal(jax.random.key(1), (2, (1 << 20) + 5))) + 0.5
    expected = tree_sum(list(x.astype(np.float64)))
    np.testing.assert_allclose(run({"a": x}, num_workers=2)["a"], expected, rtol=1e-4, atol=1e-5)


def test_a_codec_changes_it_by_its_own_error_and_the_bytes_as_stated():
    x = np.asarray(1 + jax.random.normal(jax.random.key(0), (4, 512)))
    np.testing.assert_allclose(run(x, int8(32)), run(x), atol=0.1)
    assert np.abs(np.asarray(run(x, int8(32)) - run(x))).max() > 0
    mesh = make_mesh({"data": 4}, devices=jax.devices()[:4])
    mapped = jax.shard_map(
        lambda x: adasum("data", int8(32)).update(x[0], optax.EmptyState())[0],
        mesh=mesh,
        in_specs=P("data"),
        out_specs=P(),
    )
    listed = collectives(jax.jit(mapped).lower(x).compile(), mesh)
    assert sorted(c.kind for c in listed) == ["all-gather", "all-reduce", "all-to-all"]
    sent = {c.kind: c.sent_bytes for c in listed}
    assert sent["all-gather"] == sent["all-to-all"] == 3 * int8(32).payload_bytes(128)
    assert sent["all-reduce"] == 8 * 3 * 4


def test_shards_of_a_leaf_count_together():
    """On a data × model mesh the inner products are those of whole leaves."""
    data = np.asarray(jax.random.normal(jax.random.key(2), (8, 6)))

    def loss_fn(params, batch, key):
        return jnp.sum((batch @ params["w"]) ** 2) + jnp.sum(batch @ params["v"]), {}

    results = []
    for shape in ({"data": 4}, {"data": 4, "model": 2}):
        mesh = make_mesh(shape, devices=jax.devices()[: 4 * shape.get("model", 1)])
        specs = {"w": P(None, "model" if "model" in shape else None), "v": P()}
        init, step = make_step(
            loss_fn, optax.chain(adasum("data"), optax.sgd(0.01)), mesh, specs=specs
        )
        state = init({"w": jnp.ones((6, 4)), "v": jnp.ones(6)}, 0)
        for _ in range(3):
            state, _ = step(state, data)
        results.append(jax.device_get(state.params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), *results)


def test_refuses_error_feedback():
    with pytest.raises(ValueError, match="not linear"):
        adasum("data", error_feedback(int8()))
