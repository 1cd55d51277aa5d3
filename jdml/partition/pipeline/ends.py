"""The ends' parameters divided over the stages: each leaf's layout, and its way there and back.

One stage computes with the initial part and one with the final part, but all run one program, so
that none can hold what others do not. What is kept from step to step can be divided all the same: a
stage holds a slice of each leaf, gathers them before its first tick, and is left with the sum of
its slices' gradients after the last one. This is what ZeRO (Rajbhandari et al. 2020,
arXiv:1910.02054) does over the data axis.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jdml.sharding.constrain import manual_axes, without
from jdml.sharding.fit import axes_of, num_parts, shape_of
from jdml.sharding.paths import broadcast_specs, leaves_with_paths
from jdml.sharding.rules import entry_of

PyTree = Any
Ends = Mapping[str, P]
"""The specs of the divided leaves, stage axis and all, by path."""


def divided_ends(others: PyTree, specs: PyTree, mesh: Mesh, axis: str) -> Ends:
    """The stage axis put on each leaf's largest dim that no other axis divides and the stages do.

    Leaves that have no such dim, or the axis already, are left out.
    """
    num_stages = mesh.shape[axis]
    ends: dict[str, P] = {}
    found = zip(leaves_with_paths(others), broadcast_specs(specs, others), strict=True)
    for (path, x), spec in found:
        shape = shape_of(x)
        entries = [*(spec or P()), *(None,) * len(shape)][: len(shape)]
        free = [
            dim
            for dim, (size, entry) in enumerate(zip(shape, entries, strict=True))
            if num_parts(entry, mesh) == 1 and size and size % num_stages == 0
        ]
        if free and num_stages > 1 and all(axis not in axes_of(entry) for entry in entries):
            dim = max(free, key=lambda dim: shape[dim])
            entries[dim] = entry_of((axis, *axes_of(entries[dim])))
            ends[path] = P(*entries)
    return ends


def dim_of(spec: P, axis: str) -> int:
    """The dim that the axis divides."""
    return next(dim for dim, entry in enumerate(spec) if axis in axes_of(entry))


def check_specs(specs: PyTree, ends: Ends, axis: str) -> None:
    """The specs are those that ``divided_ends`` was given."""
    for path, spec in leaves_with_paths(specs, is_leaf=lambda x: isinstance(x, P)):
        if path in ends and _trimmed(spec) != _trimmed(without(ends[path], frozenset({axis}))):
            raise ValueError(
                f"pipeline: leaf {path!r} has spec {spec}, but divide_ends made {ends[path]} of "
                "another one. Give both the same specs."
            )


def manual_specs(others: PyTree, ends: Ends, axis: str) -> PyTree:
    """Of each leaf over the stage axis alone, as ``jax.shard_map`` is told."""
    leaves = [
        P(*(None,) * dim_of(ends[path], axis), axis) if path in ends else P()
        for path, _ in leaves_with_paths(others)
    ]
    return jax.tree.unflatten(jax.tree.structure(others), leaves)


def gathered(others: PyTree, ends: Ends, mesh: Mesh, axis: str) -> PyTree:
    """The whole leaves, from each stage's slices."""

    def whole(path: str, x: jax.Array) -> jax.Array:
        if path not in ends:
            return x
        dim = dim_of(ends[path], axis)
        gather = lambda x: jax.lax.all_gather(x, axis, axis=dim, tiled=True)  # noqa: E731
        return _on_shards(gather, x, ends[path], mesh)

    leaves = [whole(path, x) for path, x in leaves_with_paths(others)]
    return jax.tree.unflatten(jax.tree.structure(others), leaves)


def summed(
    totals: PyTree, gradients: PyTree, ends: Ends, mesh: Mesh, axis: str
) -> tuple[PyTree, PyTree]:
    """Both summed over the stages: a slice of a divided leaf, all else whole, in one all-reduce."""
    leaves = leaves_with_paths(gradients)
    totals, kept = jax.lax.psum((totals, [x for path, x in leaves if path not in ends]), axis)
    rest = iter(kept)

    def share(path: str, x: jax.Array) -> jax.Array:
        if path not in ends:
            return next(rest)
        dim = dim_of(ends[path], axis)
        scatter = lambda x: jax.lax.psum_scatter(  # noqa: E731
            x, axis, scatter_dimension=dim, tiled=True
        )
        return _on_shards(scatter, x, ends[path], mesh)

    sums = [share(path, x) for path, x in leaves]
    return totals, jax.tree.unflatten(jax.tree.structure(gradients), sums)


def _on_shards(f: Callable[[jax.Array], jax.Array], x: jax.Array, spec: P, mesh: Mesh) -> jax.Array:
    """``f`` of what each device stores of a leaf, with all axes manual that divide it.

    Left automatic, they would have the partitioner put the leaf together first.
    """
    held = manual_axes()
    named = {axis for entry in spec for axis in axes_of(entry) if mesh.shape[axis] > 1}
    free = [axis for axis in mesh.axis_names if axis in named - held]
    nested = [*(axis for axis in mesh.axis_names if axis in held), *free]
    # Of regions whose axes are not in the mesh's order, libtpu's compiler ends the process.
    if not free or nested != sorted(nested, key=mesh.axis_names.index):
        return f(x)
    within = without(spec, frozenset(mesh.axis_names) - frozenset(free))
    region = jax.shard_map(
        f, in_specs=within, out_specs=within, axis_names=set(free), check_vma=False
    )
    return region(x)


def _trimmed(spec: P) -> list[Any]:
    entries = list(spec)
    while entries and entries[-1] is None:
        entries.pop()
    return entries
