import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from jdml.sharding import describe_mesh, make_mesh


def ids(mesh):
    return np.vectorize(lambda d: d.id)(mesh.devices)


@dataclasses.dataclass(frozen=True)
class Device:
    """What make_mesh looks at in a device."""

    id: int
    process_index: int = 0
    slice_index: int | None = None
    platform: str = "cpu"
    device_kind: str = "fake"


def test_order_is_as_written_and_axes_are_auto():
    mesh = make_mesh({"model": 2, "data": -1})
    assert dict(mesh.shape) == {"model": 2, "data": 4}
    assert mesh.axis_names == ("model", "data")
    assert mesh.axis_types == (AxisType.Auto, AxisType.Auto)
    np.testing.assert_array_equal(ids(mesh), np.arange(8).reshape(2, 4))
    assert make_mesh({"model": 2, "data": -1}) == mesh


def test_size_one_axes_and_a_subset_of_devices():
    mesh = make_mesh({"data": -1, "fsdp": 1, "model": 1}, devices=jax.devices()[:1])
    assert dict(mesh.shape) == {"data": 1, "fsdp": 1, "model": 1}
    assert ids(make_mesh({"a": 2, "b": 2}, devices=jax.devices()[4:])).tolist() == [[4, 5], [6, 7]]


def test_slices_are_crossed_by_the_dcn_axis_only():
    mesh = make_mesh({"data": 4, "model": -1}, dcn={"data": 2})
    assert dict(mesh.shape) == {"data": 4, "model": 2}
    simulated_slice = ids(mesh) // 4
    np.testing.assert_array_equal(simulated_slice, [[0, 0], [0, 0], [1, 1], [1, 1]])


def test_dcn_axis_that_is_not_the_first():
    mesh = make_mesh({"model": 2, "data": 4}, dcn={"data": 2})
    np.testing.assert_array_equal(ids(mesh) // 4, [[0, 0, 1, 1], [0, 0, 1, 1]])


def test_two_dcn_axes():
    mesh = make_mesh({"data": 4, "pipe": 2}, dcn={"data": 2, "pipe": 2})
    np.testing.assert_array_equal(ids(mesh) // 2, [[0, 1], [0, 1], [2, 3], [2, 3]])


@pytest.mark.parametrize("attribute", ["slice_index", "process_index"])
def test_what_devices_say_of_their_slice_wins_over_their_order(attribute):
    devices = [Device(i, **{attribute: (i + 1) % 2}) for i in range(8)]
    mesh = make_mesh({"data": 4, "model": 2}, dcn={"data": 2}, devices=devices)
    np.testing.assert_array_equal(ids(mesh) % 2, [[1, 1], [1, 1], [0, 0], [0, 0]])


def test_a_slice_may_hold_several_processes():
    devices = [Device(i, process_index=i // 2) for i in range(8)]
    mesh = make_mesh({"data": 8}, dcn={"data": 2}, devices=devices)
    assert ids(mesh).tolist() == list(range(8))


@pytest.mark.parametrize(
    ("shape", "dcn", "message"),
    [
        ({}, None, "at least one axis"),
        ({"data": 3}, None, "multiply to 3, which must be the number of devices, 8"),
        ({"data": 16}, None, "multiply to 16"),
        ({"data": -1, "model": 3}, None, "multiply to 3, which must divide"),
        ({"data": -1, "model": -1}, None, r"at most one axis may be -1, got \['data', 'model'\]"),
        ({"data": 0}, None, "'data' must be positive"),
        ({"data": 8.0}, None, "'data' must be an int"),
        ({"data": True}, None, "'data' must be an int"),
        ({"": 8}, None, "non-empty string"),
        ({"data": 8}, {"slices": 2}, "dcn axis 'slices' is not in the shape"),
        ({"data": 2, "model": 4}, {"data": 4}, "'data' has size 2 and cannot span 4 slices"),
        ({"data": 8}, {"data": 0}, "cannot span 0"),
        ({"data": 8}, {"data": 2.0}, "must be an int"),
    ],
)
def test_bad_shapes(shape, dcn, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(shape, dcn=dcn)


def test_slices_that_the_devices_do_not_have():
    devices = [Device(i, slice_index=i // 2, platform="tpu") for i in range(8)]
    with pytest.raises(ValueError, match=r"slices of {0: 2, 1: 2, 2: 2, 3: 2}.*should be 4"):
        make_mesh({"data": 8}, dcn={"data": 2}, devices=devices)
    with pytest.raises(ValueError, match="4 slices; say which axis crosses them"):
        make_mesh({"data": 8}, devices=devices)
    processes = [Device(i, process_index=i // 4) for i in range(8)]
    with pytest.raises(ValueError, match=r"processes of {0: 4, 1: 4}"):
        make_mesh({"data": 8}, dcn={"data": 4}, devices=processes)


def test_describe_mesh_shows_every_device_at_its_place():
    text = describe_mesh(make_mesh({"data": 2, "fsdp": 2, "model": 2}))
    assert "mesh data=2 × fsdp=2 × model=2: 8 devices" in text
    assert "data 1" in text
    cells = [line for line in text.splitlines() if line.startswith("│")]
    rows = [[c.strip() for c in line.strip("│").split("│")] for line in cells]
    head = ["fsdp \\ model", "0", "1"]
    first, second = [["0", "0", "1"], ["1", "2", "3"]], [["0", "4", "5"], ["1", "6", "7"]]
    assert rows == [head, *first, head, *second]


def test_describe_mesh_names_slices_and_processes():
    devices = [Device(i, process_index=i // 2, slice_index=i // 4) for i in range(8)]
    text = describe_mesh(make_mesh({"data": 8}, dcn={"data": 2}, devices=devices))
    assert "2 slices, 4 processes" in text
    assert "5 s1 p2" in text
