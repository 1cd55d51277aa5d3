"""Mesh axes along which a step divides nothing, and the warning that says what they cost.

An axis is in use if the workers lie along it, the batch or any leaf of the state is divided over
it, or the traced loss says so: a sharding constraint or the spec of a ``shard_map`` names it, or a
collective or ``axis_index`` inside one does (a stage that picks its part by its own number). The
chain's update is left out: an exchange over axes that divide nothing is no use of them.
"""

import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jdml.sharding.fit import axes_of

PyTree = Any
UPDATE_SCOPE = "jdml.update"
"""The ``jax.named_scope`` of the chain's update, whose regions do not count."""


def unused_axes(mesh: Mesh, used: Iterable[str], arrays: PyTree) -> tuple[str, ...]:
    """Axes longer than 1 that are neither ``used`` nor divide a dim of any of the arrays."""
    taken = set(used)
    for x in jax.tree.leaves(arrays):
        sharding = getattr(x, "sharding", None)
        if isinstance(sharding, NamedSharding):
            taken |= _axes_of_spec(sharding.spec)
    return tuple(a for a, size in mesh.shape.items() if size > 1 and a not in taken)


def axes_in_jaxpr(jaxpr: Any) -> set[str]:
    """Axes that constraints, specs and collectives name, outside :data:`UPDATE_SCOPE`."""
    found: set[str] = set()
    for equation in equations(jaxpr):
        params = equation.params
        spec = getattr(params.get("sharding"), "spec", None)
        specs = [spec, *params.get("in_specs", ()), *params.get("out_specs", ())]
        for entry in specs:
            if isinstance(entry, PartitionSpec):
                found |= _axes_of_spec(entry)
        if equation.primitive.name in _TYPES_ONLY:
            continue
        for name in ("axes", "axis_name"):  # ints in reductions, names in collectives
            value = params.get(name, ())
            names = value if isinstance(value, (tuple, list, frozenset)) else (value,)
            found |= {axis for axis in names if isinstance(axis, str)}
    return found


_TYPES_ONLY = frozenset({"pvary", "pcast", "reduced_vary_cast"})


def equations(jaxpr: Any) -> Iterator[Any]:
    """Every equation, those of inner programs too, but for what is in :data:`UPDATE_SCOPE`."""
    for equation in jaxpr.eqns:
        if UPDATE_SCOPE in str(equation.source_info.name_stack):
            continue
        yield equation
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def warn_of_unused(mesh: Mesh, axes: tuple[str, ...]) -> None:
    """One warning for each axis: its size, what it costs, what to do."""
    for axis in axes:
        size = mesh.shape[axis]
        others = {a: n for a, n in mesh.shape.items() if a != axis}
        warnings.warn(
            f"make_step: nothing is divided over mesh axis {axis!r} of size {size}: neither "
            "workers nor batch, no parameter, no constraint in the loss. Each step does the same "
            f"work on {size} devices: 1/{size} of the tokens per second that they could do, and "
            f"no byte less on any of them. Divide the batch over it (batch_axes=({axis!r},)), or "
            "parameters (specs, rules), or build the mesh without it: make_mesh("
            f"{others or {'data': size}}).",
            stacklevel=3,
        )


def _axes_of_spec(spec: PartitionSpec) -> set[str]:
    return {axis for entry in spec for axis in axes_of(entry)}
