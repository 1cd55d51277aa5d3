"""What a process runs, as a flat table of short strings that two hosts can compare.

Processes that compile different programs wait for each other's collectives for ever, so
whatever may make the programs differ belongs in here: versions, flags, source files, configuration.
"""

import dataclasses
import functools
import hashlib
import importlib.metadata
import os
import platform
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

_PACKAGES = ("jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "numpy", "jdml")
_FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
_SETTINGS = (
    "jax_enable_x64",
    "jax_default_matmul_precision",
    "jax_default_prng_impl",
    "jax_threefry_partitionable",
    "jax_numpy_dtype_promotion",
)
_LONGEST = 200


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:80]}… (sha256 {_digest(text.encode())})"


def flatten(value: Any, name: str = "config") -> dict[str, str]:
    """A configuration as ``{"config.model.num_layers": "12", ...}``, equal for equal values.

    Dataclasses, mappings, sequences, sets and arrays are taken apart or digested; functions and
    classes go by their name. Other objects go by their type alone when their text holds an
    address in memory, which differs from process to process.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    elif isinstance(value, functools.partial):
        value = {"func": value.func, "args": value.args, "keywords": value.keywords}
    if isinstance(value, Mapping):
        items = [(str(k), v) for k, v in sorted(value.items(), key=lambda item: str(item[0]))]
    elif isinstance(value, (list, tuple)):
        items = [(str(i), v) for i, v in enumerate(value)]
    elif isinstance(value, (set, frozenset)):
        return {name: _short("{" + ", ".join(sorted(map(repr, value))) + "}")}
    elif isinstance(value, (np.ndarray, jax.Array)):
        array = np.asarray(value)
        return {name: f"{array.dtype}{list(array.shape)} sha256 {_digest(array.tobytes())}"}
    else:
        qualified = getattr(value, "__qualname__", None)
        module = getattr(value, "__module__", "")
        text = f"{module}.{qualified}" if qualified else repr(value)
        return {name: _short(f"<{type(value).__qualname__}>" if " at 0x" in text else text)}
    flat: dict[str, str] = {} if items else {name: type(value).__name__ + "()"}
    for key, item in items:
        flat |= flatten(item, f"{name}.{key}")
    return flat


def _sources(code: Iterable[str | os.PathLike[str]]) -> dict[str, str]:
    """Digest of each Python file, named by its place under the folder or by its own name."""
    found = {}
    for root in map(Path, code):
        files = sorted(root.rglob("*.py")) if root.is_dir() else [root]
        for file in files:
            name = f"{root.name}/{file.relative_to(root)}" if file != root else file.name
            found[f"code {name}"] = _digest(file.read_bytes())
    return found


def fingerprint(config: Any = None, code: Iterable[str | os.PathLike[str]] = ()) -> dict[str, str]:
    """Versions, flags, source digests and configuration of this process.

    Args:
      config: anything that ``flatten`` takes.
      code: files or folders of Python sources besides this package and the script that runs.
    """
    script = getattr(sys.modules.get("__main__"), "__file__", None)
    own = [Path(__file__).parents[1], *([script] if script and os.path.exists(script) else [])]
    table = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            table[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            table[package] = "not installed"
    table |= {flag: _short(os.environ.get(flag, "")) for flag in _FLAGS}
    table |= {setting: repr(getattr(jax.config, setting, None)) for setting in _SETTINGS}
    return table | _sources([*own, *code]) | flatten(config)


def summary(table: Mapping[str, str]) -> str:
    """A digest of the whole table, equal where the tables are."""
    return _digest(repr(sorted(table.items())).encode())


def _numbers(ranks: list[int]) -> str:
    """``[0, 1, 2, 5]`` as ``"0-2, 5"``."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def differences(tables: Mapping[int, Mapping[str, str]]) -> list[str]:
    """One line for each entry in which processes differ: every value and who has it."""
    lines = []
    keys = list(dict.fromkeys(key for table in tables.values() for key in table))
    for key in keys:
        holders: dict[str, list[int]] = {}
        for rank in sorted(tables):
            holders.setdefault(tables[rank].get(key, "absent"), []).append(rank)
        if len(holders) > 1:
            values = (f"{value} on process {_numbers(ranks)}" for value, ranks in holders.items())
            lines.append(f"{key}: " + "; ".join(values))
    return lines
