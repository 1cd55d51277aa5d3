"""Names of leaves: one spelling for dicts, Linen variables and NNX states."""

from typing import Any

import jax

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
