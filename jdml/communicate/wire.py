"""What a transformation is told about the mesh around it, and how it reaches the local shards.

A transformation's ``update`` runs where the worker axis is manual and all other mesh axes are
automatic: it sees whole leaves. A codec must see the shard that the device holds, or the
partitioner gathers the leaf over the other axes first. :func:`on_shards` opens that inner region.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import optax
from jax.sharding import PartitionSpec

from jdml.sharding.paths import path_str
from jdml.sharding.region import varying_axes as varying_axes

PyTree = Any


class Settled:
    """Parameters that a transformation made itself, by the updates that would lead to them.

    A transformation that knows the new parameters ``y`` must return ``y - x``, and whoever applies
    that reads both again, to arrive at ``y`` but for a rounding. Here it notes ``y`` beside what it
    returns. If that very array is what the whole chain returns, ``y`` is taken, and the compiler
    drops the difference; from any other transformation comes another array, added as always.
    """

    def __init__(self) -> None:
        self._known: dict[int, tuple[jax.Array, jax.Array]] = {}

    def note(self, updates: PyTree, params: PyTree) -> None:
        """``params`` are what ``updates`` lead to, leaf by leaf."""
        for u, y in zip(jax.tree.leaves(updates), jax.tree.leaves(params), strict=True):
            self._known[id(u)] = u, y  # with u, whose id nothing else gets then

    def apply(self, params: PyTree, updates: PyTree) -> PyTree:
        """``optax.apply_updates``, or what was noted."""
        added = optax.apply_updates(params, updates)

        def new(x: jax.Array, u: jax.Array, sum_: jax.Array) -> jax.Array:
            return self._known[id(u)][1].astype(x.dtype) if id(u) in self._known else sum_

        return jax.tree.map(new, params, updates, added)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Wire:
    """The optional extra argument ``wire`` of every exchanging transformation's ``update``.

    ``jdml.train.make_step`` passes it. Without it (in a ``shard_map`` of the user's own) a leaf is
    taken to be the local shard.

    Attributes:
      key: Typed PRNG key of this step, the same on every worker; ``None`` if there is none.
      other_axes: Mesh axes besides the workers', which are automatic outside :func:`on_shards`.
      specs: ``(leaf path, PartitionSpec over other_axes)`` of every parameter.
      settled: New parameters that are known before updates are added.
    """

    key: jax.Array | None
    other_axes: tuple[str, ...] = dataclasses.field(default=(), metadata={"static": True})
    specs: tuple[tuple[str, PartitionSpec], ...] = dataclasses.field(
        default=(), metadata={"static": True}
    )
    settled: Settled = dataclasses.field(
        default_factory=Settled, metadata={"static": True}, compare=False
    )


def settle(wire: Wire | None, updates: PyTree, params: PyTree) -> None:
    """Notes in ``wire``, if there is one, which parameters ``updates`` lead to: :class:`Settled`.

    Args:
      wire: What ``update`` was given.
      updates: What ``update`` is about to return.
      params: In the parameters' dtypes, up to a cast.
    """
    if wire is not None:
        wire.settled.note(updates, params)


def on_shards(
    exchange: Callable[..., tuple[PyTree, ...]],
    wire: Wire | None,
    trees: tuple[PyTree, ...],
    extras: tuple[PyTree, ...] = (),
    num_outputs: int = 1,
) -> tuple[PyTree, ...]:
    """Runs ``exchange(*trees, *extras)`` with every mesh axis manual, leaf by local shard.

    Args:
      exchange: Gets ``trees`` with each leaf's local shard and ``extras`` as they are; returns a
        tuple of trees whose leaves are those of ``trees[0]``, in shape and sharding.
      wire: What ``update`` was given; ``None`` or no other axes: runs ``exchange`` directly.
      trees: Pytrees whose leaves sit where the parameters' do (a subset of them, under a mask).
      extras: Small arrays that are the same on every device of the other axes.
      num_outputs: How many trees ``exchange`` returns.
    """
    if wire is None or not wire.other_axes:
        return exchange(*trees, *extras)
    table = dict(wire.specs)

    def spec_of(path: tuple[Any, ...], _: Any) -> PartitionSpec:
        return table.get(path_str(path), PartitionSpec())

    specs = tuple(jax.tree_util.tree_map_with_path(spec_of, tree) for tree in trees)
    whole = jax.tree.map(lambda _: PartitionSpec(), extras)
    return jax.shard_map(
        exchange,
        in_specs=(*specs, *whole),
        out_specs=(specs[0],) * num_outputs,
        axis_names=set(wire.other_axes),
    )(*trees, *extras)


def per_worker(tree: PyTree, axis: str | tuple[str, ...]) -> PyTree:
    """Marks every leaf as one that may differ from worker to worker; the values stay."""

    names = (axis,) if isinstance(axis, str) else axis

    def mark(x: jax.Array) -> jax.Array:
        missing = tuple(a for a in names if a not in varying_axes(x))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(mark, tree)


def varies(x: jax.Array, axis: str | tuple[str, ...]) -> bool:
    """Whether JAX's type of ``x`` says that it may differ along ``axis`` (inside ``shard_map``)."""
    names = (axis,) if isinstance(axis, str) else axis
    return not varying_axes(x).isdisjoint(names)
