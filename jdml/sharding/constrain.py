"""Annotating activations by logical names, under rules that the caller sets.

The context is one of JAX's user contexts, so it is part of every jit cache key: a function traced
under one rule table is traced again under another, instead of keeping the first one's layout.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jdml.sharding.rules import Rules
from jdml.sharding.specs import axes_of, check_fits


class _Context(NamedTuple):
    mesh: Mesh | None
    rules: Rules
    hide: frozenset[str]


_context = jax.make_user_context(None)


@contextmanager
def use_rules(mesh: Mesh, rules: Rules, hide: Iterable[str] = ()) -> Iterator[None]:
    """``constrain`` follows these rules inside.

    Args:
      mesh: the mesh that activations live on.
      rules: logical names → mesh axes; its entries ``for_activations`` go first.
      hide: mesh axes that are mapped already (``vmap(spmd_axis_name=...)``): dropped from specs.
    """
    with _context(_Context(mesh, rules.activations, frozenset(hide))):
        yield


@contextmanager
def no_mesh() -> Iterator[None]:
    """``constrain`` is the identity inside: for one device, or a test of the model alone."""
    with _context(_Context(None, Rules(), frozenset())):
        yield


def constrain(x: jax.Array, *names: Any) -> jax.Array:
    """``x`` with its layout pinned by the names of its dims, under the current rules.

    Args:
      x: array; under ``vmap`` the mapped dim is not counted.
      *names: one per dim: a logical name, a tuple of names, or None (whole).

    Raises:
      ValueError: outside ``use_rules`` and ``no_mesh``, for a wrong number of names, or as
        ``specs`` does.
    """
    context = _context.value
    if context is None:
        raise ValueError(
            f"constrain{names}: no rules are in force; wrap the call in use_rules(mesh, rules), "
            "or in no_mesh() if no mesh is meant"
        )
    if context.mesh is None:
        return x
    where = f"constrain{names}"
    if len(names) != x.ndim:
        raise ValueError(f"{where}: {len(names)} names for an array of shape {x.shape}")
    spec = context.rules.spec(names, context.mesh.axis_names)
    current = jax.sharding.get_abstract_mesh()
    manual = {
        name
        for name, kind in zip(current.axis_names, current.axis_types, strict=True)
        if kind == AxisType.Manual
    }
    spec = _without(spec, context.hide | manual)
    check_fits(where, x.shape, spec, context.mesh)
    if manual:
        return jax.lax.with_sharding_constraint(x, spec)
    return jax.lax.with_sharding_constraint(x, NamedSharding(context.mesh, spec))


def _without(spec: P, hidden: frozenset[str]) -> P:
    if not hidden:
        return spec
    entries: list[Any] = []
    for entry in spec:
        axes = tuple(axis for axis in axes_of(entry) if axis not in hidden)
        kept = axes[0] if len(axes) == 1 else axes or None
        entries.append(entry if entry is P.UNCONSTRAINED else kept)
    return P(*entries)
