"""What a checkpoint says about itself: enough to refuse it before an array is read.

The record is JSON beside the arrays: format, step, configuration, shape and dtype and digest of
each leaf, and the small data that is saved along (the sampler's position). It carries a digest of
itself, because a flipped byte in it is as bad as one in an array.
"""

import dataclasses
import hashlib
import json
from collections.abc import Container, Mapping
from typing import Any

FORMAT = "jdml.checkpoint.1"
RECORD_FILE = "record.json"

Json = dict[str, Any]

_MAX_NAMED = 8
_NOTHING = "(nothing)"


def seal(record: Json) -> Json:
    """The record with a digest of its text."""
    return {"record": record, "digest": _digest(record)}


def unseal(text: bytes) -> Json:
    """The record in the bytes of a file.

    Raises:
      ValueError: the text is damaged, or of another format; says which.
    """
    try:
        sealed = json.loads(text)
        record, digest = sealed["record"], sealed["digest"]
        intact = _digest(record) == digest
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"its record cannot be read ({error})") from error
    if not intact:
        raise ValueError("its record is damaged: the digest is not that of the text")
    if record.get("format") != FORMAT:
        raise ValueError(f"its format is {record.get('format')!r}; this version reads {FORMAT!r}")
    return dict(record)


def plain(config: Any) -> Json | None:
    """A configuration as the JSON that it will be when read back.

    Args:
      config: Mapping or dataclass, perhaps nested; what is no JSON is taken by its ``str``.
    """
    if config is None:
        return None
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        config = dataclasses.asdict(config)
    if not isinstance(config, Mapping):
        raise ValueError(
            f"config must be a mapping or a dataclass instance, got {type(config).__name__}."
        )
    return dict(json.loads(json.dumps(dict(config), default=str)))


def config_differences(saved: Json | None, given: Json) -> list[str]:
    """``"model.num_layers: saved 4, given 6"`` for every key that differs."""
    old, new = _flatten(saved or {}), _flatten(given)
    return [
        f"{key}: saved {_show(old, key)}, given {_show(new, key)}"
        for key in sorted({*old, *new})
        if key not in old or key not in new or not _equal(old[key], new[key])
    ]


def without(leaves: Mapping[str, Any], paths: Container[str]) -> Json:
    """The leaves less those of these paths."""
    return {path: leaf for path, leaf in leaves.items() if path not in paths}


def leaf_differences(saved: Json, given: Json) -> list[str]:
    """Leaves that are missing, left over, or of another shape or dtype.

    Args:
      saved: ``{path: {"shape": [...], "dtype": ...}}`` of the checkpoint.
      given: The same of the state to be restored.
    """
    missing = [
        f"leaf {path!r} ({_kind(given[path])}) is not in the checkpoint"
        for path in given
        if path not in saved
    ]
    extra = [
        f"leaf {path!r} ({_kind(saved[path])}) is only in the checkpoint"
        for path in saved
        if path not in given
    ]
    other = [
        f"leaf {path!r}: saved {_kind(saved[path])}, given {_kind(given[path])}"
        for path in given
        if path in saved and _kind(saved[path]) != _kind(given[path])
    ]
    return [*other, *missing, *extra]


def listed(differences: list[str]) -> str:
    """The differences on one line each; of many, the first ones and how many more."""
    lines = differences[:_MAX_NAMED]
    if len(differences) > len(lines):
        lines.append(f"… and {len(differences) - len(lines)} more")
    return "".join(f"\n  {line}" for line in lines)


def _digest(record: Json) -> str:
    text = json.dumps(record, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _flatten(config: Any, prefix: str = "") -> Json:
    if not isinstance(config, dict) or not config:
        return {prefix: config} if prefix else {}
    flat: Json = {}
    for key, value in config.items():
        flat |= _flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def _equal(a: Any, b: Any) -> bool:
    return a == b or repr(a) == repr(b)  # a NaN is the same setting as a NaN


def _show(flat: Json, key: str) -> str:
    return repr(flat[key]) if key in flat else _NOTHING


def _kind(leaf: Json) -> str:
    return f"{leaf['dtype']}{leaf['shape']}"
