"""Annotating activations by logical names, under rules that the caller sets.

    with use_rules(mesh, rules):          # in the step; costs a few microseconds
        loss = model(x)                   # whose code says constrain(h, "batch", "seq", "embed")

The context is one of JAX's user contexts, so it is part of every jit cache key: a function traced
under one rule table is traced again under another, instead of keeping the first one's layout.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jdml.sharding.fit import axes_of, fit, require_auto
from jdml.sharding.rules import OnIndivisible, Rules, entry_of


class Context(NamedTuple):
    """What ``use_rules`` was given.

    Attributes:
      mesh: None in ``no_mesh``.
      rules: As activations see them.
      hide: Axes that a ``vmap`` around maps over.
      stored: The rules as parameters see them.
    """

    mesh: Mesh | None
    rules: Rules
    hide: frozenset[str]
    stored: Rules


_context = jax.make_user_context(None)
_NO_MESH = Context(None, Rules(), frozenset(), Rules())


@contextmanager
def use_rules(mesh: Mesh, rules: Rules, hide: Iterable[str] = ()) -> Iterator[None]:
    """``constrain`` follows these rules inside.

    Flax's own eager placement of annotated variables is off inside: ``init`` places them.

    Args:
      mesh: the mesh that activations live on.
      rules: logical names → mesh axes; its entries ``for_activations`` go first. A wholly separate
        table for activations may be given instead.
      hide: mesh axes that are mapped already (``vmap(spmd_axis_name=...)``): dropped from specs.
    """
    require_auto(mesh)
    context = Context(mesh, rules.activations, frozenset(hide), rules)
    unknown = context.hide - set(mesh.axis_names)
    if unknown:
        raise ValueError(
            f"use_rules: cannot hide {sorted(unknown)}, the mesh has {mesh.axis_names}"
        )
    with _context(context), nnx.use_eager_sharding(False):
        yield


@contextmanager
def no_mesh() -> Iterator[None]:
    """``constrain`` is the identity inside: for one device, or a test of the model alone."""
    with _context(_NO_MESH), nnx.use_eager_sharding(False):
        yield


def constrain(x: jax.Array, *names: Any) -> jax.Array:
    """``x`` with its layout pinned by the names of its dims, under the current rules.

    Inside ``shard_map`` the manual axes are dropped, inside ``use_rules(..., hide=...)`` the
    hidden ones. A dim that its axes do not divide is left whole under
    ``on_indivisible="replicate"`` and an error otherwise: activations are never padded.

    Args:
      x: array; under ``vmap`` the mapped dim is not counted.
      *names: one per dim: a logical name, a tuple of names, or None (whole).

    Raises:
      ValueError: outside ``use_rules`` and ``no_mesh``, for a wrong number of names, an unknown
        name, an axis used twice, or a dim that its axes do not divide.
    """
    where = f"constrain{names}"
    mesh, rules, hide, _ = current_context(where)
    if len(names) != x.ndim:
        raise ValueError(
            f"{where}: {len(names)} names for an array of shape {x.shape}; give one per dim, None "
            "for a dim that stays whole"
        )
    if mesh is None:
        return x
    try:
        spec = rules.spec(names, mesh.axis_names)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    manual = manual_axes()
    policy: OnIndivisible = "replicate" if rules.on_indivisible == "replicate" else "error"
    spec = fit(where, x.shape, without(spec, hide | manual), mesh, policy)
    if P.UNCONSTRAINED in spec and manual.issuperset(mesh.axis_names):
        return x  # no axis is left to leave to the partitioner, and JAX refuses to
    try:
        # In a manual region the mesh is the surrounding one, which only a bare spec refers to.
        return jax.lax.with_sharding_constraint(x, spec if manual else NamedSharding(mesh, spec))
    except ValueError as error:
        if "spmd_axis_name" not in str(error):
            raise
        raise ValueError(
            f"{where}: {spec} names an axis over which a surrounding vmap maps already; "
            f"enter use_rules(mesh, rules, hide=(<axis>,)) inside that vmap ({error})"
        ) from None


def current_context(where: str) -> Context:
    """What the rules around a call are; ``ValueError``, naming ``where``, if there are none."""
    context = _context.value
    if context is None:
        raise ValueError(
            f"{where}: no rules are in force; wrap the call in use_rules(mesh, rules), or in "
            "no_mesh() if no mesh is meant"
        )
    return context


def manual_axes() -> frozenset[str]:
    """Mesh axes over which a surrounding ``shard_map`` is manual."""
    mesh = jax.sharding.get_abstract_mesh()
    return frozenset(
        name
        for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind == AxisType.Manual
    )


def automatic_axes() -> tuple[str, ...]:
    """Axes longer than 1 that a surrounding ``shard_map`` leaves automatic; ``()`` outside one."""
    if not manual_axes():
        return ()
    mesh = jax.sharding.get_abstract_mesh()
    return tuple(
        name
        for (name, size), kind in zip(mesh.shape.items(), mesh.axis_types, strict=True)
        if kind == AxisType.Auto and size > 1
    )


def without(spec: P, hidden: frozenset[str]) -> P:
    """The spec with these axes left out."""
    if not hidden:
        return spec
    return P(
        *(
            entry
            if entry is None or entry is P.UNCONSTRAINED
            else entry_of(axis for axis in axes_of(entry) if axis not in hidden)
            for entry in spec
        )
    )
