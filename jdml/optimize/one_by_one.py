"""Why samples or columns of some rows cannot be taken one by one."""

from typing import Any, Literal

import jax
from jax.sharding import NamedSharding

from jdml.optimize.base import Problem


def one_by_one_refusal(problem: Problem, what: Literal["samples", "columns"]) -> str | None:
    """Of a method that takes single ``what`` by number; None where all rows are on one device.

    Of rows over a mesh the compiler would make an all-reduce of each draw: a pass is then n of
    them, or d, where a method of whole passes has one or two. The answer would be right, and late.
    """
    rows = problem.rows
    if axes := mesh_axes(rows):
        names = ", ".join(map(repr, axes))
        return (
            f"it takes {what} one by one, and the rows are divided over the mesh axis {names}, so "
            "that each would be an exchange over the mesh; those of jdml.aggregate.linear whose "
            "workers keep to their own (cocoa, feature_cocoa) want "
            "jdml.models.linear.divide(problem, …)"
        )
    if hasattr(rows, "grid"):
        return (
            f"it takes {what} one by one, and the rows are divided into {rows.grid[0]} × "
            f"{rows.grid[1]} blocks; give it the problem as it was before that"
        )
    if not hasattr(rows, "in_turn"):
        return (
            "no single rows or columns can be taken of a stream; jdml.partition.sources."
            "StreamBatches makes mini-batches of it"
        )
    return None


def mesh_axes(rows: Any) -> tuple[str, ...]:
    """Mesh axes, of more than one device, over which arrays of the rows are divided."""
    found: dict[str, None] = {}
    for leaf in jax.tree.leaves(rows):
        placed = None if isinstance(leaf, jax.core.Tracer) else getattr(leaf, "sharding", None)
        if not isinstance(placed, NamedSharding):
            continue
        for entry in placed.spec:
            axes = entry if isinstance(entry, tuple) else (entry,)
            found |= {axis: None for axis in axes if axis and placed.mesh.shape[axis] > 1}
    return tuple(found)
