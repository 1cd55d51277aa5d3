"""Specs: what a rule table makes of a model or a pytree.

One engine for NNX modules and states, Linen variables (boxed or not), and bare pytrees. Where a
leaf's names come from: its own metadata (``out_sharding``, a Linen box), else the first path
pattern of the rules that matches, else nothing, and the leaf is whole on every device.
"""

import math
import re
from typing import Any

import jax
import numpy as np
from flax import nnx
from flax.core import meta
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jdml.sharding.paths import leaves_with_paths
from jdml.sharding.rules import Rules

PyTree = Any


def specs(tree: PyTree, mesh: Mesh, rules: Rules) -> PyTree:
    """A ``PartitionSpec`` for every leaf, in the structure of the tree.

    Args:
      tree: an NNX module (the result has the structure of ``nnx.state(module)``), an NNX state,
        Linen variables, or any pytree of arrays or ``ShapeDtypeStruct``s.
      mesh: the mesh whose axes the rules name.
      rules: logical names → mesh axes.

    Raises:
      ValueError: naming the leaf: an unknown name, an axis used twice or not in the mesh, or a
        dim that its axes do not divide.
    """
    tree = as_pytree(tree)
    treedef = jax.tree.structure(tree)
    return jax.tree.unflatten(
        treedef,
        [leaf_spec(path, np.shape(leaf), names, mesh, rules) for path, leaf, names in named(tree)],
    )


def as_pytree(tree: PyTree) -> PyTree:
    """An NNX module's state; anything else as it is."""
    return nnx.state(tree) if isinstance(tree, nnx.Module) else tree


def is_box(x: Any) -> bool:
    """Whether ``x`` wraps an array with metadata: an NNX variable or a Linen box."""
    return isinstance(x, (nnx.Variable, meta.AxisMetadata))


def named(tree: PyTree) -> list[tuple[str, Any, tuple[Any, ...] | None]]:
    """``(path, array, names of its dims or None)`` of every leaf, in the order of its leaves."""
    found: list[tuple[str, Any, tuple[Any, ...] | None]] = []
    for path, node in leaves_with_paths(tree, is_leaf=is_box):
        if not is_box(node):
            found.append((path, node, None))
            continue
        inside = leaves_with_paths(node)
        names = names_of(node) if len(inside) == 1 else None
        for sub, leaf in inside:
            found.append((path if sub == "<root>" else f"{path}/{sub}", leaf, names))
    return found


def names_of(box: Any) -> tuple[Any, ...] | None:
    """The names that a box or NNX variable gives to the dims of its array."""
    if isinstance(box, nnx.Variable):
        given = box.get_metadata().get("out_sharding")
        if isinstance(given, NamedSharding):
            given = given.spec
    else:
        given = getattr(box, "names", None)
    return tuple(given) if given else None


def leaf_spec(
    path: str, shape: tuple[int, ...], names: tuple[Any, ...] | None, mesh: Mesh, rules: Rules
) -> P:
    """The spec of one leaf, checked against its shape and the mesh."""
    if names is None and rules._patterns and math.prod(shape) > 1:
        names = _match(path, rules)
    if names is None:
        return P()
    try:
        spec = rules.spec(_align(names, shape), mesh.axis_names)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    check_fits(path, shape, spec, mesh)
    return spec


def _match(path: str, rules: Rules) -> tuple[Any, ...] | None:
    for pattern, names in rules._patterns:
        if re.search(pattern, path):
            return names
    raise ValueError(
        f"{path}: no path pattern matches this leaf; add a pattern for it, or '.*': None as the "
        "last pattern to leave the rest whole"
    )


def _align(names: tuple[Any, ...], shape: tuple[int, ...]) -> tuple[Any, ...]:
    """Names for every dim: dims that stacking has put in front have none."""
    if len(names) > len(shape):
        raise ValueError(f"{len(names)} names {names} for an array of shape {shape}")
    return (None,) * (len(shape) - len(names)) + names


def axes_of(entry: Any) -> tuple[str, ...]:
    """The mesh axes in one entry of a spec."""
    if entry is None or entry is P.UNCONSTRAINED:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)


def check_fits(path: str, shape: tuple[int, ...], spec: P, mesh: Mesh) -> None:
    """Raises unless the mesh has every axis of the spec and each divides its dim."""
    if len(spec) > len(shape):
        raise ValueError(f"{path}: {spec} has {len(spec)} entries for an array of shape {shape}")
    for dim, entry in enumerate(spec):
        axes = axes_of(entry)
        for axis in axes:
            if axis not in mesh.shape:
                raise ValueError(
                    f"{path}: dim {dim} is to be divided over axis {axis!r}, which the mesh "
                    f"{dict(mesh.shape)} does not have; add {axis!r}: 1 to the mesh, or map the "
                    "name to another axis or None"
                )
        parts = math.prod(mesh.shape[axis] for axis in axes)
        if shape[dim] % parts:
            wanted = " × ".join(f"{axis!r} ({mesh.shape[axis]})" for axis in axes)
            raise ValueError(
                f"{path}: dim {dim} of shape {shape} has size {shape[dim]}, which axis {wanted} "
                f"does not divide; choose a multiple of {parts} for it, or leave the dim whole by "
                "mapping its name to None"
            )
