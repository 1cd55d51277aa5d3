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
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple, get_args

from jax.sharding import PartitionSpec as P

Axis = str | tuple[str, ...] | None
Names = tuple[Any, ...]
OnIndivisible = Literal["error", "replicate", "pad"]


class Without(NamedTuple):
    """A dim's name in ``constrain``: the axes of ``name`` that do not divide ``other``.

    Sequence parallelism divides positions over the axis that divides heads and hidden units inside
    the layers; ``constrain(hidden, "batch", Without("seq", "mlp"), "mlp")`` then leaves the
    positions whole there, and divided wherever they have an axis of their own.
    """

    name: str
    other: str


class InferFSDP(NamedTuple):
    """How leaves without names are divided: their largest dim that ``axis`` divides."""

    axis: str
    min_size: int


@dataclass(frozen=True, init=False, repr=False)
class Rules:
    """Logical name → mesh axis, tuple of axes, or None; frozen and hashable.

    Args:
      *pairs: ``(name, axis)``, looked up first and in order: the first match wins.
      on_indivisible: what to do with a dim that its axes do not divide: ``"error"``;
        ``"replicate"`` leaves that dim whole; ``"pad"`` keeps the spec, and ``shard`` and ``init``
        append zeros to the dim. What was done is logged, and listed by ``describe``.
      **axes: the same as pairs, as keywords, looked up after them.
    """

    table: tuple[tuple[str, Axis], ...]
    activation_table: tuple[tuple[str, Axis], ...]
    patterns: tuple[tuple[str, Names | None], ...]
    inferred: InferFSDP | None
    on_indivisible: OnIndivisible

    def __init__(
        self,
        *pairs: tuple[str, Axis],
        on_indivisible: OnIndivisible = "error",
        **axes: Axis,
    ):
        self._set(
            table=tuple(_pair(pair) for pair in (*pairs, *axes.items())),
            activation_table=(),
            patterns=(),
            inferred=None,
            on_indivisible=valid_policy(on_indivisible),
        )

    def _set(self, **fields: Any) -> None:
        for name, value in fields.items():
            object.__setattr__(self, name, value)

    def _with(self, **changes: Any) -> "Rules":
        new = object.__new__(Rules)
        new._set(**{name: getattr(self, name) for name in self.__dataclass_fields__} | changes)
        return new

    def __hash__(self) -> int:
        return self._hash

    def __repr__(self) -> str:
        parts = [f"{name}={axis!r}" for name, axis in self.table]
        if self.on_indivisible != "error":
            parts.append(f"on_indivisible={self.on_indivisible!r}")
        text = f"Rules({', '.join(parts)})"
        if self.activation_table:
            own = ", ".join(f"{name}={axis!r}" for name, axis in self.activation_table)
            text += f".for_activations({own})"
        if self.patterns:
            text += f".for_paths({dict(self.patterns)!r})"
        if self.inferred:
            text += f".infer_fsdp(axis={self.inferred.axis!r}, min_size={self.inferred.min_size})"
        return text

    def replace(self, *, on_indivisible: OnIndivisible | None = None, **axes: Axis) -> "Rules":
        """These rules with some names mapped anew, for parameters and activations alike."""
        policy = self.on_indivisible if on_indivisible is None else valid_policy(on_indivisible)
        return self._with(
            table=_over(self.table, axes),
            activation_table=tuple(p for p in self.activation_table if p[0] not in axes),
            on_indivisible=policy,
        )

    def for_activations(self, **axes: Axis) -> "Rules":
        """These rules, with entries that hold for activations only."""
        return self._with(activation_table=_over(self.activation_table, axes))

    @property
    def activations(self) -> "Rules":
        """The rules as activations see them."""
        return self._activations

    def for_paths(self, patterns: Mapping[str, Iterable[Any] | None]) -> "Rules":
        """Name the dims of leaves that carry no names themselves, by their path.

        Args:
          patterns: regular expression → names of the dims, or None for a leaf that stays whole. The
            expression is searched for in paths such as ``"layers/0/attention/kernel"``; the first
            match wins. Once there are patterns, a leaf that none matches is an error.
        """
        added: list[tuple[str, Names | None]] = []
        for pattern, names in patterns.items():
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(
                    f"Rules.for_paths: {pattern!r} is no regular expression ({error})"
                ) from None
            if isinstance(names, str):
                raise ValueError(
                    f"Rules.for_paths: {pattern!r} must map to names, one per dim, or None; "
                    f"got the string {names!r}; write ({names!r},)"
                )
            added.append((pattern, None if names is None else tuple(names)))
        return self._with(patterns=self.patterns + tuple(added))

    def infer_fsdp(self, axis: str = "fsdp", min_size: int = 2**16) -> "Rules":
        """These rules, with leaves that nothing names divided along their largest dim.

        Args:
          axis: the mesh axis; of the dims that it divides, the largest is taken, the first on ties.
          min_size: leaves with fewer elements stay whole.
        """
        return self._with(inferred=InferFSDP(axis, min_size))

    def axis(self, name: str, mesh_axes: Iterable[str] = ()) -> Axis:
        """The mesh axis, axes, or None that ``name`` stands for."""
        if name in self._lookup:
            return self._lookup[name]
        if name in mesh_axes:
            return name
        raise ValueError(
            f"unknown logical name {name!r}; the rules know {sorted(self._lookup)}. Add "
            f"{name}=<mesh axis> to the rules, or {name}=None to leave the dim whole"
        )

    def _axes(self, name: str, mesh_axes: Iterable[str]) -> tuple[str, ...]:
        axis = self.axis(name, mesh_axes)
        return () if axis is None else (axis,) if isinstance(axis, str) else axis

    def spec(self, names: Iterable[Any], mesh_axes: Iterable[str] = ()) -> P:
        """The ``PartitionSpec`` of an array whose dims have these names.

        Args:
          names: one entry per dim: a name, a tuple of names (the dim is divided by all their
            axes), ``Without(name, other)``, or None (whole).
          mesh_axes: axes of the mesh, which names outside the rules may stand for.

        Raises:
          ValueError: an unknown name, or a mesh axis used twice.
        """
        names = tuple(names)
        entries: list[Any] = []
        used: dict[str, int] = {}
        for dim, name in enumerate(names):
            if name is P.UNCONSTRAINED:
                entries.append(name)
                continue
            axes: list[str] = []
            if isinstance(name, Without):
                taken = self._axes(name.other, mesh_axes)
                axes += [axis for axis in self._axes(name.name, mesh_axes) if axis not in taken]
                name = None
            for part in name if isinstance(name, (tuple, list)) else (name,):
                if part is not None:
                    axes += self._axes(part, mesh_axes)
            for axis in axes:
                if axis in used:
                    raise ValueError(
                        f"mesh axis {axis!r} is used twice, by dim {used[axis]} and dim {dim} of "
                        f"names {names}; map one of the names to another axis, or to None"
                    )
                used[axis] = dim
            entries.append(entry_of(axes))
        return P(*entries)

    @cached_property
    def _lookup(self) -> dict[str, Axis]:
        return dict(reversed(self.table))

    @cached_property
    def _activations(self) -> "Rules":
        return self._with(table=self.activation_table + self.table, activation_table=())

    @cached_property
    def _hash(self) -> int:
        # A rule context takes part in the cache key of every jitted call: hash once.
        return hash((self.table, self.activation_table, self.patterns, self.inferred))


