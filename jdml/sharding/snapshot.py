"""Snapshots of layouts, for a user's own tests: a change of any leaf's spec is seen in review."""

import difflib
import os
from pathlib import Path
from typing import Any

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jdml.sharding.check import spec_text
from jdml.sharding.paths import as_pytree, leaves_with_paths

PyTree = Any

UPDATE = "JDML_UPDATE_SNAPSHOTS"


def assert_matches_snapshot(
    specs: PyTree, file: str | os.PathLike[str], update: bool | None = None
) -> None:
    """Compares layouts with a text file, one ``path: spec`` a line; writes it if there is none.

    Args:
      specs: specs, shardings, or placed arrays.
      file: to be kept under version control beside the test.
      update: write the file anew; by default, if the environment has ``JDML_UPDATE_SNAPSHOTS=1``.

    Raises:
      AssertionError: with the lines that differ.
    """
    file = Path(file)
    text = "".join(f"{line}\n" for line in sorted(_lines(specs)))
    if update is None:
        update = os.environ.get(UPDATE, "") not in ("", "0")
    if update or not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
        return
    known = file.read_text(encoding="utf-8")
    if known != text:
        diff = difflib.unified_diff(
            known.splitlines(), text.splitlines(), "snapshot", "now", lineterm="", n=0
        )
        raise AssertionError(
            f"the layout differs from {file}; if that is meant, run again with {UPDATE}=1:\n"
            + "\n".join(diff)
        )


def _lines(specs: PyTree) -> list[str]:
    return [
        f"{path}: {_text(leaf)}"
        for path, leaf in leaves_with_paths(as_pytree(specs), is_leaf=lambda x: isinstance(x, P))
    ]


def _text(leaf: Any) -> str:
    sharding = leaf.sharding if isinstance(leaf, jax.Array) else leaf
    spec = sharding.spec if isinstance(sharding, NamedSharding) else sharding
    if not isinstance(spec, P):
        return spec_text(spec)
    entries = list(spec)
    while entries and entries[-1] is None:  # P("data") and P("data", None) are one layout
        entries.pop()
    return f"P({', '.join(map(repr, entries))})"
