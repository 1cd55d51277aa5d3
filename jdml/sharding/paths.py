"""Names of leaves: one spelling for dicts, Linen variables and NNX states."""

from typing import Any

import jax
from flax import nnx
from jax.sharding import PartitionSpec as P

PyTree = Any

# Attributes that hold a leaf's array inside a box or an NNX variable; they name nothing themselves.
_BOXES = frozenset({"value", "raw_value"})


def path_str(path: tuple[Any, ...]) -> str:
    """A key path as ``"layers/attention/query/kernel"``; the root is ``"<root>"``."""
    parts = []
    for entry in path:
        if isinstance(entry, jax.tree_util.GetAttrKey):
            if entry.name in _BOXES:
                continue
            parts.append(str(entry.name))
        elif isinstance(entry, jax.tree_util.SequenceKey):
            parts.append(str(entry.idx))
        elif isinstance(entry, (jax.tree_util.DictKey, jax.tree_util.FlattenedIndexKey)):
            parts.append(str(entry.key))
        else:
            parts.append(str(entry))
    return "/".join(parts) or "<root>"


def leaves_with_paths(tree: PyTree, is_leaf: Any = None) -> list[tuple[str, Any]]:
    """``(path, leaf)`` of every leaf, in the order of ``jax.tree.leaves``."""
    return [(path_str(p), x) for p, x in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)]


def as_pytree(tree: PyTree) -> PyTree:
    """The state of an NNX module or optimiser; anything else as it is."""
    return nnx.state(tree) if isinstance(tree, nnx.Pytree) else tree


def broadcast_specs(specs: PyTree, tree: PyTree, what: str = "specs") -> list[Any]:
    """One spec per leaf of the tree, in its order.

    Args:
      specs: the tree's structure, or a prefix of it: one spec (or None) stands for a whole subtree;
        or the tree's leaf paths in other containers, as an unboxed dict for an NNX state.
      tree: arrays, abstract arrays, shardings: anything with leaves.
      what: how messages call the specs.

    Raises:
      ValueError: naming the first leaves that the two do not have in common.
    """
    specs, flat = as_pytree(specs), []

    def spread(spec: Any, subtree: PyTree) -> None:
        flat.extend([spec] * len(jax.tree.leaves(subtree)))

    try:
        jax.tree.map(spread, specs, tree, is_leaf=_is_spec)
    except ValueError:
        asked = dict(leaves_with_paths(specs, is_leaf=_is_spec))
        have = [path for path, _ in leaves_with_paths(tree)]
        if set(asked) != set(have):
            raise ValueError(
                f"{what} must have the structure of the tree, or be a prefix of it. Only in "
                f"{what}: {_some(set(asked) - set(have))}; "
                f"only in the tree: {_some(set(have) - set(asked))}"
            ) from None
        # The same leaves in other containers: a dict for a State, boxes or none.
        return [asked[path] for path in have]
    return flat


def _is_spec(x: Any) -> bool:
    return x is None or isinstance(x, P)


def _some(paths: set[str], most: int = 4) -> str:
    shown = sorted(paths)[:most]
    return ", ".join(shown) + (f" and {len(paths) - most} more" if len(paths) > most else "") or "-"
