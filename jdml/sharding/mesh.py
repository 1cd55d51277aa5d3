"""Meshes: one builder for simulated CPUs, one slice, several slices, and several processes.

The shape that is written is the shape of the mesh. ``dcn`` says how much of an axis lies *across*
slices, on the slow network between them; the rest of that axis, and every other axis, lies inside
a slice, on its fast links. So ``make_mesh({"data": 4, "model": 2}, dcn={"data": 2})`` takes eight
devices in two slices of four: ``data`` is 2 slices × 2, ``model`` never leaves a slice.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh


def make_mesh(
    shape: Mapping[str, int],
    dcn: Mapping[str, int] | None = None,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """A mesh with the axes of ``shape``, in that order, all of type ``Auto``.

    Args:
      shape: axis name → size; at most one size may be −1, which takes the devices that are left.
      dcn: axis name → how many slices the axis spans (a divisor of its size); the product is the
        number of slices. On devices that do not say which slice they are in, processes take the
        place of slices, and on one process consecutive blocks of devices do.
      devices: which devices to use; all of them by default.

    Raises:
      ValueError: the sizes do not multiply to the number of devices, or ``dcn`` does not fit.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = _fill(shape, len(devices))
    names = tuple(sizes)
    across = _slices(sizes, dcn or {})
    within = [sizes[name] // across[name] for name in names]
    num_slices = math.prod(across.values())
    if num_slices == 1:
        if devices[0].platform == "tpu" and len(found := _groups(devices, "slice_index")) > 1:
            raise ValueError(
                f"make_mesh: the devices are in {len(found)} slices; say which axis crosses them, "
                f"for example dcn={{{names[0]!r}: {len(found)}}}"
            )
        grid = _arrange(within, devices)
    else:
        blocks = [_arrange(within, block) for block in _blocks(devices, num_slices)]
        outer = np.empty(num_slices, dtype=object)
        outer[:] = blocks
        grid = np.block(_nest(outer.reshape(list(across.values()))))
    return Mesh(grid, names, axis_types=(AxisType.Auto,) * len(names))


def _fill(shape: Mapping[str, int], num_devices: int) -> dict[str, int]:
    """The sizes with −1 replaced; they multiply to ``num_devices``."""
    if not shape:
        raise ValueError("make_mesh: expected at least one axis, got none; write {'data': -1}")
    for name, size in shape.items():
        if not isinstance(name, str) or not name:
            raise ValueError(f"make_mesh: an axis name is a non-empty string, got {name!r}")
        if isinstance(size, bool) or not isinstance(size, (int, np.integer)):
            raise ValueError(f"make_mesh: size of axis {name!r} must be an int, got {size!r}")
        if size < 1 and size != -1:
            raise ValueError(f"make_mesh: size of axis {name!r} must be positive or -1, got {size}")
    sizes = {name: int(size) for name, size in shape.items()}
    free = [name for name, size in sizes.items() if size == -1]
    known = math.prod(size for size in sizes.values() if size != -1)
    if len(free) > 1:
        raise ValueError(f"make_mesh: at most one axis may be -1, got {free}; give all but one")
    if free and num_devices % known == 0:
        sizes[free[0]] = num_devices // known
    elif known != num_devices or free:
        what = "divide" if free else "be"
        raise ValueError(
            f"make_mesh: sizes {dict(shape)} multiply to {known}, which must {what} the number of "
            f"devices, {num_devices}; change a size, let one axis be -1, or pass the devices to "
            "use as devices="
        )
    return sizes


def _slices(sizes: Mapping[str, int], dcn: Mapping[str, int]) -> dict[str, int]:
    """How many slices each axis of the mesh spans."""
    for name, count in dcn.items():
        if name not in sizes:
            raise ValueError(f"make_mesh: dcn axis {name!r} is not in the shape {dict(sizes)}")
        if isinstance(count, bool) or not isinstance(count, (int, np.integer)):
            raise ValueError(f"make_mesh: dcn entry of {name!r} must be an int, got {count!r}")
        if count < 1 or sizes[name] % count:
            raise ValueError(
                f"make_mesh: axis {name!r} has size {sizes[name]} and cannot span {count} slices; "
                "its size counts all slices together and must be a multiple of its dcn entry"
            )
    return {name: int(dcn.get(name, 1)) for name in sizes}


def _blocks(devices: list[Any], num_slices: int) -> list[list[Any]]:
    """The devices of each slice: real slices, else processes, else consecutive devices."""
    if len(devices) % num_slices:
        raise ValueError(f"make_mesh: {len(devices)} devices do not make {num_slices} equal slices")
    per_slice = len(devices) // num_slices
    slices, processes = _groups(devices, "slice_index"), _groups(devices, "process_index")
    if len(slices) > 1:
        found, exact = slices, devices[0].platform == "tpu"
    else:
        found, exact = processes, False
    sizes = {len(group) for group in found.values()}
    fits = sizes == {per_slice} if exact else not any(per_slice % size for size in sizes)
    if len(found) > 1 and not fits:
        counts = {index: len(group) for index, group in found.items()}
        raise ValueError(
            f"make_mesh: dcn asks for {num_slices} slices of {per_slice} devices, but the devices "
            f"come in {'slices' if found is slices else 'processes'} of {counts}; the product of "
            f"the dcn entries should be {len(found)}"
        )
    ordered = [device for group in found.values() for device in group]
    return [ordered[i : i + per_slice] for i in range(0, len(ordered), per_slice)]


def _groups(devices: list[Any], attribute: str) -> dict[int, list[Any]]:
    groups: dict[int, list[Any]] = {}
    for device in devices:
        groups.setdefault(getattr(device, attribute, None) or 0, []).append(device)
    return dict(sorted(groups.items()))


def _arrange(shape: list[int], devices: list[Any]) -> np.ndarray:
    """The devices of one slice on a grid that suits their links."""
    grid = mesh_utils.create_device_mesh(
        shape, devices=devices, allow_split_physical_axes=devices[0].platform == "tpu"
    )
    return np.asarray(grid, dtype=object)


def _nest(blocks: np.ndarray) -> Any:
    return [_nest(b) for b in blocks] if blocks.ndim > 1 else list(blocks)
