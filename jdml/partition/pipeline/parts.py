"""The model as the stages see it: its three parts, what a stage holds of it, its keys."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax

PyTree = Any


class Parts(NamedTuple):
    """The model: functions of parameters, a micro-batch and a key (or None).

    Attributes:
      first: ``(others, batch, key) -> x``.
      block: ``(layer, x, batch, key) -> x``.
      last: ``(others, x, batch, key) -> (loss, metrics)``.
    """

    first: Callable[..., PyTree]
    block: Callable[..., PyTree]
    last: Callable[..., tuple[jax.Array, dict[str, jax.Array]]]


class Local(NamedTuple):
    """What one stage holds.

    Attributes:
      layers: Leaves ``[chunks, layers of a part, ...]``.
      others: Parameters of ``first`` and ``last``, whole.
      batches: Leaves ``[micro_batches, ...]``.
      key: Typed key, or None.
      counts: int32 ``[chunks]``, layers of each chunk.
      offsets: int32 ``[chunks]``, layers of the model before each chunk.
    """

    layers: PyTree
    others: PyTree
    batches: PyTree
    key: Any
    counts: jax.Array
    offsets: jax.Array


class Keys(NamedTuple):
    """Keys of the parts of the model, by micro-batch and layer; the same however it is cut."""

    key: Any
    num_layers: int

    def layer(self, micro_batch: Any, layer: Any) -> Any:
        """Of a layer."""
        if self.key is None:
            return None
        return jax.random.fold_in(jax.random.fold_in(self.key, micro_batch), layer)

    def first(self, micro_batch: Any) -> Any:
        """Of the initial part."""
        return self.layer(micro_batch, self.num_layers)

    def last(self, micro_batch: Any) -> Any:
        """Of the final part."""
        return self.layer(micro_batch, self.num_layers + 1)


def check_block(x: PyTree, y: PyTree) -> None:
    """Raises unless a block returns what it was given, in shapes and dtypes."""
    shown = [
        jax.tree.map(lambda s: f"{s.dtype}{list(s.shape)}", tree, is_leaf=lambda a: a is None)
        for tree in (x, y)
    ]
    if shown[0] != shown[1]:
        raise ValueError(
            f"pipeline: a block returned {shown[1]} for x {shown[0]}; expected the same structure, "
            "shapes and dtypes, those that the initial part returns. Cast or project in `first`."
        )


def check_exchanges(f: Callable[..., Any], *arguments: PyTree) -> None:
    """Raises if ``f(*arguments)`` permutes over a mesh axis.

    All-reduce, all-gather, all-to-all and reduce-scatter have groups, here devices of one stage. A
    permutation is one exchange of the whole mesh, in which only some stages would take part.
    """
    for axes in _permuted(jax.make_jaxpr(f)(*arguments).jaxpr):
        raise ValueError(
            f"pipeline: a part of the model permutes over mesh axis {axes!r} (attention='ring' "
            "does). A stage runs it while other stages do something else, but a permutation is an "
            "exchange of all devices of the mesh: on CPU it was seen to give wrong values. "
            "Exchange within groups: attention='gather', which sends as many bytes, or 'ulysses'."
        )


def _permuted(jaxpr: Any) -> Iterator[Any]:
    for equation in jaxpr.eqns:
        if equation.primitive.name == "ppermute":
            yield equation.params["axis_name"]
        parts = jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        )
        for part in parts:
            if hasattr(part, "eqns"):
                yield from _permuted(part)


def used_leaves(f: Callable[..., Any], others: PyTree, *arguments: PyTree) -> list[int]:
    """Which leaves of ``others`` ``f(others, *arguments)`` reads."""
    traced = jax.make_jaxpr(f)(others, *arguments).jaxpr
    read = {id(v) for eqn in traced.eqns for v in eqn.invars} | {id(v) for v in traced.outvars}
    leaves = traced.invars[: len(jax.tree.leaves(others))]
    return [i for i, v in enumerate(leaves) if id(v) in read]


def replaced(leaves: list[Any], indices: list[int], values: list[Any]) -> list[Any]:
    """The leaves with these values at these indices."""
    new = list(leaves)
    for i, value in zip(indices, values, strict=True):
        new[i] = value
    return new


def added(tree: PyTree, indices: list[int], terms: list[jax.Array]) -> PyTree:
    """The tree with each term added to the leaf of that index."""
    leaves, treedef = jax.tree.flatten(tree)
    sums = [leaves[i] + d.astype(leaves[i].dtype) for i, d in zip(indices, terms, strict=True)]
    return jax.tree.unflatten(treedef, replaced(leaves, indices, sums))