def infer_fsdp(min_size: int = 2**16, axis: str = "fsdp") -> Rules:
    """Rules for models without annotations: every large leaf divided along its largest dim."""
    return Rules().infer_fsdp(axis, min_size)


def entry_of(axes: Iterable[str]) -> Axis:
    """An entry of a spec: None, one axis, or a tuple of several."""
    axes = tuple(axes)
    return None if not axes else axes[0] if len(axes) == 1 else axes


def valid_policy(policy: Any) -> OnIndivisible:
    """The policy, if it is one."""
    if policy not in get_args(OnIndivisible):
        raise ValueError(f"on_indivisible must be one of {get_args(OnIndivisible)}, got {policy!r}")
    return policy


def _over(table: tuple[tuple[str, Axis], ...], axes: Mapping[str, Axis]) -> Any:
    """The table with these entries in the place of those of the same names."""
    return tuple(_pair(p) for p in axes.items()) + tuple(p for p in table if p[0] not in axes)


def _pair(pair: tuple[str, Any]) -> tuple[str, Axis]:
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise ValueError(f"Rules: expected pairs (name, axis), got {pair!r}")
    name, axis = pair
    axis = tuple(axis) if isinstance(axis, list) else axis
    parts = axis if isinstance(axis, tuple) else () if axis is None else (axis,)
    if not isinstance(name, str) or not all(isinstance(part, str) for part in parts):
        raise ValueError(
            f"Rules: {name!r} must map to a mesh axis, a tuple of axes, or None; got {axis!r}"
        )
    if len(set(parts)) < len(parts):
        raise ValueError(f"Rules: {name!r} names a mesh axis twice: {axis!r}")
    return name, entry_of(parts)
