"""Optimiser state laid out like its parameters, for any Optax transformation.

Optax does not say which leaf of a state belongs to which parameter. Its key path does: a state
that maps over the parameters keeps their paths as suffixes of its own (``1/mu/layers/0/kernel``).
The longest suffix that is a parameter's path names the parameter; then its shape says the spec:
the parameter's own, also for a slice of it, one dim of which is shorter; less the entry of the dim
that is gone, for factored moments; with whole dims in front, for a history of several steps. What
fits none of these stays whole.

ZeRO (Rajbhandari et al. 2020, arXiv:1910.02054) divides over the data axis what plain data
parallelism keeps N times: with ``zero=1`` the optimiser state, with ``zero=2`` the gradients too.
"""

import math
from itertools import combinations
from typing import Any, Literal

import jax
from jax.sharding import PartitionSpec as P

from jdml.sharding.fit import AnyMesh, Note, axes_of, fit, log_notes, num_parts, shape_of
from jdml.sharding.paths import as_pytree, broadcast_specs, leaves_with_paths
from jdml.sharding.rules import OnIndivisible, entry_of

PyTree = Any
Zero = Literal[0, 1, 2]

_WHOLE = P()


def optimizer_specs(
    opt_state: PyTree,
    params: PyTree,
    param_specs: PyTree,
    zero: Zero = 0,
    mesh: AnyMesh | None = None,
    axis: str = "data",
    on_indivisible: OnIndivisible = "replicate",
) -> PyTree:
    """A ``PartitionSpec`` for every leaf of an Optax state, in its structure.

    Args:
      opt_state: the state, as arrays or ``jax.eval_shape(tx.init, params)``.
      params: the parameters (or their shapes) that it was made from.
      param_specs: their specs.
      zero: 0 for the parameters' layout; 1 or 2 to divide the state over ``axis`` as well.
      mesh: needed for ``zero``, and to lay out slices of parameters, whose dims it must divide.
      axis: the axis over which the parameters are replicated.
      on_indivisible: for ``zero``, what becomes of a parameter with no dim left that ``axis``
        divides: ``"replicate"`` (logged) or ``"error"``.
    """
    if zero:
        param_specs = zero_specs(params, param_specs, mesh, axis, on_indivisible)
    _check_zero(zero)
    return specs_like(opt_state, params, param_specs, mesh=mesh)


def gradient_specs(
    params: PyTree,
    param_specs: PyTree,
    zero: Zero = 0,
    mesh: AnyMesh | None = None,
    axis: str = "data",
    on_indivisible: OnIndivisible = "replicate",
) -> PyTree:
    """Specs of the gradients: the parameters', and with ``zero=2`` divided over ``axis`` too."""
    _check_zero(zero)
    if zero == 2:
        return zero_specs(params, param_specs, mesh, axis, on_indivisible)
    return param_specs


def zero_specs(
    params: PyTree,
    param_specs: PyTree,
    mesh: AnyMesh | None,
    axis: str = "data",
    on_indivisible: OnIndivisible = "replicate",
) -> PyTree:
    """The parameters' specs, each divided over ``axis`` as well.

    The largest whole dim that ``axis`` divides is taken, or else the divided dim with the largest
    parts that it divides. A spec that has the axis already stays as it is, and so does a leaf of
    one element.
    """
    if mesh is None or axis not in mesh.shape:
        have = None if mesh is None else dict(mesh.shape)
        raise ValueError(f"ZeRO divides over axis {axis!r}: expected mesh= to have it, got {have}")
    params = as_pytree(params)
    notes: list[Note] = []
    found = [
        _divide(path, shape_of(leaf), spec, mesh, axis, on_indivisible, notes)
        for (path, leaf), spec in zip(
            leaves_with_paths(params), broadcast_specs(param_specs, params), strict=True
        )
    ]
    log_notes(notes)
    return jax.tree.unflatten(jax.tree.structure(params), found)


