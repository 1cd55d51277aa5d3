"""Rules: logical names of dims → mesh axes. One engine for NNX, Linen, and plain pytrees.

Precedence, first match wins: the pairs in the order given, then the keywords. A name that no rule
mentions stands for the mesh axis of that name, if the mesh has one; anything else is an error. An
axis may appear once in a spec; a second use is an error, never dropped.

Parameters and activations often differ (FSDP divides a weight's ``embed`` dim and not the
activation's): ``rules.for_activations(embed=None)`` keeps the parameters' rules and puts these
entries before them wherever ``constrain`` looks a name up.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from jax.sharding import PartitionSpec as P

Axis = str | tuple[str, ...] | None
Names = tuple[Any, ...] | None


class Rules:
    """Logical name → mesh axis, tuple of axes, or None; frozen and hashable.

    Args:
      *pairs: ``(name, axis)``, looked up first and in order: the first match wins.
      **axes: the same as keywords, looked up after the pairs.
    """

    __slots__ = ("_activations", "_hash", "_infer", "_lookup", "_patterns", "_table")

    def __init__(self, *pairs: tuple[str, Axis], **axes: Axis):
        self._set(tuple(pairs) + tuple(axes.items()))

    def _set(
        self,
        table: Iterable[tuple[str, Axis]],
        activations: tuple[tuple[str, Axis], ...] = (),
        patterns: tuple[tuple[str, Names], ...] = (),
        infer: tuple[str, int] | None = None,
    ) -> None:
        put = object.__setattr__
        table = tuple(_pair(pair) for pair in table)
        put(self, "_table", table)
        put(self, "_activations", activations)
        put(self, "_patterns", patterns)
        put(self, "_infer", infer)
        put(self, "_lookup", dict(reversed(table)))
        # A rule context takes part in the cache key of every jitted call: hash once.
        put(self, "_hash", hash((table, activations, patterns, infer)))

    def _with(self, **changes: Any) -> "Rules":
        fields: dict[str, Any] = {
            "table": self._table,
            "activations": self._activations,
            "patterns": self._patterns,
            "infer": self._infer,
        }
        new = object.__new__(Rules)
        new._set(**(fields | changes))
        return new

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError("Rules is frozen; use .replace(name=axis)")

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Rules) and self._key() == other._key()

    def _key(self) -> tuple[Any, ...]:
        return (self._table, self._activations, self._patterns, self._infer)

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuild, self._key())

    def __repr__(self) -> str:
        return f"Rules({', '.join(f'{name}={axis!r}' for name, axis in self._table)})"

    def replace(self, **axes: Axis) -> "Rules":
        """These rules with some names mapped anew."""
        return self._with(table=tuple(axes.items()) + self._table)

    def for_activations(self, **axes: Axis) -> "Rules":
        """These rules, with entries that hold for activations only."""
        pairs = tuple(_pair(pair) for pair in axes.items())
        return self._with(activations=pairs + self._activations)

    @property
    def activations(self) -> "Rules":
        """The rules as activations see them."""
        return self._with(table=self._activations + self._table, activations=())

    def for_paths(self, patterns: Mapping[str, Names]) -> "Rules":
        """Name the dims of leaves that carry no names themselves, by their path.

        Args:
          patterns: regular expression → names of the dims, or None for a replicated leaf. The
            expression is searched for in paths such as ``"layers/0/attention/kernel"``; the first
            match wins. Once there are patterns, a leaf that none matches is an error.
        """
        for pattern in patterns:
            re.compile(pattern)
        added = tuple((k, None if v is None else tuple(v)) for k, v in patterns.items())
        return self._with(patterns=self._patterns + added)

    def axis(self, name: str, mesh_axes: Iterable[str] = ()) -> Axis:
        """The mesh axis, axes, or None that ``name`` stands for."""
        if name in self._lookup:
            return self._lookup[name]
        if name in mesh_axes:
            return name
        raise ValueError(
            f"unknown logical name {name!r}; the rules know {sorted(self._lookup)}. Add "
            f"Rules({name}=<mesh axis>), or Rules({name}=None) to leave the dim whole"
        )

    def spec(self, names: Iterable[Any], mesh_axes: Iterable[str] = ()) -> P:
        """The ``PartitionSpec`` of an array whose dims have these names.

        Args:
          names: one entry per dim: a name, a tuple of names (the dim is divided by all their
            axes), or None (whole).
          mesh_axes: axes of the mesh, which names outside the rules may stand for.

        Raises:
          ValueError: an unknown name, or a mesh axis used twice.
        """
        names = tuple(names)
        entries: list[Any] = []
        used: dict[str, Any] = {}
        for name in names:
            if name is P.UNCONSTRAINED:
                entries.append(name)
                continue
            axes: list[str] = []
            for part in name if isinstance(name, (tuple, list)) else (name,):
                if part is None:
                    continue
                axis = self.axis(part, mesh_axes)
                axes += () if axis is None else (axis,) if isinstance(axis, str) else axis
            for axis in axes:
                if axis in used:
                    raise ValueError(
                        f"mesh axis {axis!r} would divide two dims of one array: {used[axis]!r} "
                        f"and {name!r} in {names}; map one of them to another axis or to None"
                    )
                used[axis] = name
            entries.append(None if not axes else axes[0] if len(axes) == 1 else tuple(axes))
        return P(*entries)


def _pair(pair: tuple[str, Axis]) -> tuple[str, Axis]:
    try:
        name, axis = pair
    except (TypeError, ValueError):
        raise ValueError(f"Rules: expected pairs (name, axis), got {pair!r}") from None
    if isinstance(axis, list):
        axis = tuple(axis)
    parts = axis if isinstance(axis, tuple) else () if axis is None else (axis,)
    if not isinstance(name, str) or not all(isinstance(part, str) for part in parts):
        raise ValueError(
            f"Rules: {name!r} must map to a mesh axis, a tuple of axes, or None; got {axis!r}"
        )
    if len(set(parts)) < len(parts):
        raise ValueError(f"Rules: {name!r} names a mesh axis twice: {axis!r}")
    return name, axis


def _rebuild(*key: Any) -> Rules:
    return Rules()._with(**dict(zip(("table", "activations", "patterns", "infer"), key, strict=True)))
