"""What a pipeline refuses before it is traced: parameters and batches that do not fit it."""

from typing import Any

import numpy as np

from jdml.partition.pipeline.division import Division
from jdml.partition.pipeline.ends import Ends, dim_of
from jdml.sharding.paths import leaves_with_paths

PyTree = Any


def check_entry(params: PyTree, stack: str) -> None:
    """The parameters are a dict that has the stack."""
    if not isinstance(params, dict) or stack not in params:
        entries = sorted(params) if isinstance(params, dict) else type(params).__name__
        raise ValueError(
            f"pipeline: expected params to be a dict with an entry {stack!r}, the stack of layers; "
            f"got {entries}. Name the stack: pipeline(..., stack=...)."
        )


def check_arranged(layers: PyTree, stack: str, division: Division) -> None:
    """The stack is laid out as ``arrange`` does it."""
    lead = (division.chunks, division.num_stages, division.size)
    for path, x in leaves_with_paths(layers):
        if np.shape(x)[:3] != lead:
            raise ValueError(
                f"pipeline: leaf {path!r} of {stack!r} has shape {np.shape(x)}; expected "
                f"[{lead[0]} chunks, {lead[1]} stages, {lead[2]} layers, ...]. Lay the parameters "
                "out: pipe.arrange(params)."
            )


def check_ends(others: PyTree, ends: Ends, axis: str, num_stages: int) -> None:
    """The stages divide what was given to them to divide."""
    shapes = {path: np.shape(x) for path, x in leaves_with_paths(others)}
    for path, spec in ends.items():
        shape, dim = shapes.get(path, ()), dim_of(spec, axis)
        if dim >= len(shape) or shape[dim] % num_stages:
            raise ValueError(
                f"pipeline: leaf {path!r} has shape {shapes.get(path)}; expected a dim {dim} that "
                f"{num_stages} stages divide, as in the parameters that divide_ends was given. "
                "Give it these."
            )


def check_batch(batch: PyTree, micro_batches: int) -> None:
    """The micro-batches divide dim 0 of every leaf."""
    found = leaves_with_paths(batch)
    if not found:
        raise ValueError("pipeline: the batch has no leaves.")
    for path, x in found:
        size = np.shape(x)[0] if np.ndim(x) else 0
        if not size or size % micro_batches:
            up = -(-max(size, 1) // micro_batches) * micro_batches
            raise ValueError(
                f"pipeline: batch leaf {path!r} has shape {np.shape(x)}; {micro_batches} "
                f"micro-batches do not divide its dim 0. Use {up} samples."
            )
