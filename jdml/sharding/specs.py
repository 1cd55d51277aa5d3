"""Specs: what a rule table makes of a model or a pytree.

One engine for NNX modules and states, Linen variables (boxed or not), train states, and bare
pytrees. Where the names of a leaf's dims come from, in this order:

1. the leaf's own metadata: ``out_sharding`` of an NNX variable, the names in a Linen box;
2. the first path pattern of the rules that matches (``Rules.for_paths``);
3. none: ``Rules.infer_fsdp`` divides the leaf if it is large; otherwise it stays whole.

Names are matched to dims from the last one back: dims that stacking put in front without a name
(``nnx.vmap`` without ``PARTITION_NAME``) stay whole.
"""

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from flax import nnx
from flax.core import meta
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jdml.sharding.fit import AnyMesh, Note, fit, log_notes, require_auto, shape_of
from jdml.sharding.optimizer import specs_like
from jdml.sharding.paths import as_pytree, leaves_with_paths, path_str
from jdml.sharding.rules import Names, OnIndivisible, Rules, entry_of, valid_policy

PyTree = Any

_NO_MATCH = object()


class Plan(NamedTuple):
    """Specs in the structure of the tree, and what was replicated or padded to get them."""

    specs: PyTree
    notes: tuple[Note, ...]


class Leaf(NamedTuple):
    """A leaf with the names of its dims, where it has any."""

    path: str
    value: Any
    names: Names | None


def specs(
    tree: PyTree, mesh: AnyMesh, rules: Rules, on_indivisible: OnIndivisible | None = None
) -> PyTree:
    """A ``PartitionSpec`` for every leaf, in the structure of the tree.

    Args:
      tree: an NNX module (the result has the structure of ``nnx.state(module)``), an NNX state,
        Linen variables, a train state (anything with ``params`` and ``opt_state``, whose optimiser
        state is laid out like its parameters), or any pytree of arrays or ``ShapeDtypeStruct``.
      mesh: the mesh whose axes the rules name.
      rules: logical names → mesh axes.
      on_indivisible: overrides that of the rules.

    Raises:
      ValueError: naming the leaf: an unknown name, an axis used twice or not in the mesh, a dim
        that its axes do not divide, or a leaf that no path pattern matches.
    """
    found = plan(tree, mesh, rules, on_indivisible)
    log_notes(list(found.notes))
    return found.specs


def plan(
    tree: PyTree, mesh: AnyMesh, rules: Rules, on_indivisible: OnIndivisible | None = None
) -> Plan:
    """``specs`` together with the list of what did not divide."""
    require_auto(mesh)
    if on_indivisible is not None:
        rules = rules.replace(on_indivisible=valid_policy(on_indivisible))
    tree = as_pytree(tree)
    notes: list[Note] = []
    params = _field(tree, "params")
    if params is None or _field(tree, "opt_state") is None:
        return Plan(_resolve(tree, mesh, rules, notes), tuple(notes))
    param_specs = _resolve(params, mesh, rules, notes, "params/")
    children, treedef = jax.tree_util.tree_flatten_with_path(
        tree, is_leaf=lambda node: node is not tree
    )
    found = []
    for path, child in children:
        prefix = f"{path_str(path)}/"
        if child is params:
            found.append(param_specs)
        elif prefix == "opt_state/":
            found.append(specs_like(child, params, param_specs))
        else:  # what mirrors the parameters (an average of them, say) is laid out like them
            mirrored = jax.tree.leaves(specs_like(child, params, param_specs, _NO_MATCH))
            found.append(_resolve(child, mesh, rules, notes, prefix, mirrored))
    return Plan(jax.tree.unflatten(treedef, found), tuple(notes))


def named_leaves(tree: PyTree) -> list[Leaf]:
    """Every leaf with its path and names, in the order of ``jax.tree.leaves``."""
    found: list[Leaf] = []
    for path, node in leaves_with_paths(tree, is_leaf=_is_box):
        if not _is_box(node):
            found.append(Leaf(path, node, None))
            continue
        inside = leaves_with_paths(node)
        names = _names_of(node) if len(inside) == 1 else None
        for sub, value in inside:
            found.append(Leaf(path if sub == "<root>" else f"{path}/{sub}", value, names))
    return found


def _resolve(
    tree: PyTree,
    mesh: AnyMesh,
    rules: Rules,
    notes: list[Note],
    prefix: str = "",
    mirrored: list[Any] | None = None,
) -> PyTree:
    leaves = [Leaf(prefix + path, value, names) for path, value, names in named_leaves(tree)]
    found = [
        known
        if known is not _NO_MATCH and leaf.names is None
        else _leaf_spec(leaf, mesh, rules, notes)
        for leaf, known in zip(leaves, mirrored or [_NO_MATCH] * len(leaves), strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(tree), found)


def _leaf_spec(leaf: Leaf, mesh: AnyMesh, rules: Rules, notes: list[Note]) -> P:
    path, value, names = leaf
    shape = shape_of(value)
    small = math.prod(shape) <= 1
    if names is None and rules.patterns and not small:
        names = _match(path, rules)
    if names is None and rules.inferred and math.prod(shape) >= rules.inferred.min_size:
        return _infer(path, shape, mesh, rules, notes)
    if not names:
        return P()
    if len(names) > len(shape):
        raise ValueError(
            f"{path}: {len(names)} names {names} for an array of shape {shape}; give one per dim"
        )
    names = (None,) * (len(shape) - len(names)) + names
    try:
        spec = rules.spec(names, mesh.axis_names)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return fit(path, shape, spec, mesh, rules.on_indivisible, notes)


def _match(path: str, rules: Rules) -> Names | None:
    for pattern, names in rules.patterns:
        if re.search(pattern, path):
            # An empty tuple says "whole" for good; None would let infer_fsdp have the leaf.
            return () if names is None else names
    if rules.inferred:
        return None
    raise ValueError(
        f"{path}: no path pattern matches this leaf; add a pattern for it, or '.*': None as the "
        "last one to leave the rest whole"
    )


def _infer(path: str, shape: tuple[int, ...], mesh: AnyMesh, rules: Rules, notes: list[Note]) -> P:
    assert rules.inferred is not None
    axis = rules.inferred.axis
    parts = mesh.shape.get(axis, 1)
    fits = [dim for dim, size in enumerate(shape) if size % parts == 0]
    # With no dim that divides, the largest one goes to ``fit``, which knows what is to be done.
    best = max(fits or range(len(shape)), key=lambda dim: (shape[dim], -dim))
    entries = [entry_of((axis,) if dim == best else ()) for dim in range(len(shape))]
    return fit(path, shape, P(*entries), mesh, rules.on_indivisible, notes)


def _is_box(x: Any) -> bool:
    return isinstance(x, (nnx.Variable, meta.AxisMetadata))


def _names_of(box: Any) -> Names | None:
    """The names that a Linen box or NNX variable gives to the dims of its array."""
    if not isinstance(box, nnx.Variable):
        given = getattr(box, "names", None)
        return None if given is None else tuple(given)
    if isinstance(box, nnx.RngState):
        return ()
    given = box.get_metadata().get("out_sharding")
    given = given.spec if isinstance(given, NamedSharding) else given
    if given is None:
        return None
    if isinstance(box, nnx.optimizer.OptState) and len(given) != len(shape_of(box.get_value())):
        return None  # a factored moment carries the names of its parameter, which has other dims
    return tuple(given)


def _field(tree: PyTree, name: str) -> PyTree | None:
    if isinstance(tree, Mapping):
        return tree.get(name)
    return getattr(tree, name, None)
