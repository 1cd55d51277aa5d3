"""Whether a spec fits an array and a mesh, and what to do when it does not."""

import logging
import math
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh
from jax.sharding import PartitionSpec as P

from jdml.sharding.rules import OnIndivisible

AnyMesh = Mesh | AbstractMesh

_log = logging.getLogger("jdml.sharding")


class Note(NamedTuple):
    """A dim that its axes do not divide, and what became of it."""

    path: str
    dim: int
    size: int
    axes: tuple[str, ...]
    parts: int
    action: OnIndivisible

    def __str__(self) -> str:
        over = f"{' × '.join(self.axes)} = {self.parts}"
        if self.action == "pad":
            padded = -(-self.size // self.parts) * self.parts
            return f"{self.path}: dim {self.dim} padded from {self.size} to {padded} ({over})"
        return f"{self.path}: dim {self.dim} of size {self.size} left whole ({over} not a divisor)"


def axes_of(entry: Any) -> tuple[str, ...]:
    """The mesh axes in one entry of a spec."""
    if entry is None or entry is P.UNCONSTRAINED:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)


def num_parts(entry: Any, mesh: AnyMesh) -> int:
    """Into how many parts an entry of a spec divides its dim."""
    return math.prod(mesh.shape[axis] for axis in axes_of(entry))


def fit(
    path: str,
    shape: tuple[int, ...],
    spec: P,
    mesh: AnyMesh,
    on_indivisible: OnIndivisible = "error",
    notes: list[Note] | None = None,
) -> P:
    """The spec, once it is known that the mesh has its axes and that they divide the dims.

    Args:
      path: of the leaf, for the message.
      shape: of the leaf.
      spec: what is asked.
      mesh: the mesh.
      on_indivisible: as in ``Rules``; with ``"replicate"`` the entry becomes None.
      notes: what was replicated or padded is appended here.
    """
    if len(spec) > len(shape):
        raise ValueError(
            f"{path}: {spec} has {len(spec)} entries, the array of shape {shape} only "
            f"{len(shape)} dims; give one entry per dim"
        )
    entries = list(spec)
    for dim, entry in enumerate(spec):
        if entry is None or entry is P.UNCONSTRAINED:
            continue
        axes = axes_of(entry)
        for axis in axes:
            if axis not in mesh.shape:
                raise ValueError(
                    f"{path}: dim {dim} of shape {shape} is to be divided over axis {axis!r}, "
                    f"which the mesh {dict(mesh.shape)} does not have; add {axis!r}: 1 to the "
                    "mesh, or map the name to an axis that it has, or to None"
                )
        parts = num_parts(entry, mesh)
        if shape[dim] % parts == 0:
            continue
        note = Note(path, dim, shape[dim], axes, parts, on_indivisible)
        if on_indivisible == "error":
            over = " × ".join(f"{axis!r} (size {mesh.shape[axis]})" for axis in axes)
            raise ValueError(
                f"{path}: dim {dim} of shape {shape} has size {shape[dim]}, which mesh axis {over} "
                f"does not divide; {_nearest(shape[dim], parts)}; or leave this dim whole by "
                "mapping its name to None or with on_indivisible='replicate'"
            )
        if notes is not None:
            notes.append(note)
        if on_indivisible == "replicate":
            entries[dim] = None
    return P(*entries)


def _nearest(size: int, parts: int) -> str:
    """The nearest sizes that so many parts divide, and the most parts that divide this one."""
    below = size // parts * parts
    sizes = " or ".join(str(n) for n in (below, below + parts) if n > 0)
    fewer = max(n for n in range(1, parts) if size % n == 0)
    return f"make it {sizes}" + (f"; divide it over {fewer}" if fewer > 1 else "")


def log_notes(notes: list[Note]) -> None:
    """Nothing is replicated or padded without a word."""
    for note in notes:
        _log.warning("%s", note)


def padded_shape(shape: tuple[int, ...], spec: P, mesh: AnyMesh) -> tuple[int, ...]:
    """The shape with each dim rounded up to what its axes divide."""
    parts = [num_parts(entry, mesh) for entry in spec] + [1] * (len(shape) - len(spec))
    return tuple(-(-size // n) * n for size, n in zip(shape, parts, strict=True))


def require_auto(mesh: AnyMesh) -> None:
    """Raises unless every axis is ``Auto``: on others JAX's own types decide the layout."""
    if any(kind != AxisType.Auto for kind in mesh.axis_types):
        kinds = dict(zip(mesh.axis_names, (str(k) for k in mesh.axis_types), strict=True))
        raise ValueError(
            f"expected a mesh with Auto axes, got {kinds}; jax.make_mesh makes Explicit axes "
            "unless told otherwise: use jdml.sharding.make_mesh, or pass axis_types"
        )


def shape_of(leaf: Any) -> tuple[int, ...]:
    """The shape of an array, an abstract array, or a Python number."""
    return tuple(leaf.shape) if hasattr(leaf, "shape") else np.shape(leaf)