def specs_like(
    tree: PyTree,
    params: PyTree,
    param_specs: PyTree,
    unmatched: Any = _WHOLE,
    mesh: AnyMesh | None = None,
) -> PyTree:
    """Specs for a tree whose leaves mirror parameters, found by path suffix and shape.

    ``unmatched`` is given to leaves whose path ends in no parameter's. Without ``mesh``, slices of
    parameters stay whole.
    """
    params, tree = as_pytree(params), as_pytree(tree)
    known = {
        tuple(path.split("/")): (shape_of(leaf), spec)
        for (path, leaf), spec in zip(
            leaves_with_paths(params), broadcast_specs(param_specs, params), strict=True
        )
    }
    root = known.get(("<root>",))
    found = []
    for path, leaf in leaves_with_paths(tree):
        parts = tuple(path.split("/"))
        suffixes = (parts[start:] for start in range(len(parts)))
        match = next((known[suffix] for suffix in suffixes if suffix in known), root)
        found.append(unmatched if match is None else _like(shape_of(leaf), *match, mesh))
    return jax.tree.unflatten(jax.tree.structure(tree), found)


def _like(shape: tuple[int, ...], param_shape: tuple[int, ...], spec: P, mesh: AnyMesh | None) -> P:
    if shape == param_shape or (mesh is not None and _is_slice(shape, param_shape, spec, mesh)):
        return spec
    entries = tuple(spec) + (None,) * (len(param_shape) - len(spec))
    extra = len(shape) - len(param_shape)
    if extra > 0 and param_shape and shape[extra:] == param_shape:
        return P(*(None,) * extra, *entries)
    # Two dims of one size leave two candidates; they must agree, or the leaf stays whole.
    fits = {
        entries[:dim] + entries[dim + 1 :]
        for dim in range(len(param_shape))
        if param_shape[:dim] + param_shape[dim + 1 :] == shape
    }
    return P(*fits.pop()) if len(fits) == 1 else P()


def _is_slice(shape: tuple[int, ...], param_shape: tuple[int, ...], spec: P, mesh: AnyMesh) -> bool:
    """Whether one dim is the part of one of so many as axes that the spec leaves free have.

    A low-rank factor has one shorter dim too, but not for a number of devices.
    """
    if len(shape) != len(param_shape) or 0 in shape:
        return False
    shares = [n / size for n, size in zip(param_shape, shape, strict=True) if size != n]
    used = {axis for entry in spec for axis in axes_of(entry)}
    free = [mesh.shape[axis] for axis in mesh.axis_names if axis not in used]
    owners = {math.prod(some) for k in range(len(free)) for some in combinations(free, k + 1)}
    return (
        len(shares) == 1
        and shares[0] in owners
        and all(size % num_parts(e, mesh) == 0 for size, e in zip(shape, spec, strict=False))
    )


def _divide(
    path: str,
    shape: tuple[int, ...],
    spec: P,
    mesh: AnyMesh,
    axis: str,
    on_indivisible: OnIndivisible,
    notes: list[Note],
) -> P:
    entries = list(spec) + [None] * (len(shape) - len(spec))
    if math.prod(shape) <= 1 or any(axis in axes_of(entry) for entry in entries):
        return spec
    part = [size // num_parts(entry, mesh) for size, entry in zip(shape, entries, strict=True)]
    fits = [dim for dim, size in enumerate(part) if size % mesh.shape[axis] == 0]
    best = max(fits or range(len(shape)), key=lambda dim: (entries[dim] is None, part[dim], -dim))
    entries[best] = entry_of((*axes_of(entries[best]), axis))
    divided = P(*entries)
    # Where nothing fits, ``fit`` reports or raises, and the leaf keeps its parameter's layout.
    fit(path, shape, divided, mesh, on_indivisible, notes)
    return divided if fits else spec


def _check_zero(zero: int) -> None:
    if zero not in (0, 1, 2):
        raise ValueError(
            f"zero must be 0, 1 or 2, got {zero!r}; stage 3 divides the parameters themselves: "
            "that is the FSDP preset"
        )
