"""Sums of which each device keeps its part, over an axis that lies on two dims of a torus.

TPU's compiler makes an all-reduce, of twice the bytes and with the whole sum on every chip, of a
reduce-scatter over an axis that covers both dims of a slice of v5e or v6e (libtpu 0.0.50; no option
of its compiler that was tried changes that). Along one dim at a time it leaves it one, of 37 MB; of
175 MB it was seen to make an all-reduce along one dim too. What is called for is, either way,
``(a − 1)/a + (b − 1)/(a b)`` of the array sent over ``a × b`` chips, which is ``(n − 1)/n``.
"""

import jax
import numpy as np
from jax.sharding import Mesh


def sum_scattered(x: jax.Array, axes: tuple[str, ...], mesh: Mesh) -> jax.Array:
    """The sum over ``axes`` of ``x`` [n · size, ...] → part k of it, [size, ...], on device k.

    Inside ``shard_map``, exact. Sends (n − 1)/n of ``x``'s bytes.

    Args:
      x: its leading dim is cut in n parts, in the row-major order of the axes.
      axes: manual mesh axes, of n devices together.
      mesh: whose devices say where on a torus they are, if on one.
    """
    for axis in axes:
        rows = plane_of(mesh, axis)
        if rows is None:
            x = jax.lax.psum_scatter(x, axis, tiled=True)
            continue
        # Parts in the order of the plane, in which each stage hands them out.
        order = rows.reshape(-1)
        if np.any(order != np.arange(order.size)):
            x = x.reshape(order.size, -1, *x.shape[1:])[order].reshape(x.shape)
        for lines in (rows.T, rows):
            x = jax.lax.psum_scatter(x, axis, axis_index_groups=lines.tolist(), tiled=True)
    return x


def plane_of(mesh: Mesh, axis: str) -> np.ndarray | None:
    """Positions along the axis as rows and columns of a torus of two dims, if it covers both.

    Args:
      mesh: of devices with coordinates, as TPUs have; None of others.
      axis: one of its axes.
    """
    coords = _coordinates(mesh)
    if coords is None:
        return None
    lines = np.moveaxis(coords, mesh.axis_names.index(axis), -2)
    lines = lines.reshape(-1, *lines.shape[-2:])
    used = [dim for dim in range(lines.shape[-1]) if np.ptp(lines[..., dim]) > 0]
    if len(used) != 2:
        return None  # one line of chips; or a torus of three dims, which is left to the compiler
    first = _rows(lines[0][:, used])
    for line in lines[1:]:
        rows = _rows(line[:, used])
        if first is None or rows is None or not np.array_equal(rows, first):
            return None
    return first


def _rows(places: np.ndarray) -> np.ndarray | None:
    """Indices of ``places`` [n, 2] as [rows, columns], if they fill a rectangle of two dims."""
    ranks = [np.unique(column, return_inverse=True) for column in places.T]
    shape = tuple(len(values) for values, _ in ranks)
    if min(shape) < 2 or np.prod(shape) != len(places):
        return None
    rows = np.full(shape, -1)
    rows[ranks[0][1], ranks[1][1]] = np.arange(len(places))
    return None if np.any(rows < 0) else rows


def _coordinates(mesh: Mesh) -> np.ndarray | None:
    """[*mesh, coordinates] of TPUs' places in their slice, or None."""
    if any(getattr(device, "coords", None) is None for device in mesh.devices.flat):
        return None
    places = np.array([device.coords for device in mesh.devices.flat])
    return places.reshape(*mesh.devices.shape, -1)
