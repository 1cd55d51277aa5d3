"""A table of what lies where: shape, dtype, spec, bytes per device, and what is kept many times."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding, Sharding
from jax.sharding import PartitionSpec as P
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from jdml.sharding.check import spec_text
from jdml.sharding.fit import AnyMesh, Note, num_parts, padded_shape, shape_of
from jdml.sharding.paths import as_pytree, broadcast_specs, leaves_with_paths
from jdml.sharding.rules import OnIndivisible, Rules
from jdml.sharding.specs import plan

PyTree = Any


class Row(NamedTuple):
    """One leaf; sizes in bytes. ``copies`` devices hold the same part of it."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    spec: str
    num_bytes: int
    bytes_per_device: int
    copies: int
    replicated: bool


@dataclass(frozen=True)
class Description:
    """The table; ``print`` it, or give it to rich."""

    rows: tuple[Row, ...]
    notes: tuple[Note, ...]
    num_devices: int
    flag_bytes: int

    @property
    def num_bytes(self) -> int:
        """Bytes of all leaves, each counted once."""
        return sum(row.num_bytes for row in self.rows)

    @property
    def bytes_per_device(self) -> int:
        """Bytes that a device holds (the fullest one)."""
        return sum(row.bytes_per_device for row in self.rows)

    @property
    def replicated_bytes(self) -> int:
        """Bytes per device of leaves that every device holds whole."""
        return sum(row.bytes_per_device for row in self.rows if row.replicated)

    def __rich__(self) -> RenderableType:
        table = Table(title_justify="left", pad_edge=False)
        table.add_column("leaf", overflow="fold")
        table.add_column("shape")
        table.add_column("dtype")
        table.add_column("spec", overflow="fold")
        table.add_column("bytes/device", justify="right")
        table.add_column("copies", justify="right")
        table.add_column("")
        for row in self.rows:
            flagged = row.replicated and row.bytes_per_device >= self.flag_bytes
            table.add_row(
                Text(row.path),
                Text(" × ".join(map(str, row.shape)) or "scalar"),
                Text(row.dtype),
                Text(row.spec),
                f"{row.bytes_per_device:,}",
                str(row.copies),
                "replicated !" if flagged else "replicated" if row.replicated else "",
                style="yellow" if flagged else None,
            )
        share = self.replicated_bytes / self.bytes_per_device if self.bytes_per_device else 0.0
        total = (
            f"{len(self.rows)} leaves, {_human(self.num_bytes)}; "
            f"{_human(self.bytes_per_device)} per device on {self.num_devices} "
            f"device{'s' if self.num_devices > 1 else ''}, "
            f"of which {_human(self.replicated_bytes)} ({share:.0%}) replicated"
        )
        return Group(table, Text(total), *(Text(f"note: {note}") for note in self.notes))

    def __str__(self) -> str:
        console = Console(width=120, color_system=None, force_terminal=False)
        with console.capture() as capture:
            console.print(self)
        return "\n".join(line.rstrip() for line in capture.get().splitlines())


def describe(
    tree: PyTree,
    mesh: AnyMesh | None = None,
    rules: Rules | PyTree | None = None,
    *,
    on_indivisible: OnIndivisible | None = None,
    flag_bytes: int = 2**16,
) -> Description:
    """A printable table of a tree's layout.

    ``describe(tree)`` tells where arrays are. ``describe(tree, mesh, rules)`` tells where they
    would be, for arrays of any kind, abstract ones too, and lists every dim that does not divide.

    Args:
      tree: an NNX module, or any pytree of arrays.
      mesh: for the second form.
      rules: a rule table, or the specs themselves.
      on_indivisible: overrides that of the rules.
      flag_bytes: leaves that every device holds whole are flagged from this size on.
    """
    tree = as_pytree(tree)
    notes: tuple[Note, ...] = ()
    if (mesh is None) != (rules is None):
        raise ValueError("describe takes mesh and rules (or specs) together, or neither")
    if mesh is None:
        rows = [_placed(path, leaf) for path, leaf in leaves_with_paths(tree)]
        found = [_num_devices(leaf) for leaf in jax.tree.leaves(tree)]
        return Description(tuple(rows), notes, max(found, default=1), flag_bytes)
    specs = rules
    if isinstance(rules, Rules):
        specs, notes = plan(tree, mesh, rules, on_indivisible)
    rows = [
        _planned(path, leaf, spec, mesh)
        for (path, leaf), spec in zip(
            leaves_with_paths(tree), broadcast_specs(specs, tree), strict=True
        )
    ]
    return Description(tuple(rows), notes, mesh.size, flag_bytes)


def _planned(path: str, leaf: Any, spec: P, mesh: AnyMesh) -> Row:
    shape = padded_shape(shape_of(leaf), spec, mesh)
    parts = math.prod(num_parts(entry, mesh) for entry in spec)
    return _row(path, shape, leaf, str(spec), math.prod(shape) // parts, mesh.size, parts)


def _placed(path: str, leaf: Any) -> Row:
    sharding = getattr(leaf, "sharding", None)
    shape = shape_of(leaf)
    if not isinstance(sharding, Sharding):
        return _row(path, shape, leaf, "host", math.prod(shape), 1, 1)
    shard = math.prod(sharding.shard_shape(shape))
    parts = math.prod(shape) // shard if shard else 1
    if isinstance(sharding, NamedSharding):
        parts = math.prod(num_parts(entry, sharding.mesh) for entry in sharding.spec)
    return _row(path, shape, leaf, spec_text(sharding), shard, _num_devices(leaf), parts)


def _row(
    path: str,
    shape: tuple[int, ...],
    leaf: Any,
    spec: str,
    shard_size: int,
    num_devices: int,
    num_parts: int,
) -> Row:
    dtype = leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype
    return Row(
        path=path,
        shape=shape,
        dtype=str(dtype),
        spec=spec,
        num_bytes=math.prod(shape) * dtype.itemsize,
        bytes_per_device=shard_size * dtype.itemsize,
        copies=num_devices // num_parts,
        replicated=num_devices > 1 and num_parts == 1,
    )


def _num_devices(leaf: Any) -> int:
    sharding = getattr(leaf, "sharding", None)
    return sharding.num_devices if isinstance(sharding, Sharding) else 1


def _human(num_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"
