"""Axes that cover both dims of a torus, and sums along one dim after the other."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jdml.sharding import collectives, make_mesh, torus

# Two rows of two columns, and the way around them.
RING = np.array([[0, 1], [3, 2]])


def mesh_of(places, sizes):
    devices = np.empty(len(places), dtype=object)
    devices[:] = [SimpleNamespace(coords=(*place, 0)) for place in places]
    devices = devices.reshape(*sizes.values())
    return SimpleNamespace(devices=devices, axis_names=tuple(sizes), shape=sizes)


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ({"fsdp": 32}, (4, 8)),
        ({"fsdp": 16, "model": 2}, (4, 4)),
        ({"data": 2, "fsdp": 16}, (2, 8)),
        ({"data": 4, "fsdp": 8}, None),
        ({"fsdp": 4, "model": 8}, None),
    ],
)
def test_planes(sizes, shape):
    places = [(row, column) for row in range(4) for column in range(8)]
    rows = torus.plane_of(mesh_of(places, sizes), "fsdp")
    if shape is None:
        assert rows is None
    else:
        np.testing.assert_array_equal(rows, np.arange(sizes["fsdp"]).reshape(shape))


def test_a_way_around_a_plane():
    found = torus.plane_of(mesh_of([(0, 0), (0, 1), (1, 1), (1, 0)], {"fsdp": 4}), "fsdp")
    np.testing.assert_array_equal(found, RING)


def test_a_line_of_chips_and_other_devices_are_none():
    assert torus.plane_of(mesh_of([(0, n) for n in range(8)], {"fsdp": 8}), "fsdp") is None
    assert torus.plane_of(make_mesh({"fsdp": 8}), "fsdp") is None


def test_along_one_dim_after_the_other_is_the_same_sum(monkeypatch):
    mesh = make_mesh({"a": 4, "b": 2})
    monkeypatch.setattr(torus, "plane_of", lambda _, axis: RING if axis == "a" else None)
    x = jax.random.normal(jax.random.key(0), (8, 24, 3))

    @jax.jit
    def scattered(x):
        return jax.shard_map(
            lambda x: torus.sum_scattered(x[0], ("a", "b"), mesh),
            mesh=mesh,
            in_specs=P(("a", "b")),
            out_specs=P(("a", "b")),
        )(x)

    program = scattered.lower(x).compile()
    np.testing.assert_allclose(program(x), jnp.sum(x, axis=0), rtol=1e-5, atol=1e-6)
    # 7/8 of the bytes, in three steps of which each has half as much as the one before.
    listed = collectives(program, mesh)
    assert [(c.kind, c.payload_bytes) for c in listed] == [
        ("reduce-scatter", 24 * 3 * 4 // n) for n in (1, 2, 4)
    ]
    assert sum(c.sent_bytes for c in listed) == 7 * 24 * 3 * 4 // 8
