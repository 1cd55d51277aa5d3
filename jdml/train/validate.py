"""What ``make_step`` refuses, and what it says then: before anything is compiled."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from jdml.sharding.fit import axes_of
from jdml.sharding.paths import leaves_with_paths

PyTree = Any
Axis = str | tuple[str, ...]
"""The worker axis, or the axes whose positions in row-major order are the workers."""


def spec_leaves(specs: PyTree) -> list[PartitionSpec]:
    """The ``PartitionSpec``s of a tree, each one a leaf."""
    return jax.tree.leaves(specs, is_leaf=_is_spec)


def check_arguments(
    mesh: Mesh,
    workers: Axis,
    batch_axes: Sequence[str],
    accumulate: int,
    model_state: str | None,
    mapping: str | None,
    zero: int = 0,
) -> None:
    """Checks what ``make_step`` was given besides functions and specs."""
    if isinstance(batch_axes, str):
        raise ValueError(
            f"make_step: batch_axes={batch_axes!r} is a string; write ({batch_axes!r},)."
        )
    if not isinstance(workers, (str, tuple)) or not workers:
        raise ValueError(
            f"make_step: workers={workers!r}; expected a mesh axis, or a tuple of mesh axes."
        )
    for axis in (*axes_of(workers), *batch_axes):
        if axis not in mesh.axis_names:
            raise ValueError(
                f"make_step: the mesh has axes {mesh.axis_names}, not {axis!r}. Name one of them, "
                f"or build the mesh with it: make_mesh({{{axis!r}: ..., ...}}). A size of 1 is "
                "fine."
            )
    if len(set(axes_of(workers))) < len(axes_of(workers)):
        raise ValueError(f"make_step: workers={workers!r} names an axis twice; name it once.")
    for axis in axes_of(workers):
        if axis in batch_axes:
            raise ValueError(
                f"make_step: batch_axes={tuple(batch_axes)} names the worker axis {axis!r}, over "
                "which the batch is divided in any case. Leave it out."
            )
    if zero not in (0, 1, 2, 3):
        raise ValueError(f"make_step: zero={zero!r}; expected 0, 1, 2 or 3.")
    if zero and not batch_axes:
        raise ValueError(
            f"make_step: zero={zero} divides over batch_axes, which is empty; over the worker axis "
            f"{workers!r} nothing is divided, for each worker is a whole. Build the mesh with an "
            "axis inside them (make_mesh({'data': ..., 'fsdp': ...})) and give "
            "batch_axes=('fsdp',)."
        )
    if not isinstance(accumulate, int) or accumulate < 1:
        raise ValueError(
            f"make_step: accumulate={accumulate!r}; expected an int >= 1, the number of "
            "micro-batches."
        )
    if model_state not in (None, "mean", "local"):
        raise ValueError(
            f"make_step: model_state={model_state!r}; expected None, 'mean' or 'local'."
        )
    if mapping not in (None, "vmap", "shard_map"):
        raise ValueError(f"make_step: mapping={mapping!r}; expected None, 'vmap' or 'shard_map'.")


def check_steps_per_call(steps_per_call: Any) -> None:
    """Checks the number of steps that a call takes."""
    if (
        not isinstance(steps_per_call, int)
        or isinstance(steps_per_call, bool)
        or steps_per_call < 1
    ):
        raise ValueError(
            f"make_step: steps_per_call={steps_per_call!r}; expected an int >= 1, the number of "
            "steps in one call."
        )


def check_params(params: PyTree) -> None:
    """Every leaf is a float array, and there is one."""
    if not jax.tree.leaves(params):
        raise ValueError("init: params has no leaves; expected a pytree of float arrays.")
    for path, x in leaves_with_paths(params):
        dtype = getattr(x, "dtype", None)
        if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(
                f"init: params leaf {path!r} is {type(x).__name__} of dtype {dtype}; expected a "
                "float array. Pass what is not trained by gradients as model_state."
            )


def check_specs(params: PyTree, specs: PyTree, mesh: Mesh, workers: Axis) -> PyTree:
    """The specs in the structure of ``params``: one each, over axes other than the workers'.

    Boxes (Linen's metadata, NNX's variables) may differ between the two; leaf paths may not.
    """
    named, found = leaves_with_paths(params), spec_leaves(specs)
    if len(named) != len(found):
        raise ValueError(
            f"make_step: specs has {len(found)} leaves and params {len(named)}. Make them from "
            "the same tree: specs(params, mesh, rules)."
        )
    spec_paths = [path for path, _ in leaves_with_paths(specs, is_leaf=_is_spec)]
    for (path, x), spec, spec_path in zip(named, found, spec_paths, strict=True):
        if path != spec_path:
            raise ValueError(
                f"make_step: specs has a leaf {spec_path!r} where params has {path!r}. Make them "
                "from the same tree: specs(params, mesh, rules)."
            )
        if len(spec) > x.ndim:
            raise ValueError(
                f"make_step: params leaf {path!r} has shape {x.shape} but its spec {spec} names "
                f"{len(spec)} dims."
            )
        for dim, entry in enumerate(spec):
            for axis in (entry,) if isinstance(entry, str) else (entry or ()):
                if axis in axes_of(workers):
                    raise ValueError(
                        f"make_step: params leaf {path!r}, dim {dim}, is sharded over the worker "
                        f"axis {axis!r}. Each worker holds the whole model there: shard over "
                        "another axis (make_mesh({'data': ..., 'fsdp': ...}))."
                    )
                if axis not in mesh.axis_names:
                    raise ValueError(
                        f"make_step: params leaf {path!r}, dim {dim}: the mesh has axes "
                        f"{mesh.axis_names}, not {axis!r}."
                    )
    return jax.tree.unflatten(jax.tree.structure(params), found)


def _is_spec(x: Any) -> bool:
    return isinstance(x, PartitionSpec)


def check_loss(loss: Any, metrics: Any) -> None:
    """``loss_fn`` returned a float scalar and a dict without ``"loss"``."""
    if jnp.shape(loss) != () or not jnp.issubdtype(jnp.result_type(loss), jnp.floating):
        raise ValueError(
            f"loss_fn returned a loss of dtype {jnp.result_type(loss)} and shape "
            f"{jnp.shape(loss)}; expected a float scalar, the mean over the worker's samples."
        )
    if not isinstance(metrics, dict):
        raise ValueError(
            f"loss_fn returned metrics of type {type(metrics).__name__}; expected a dict of "
            "arrays: return loss, {}."
        )
    if "loss" in metrics:
        raise ValueError(
            "loss_fn: metrics has an entry 'loss', the name of the loss itself; rename it."
        )


def check_batches(batches: PyTree, steps_per_call: int) -> None:
    """Every leaf holds one batch for each step of a call."""
    for path, x in leaves_with_paths(batches):
        shape = jnp.shape(x)
        if not shape or shape[0] != steps_per_call:
            raise ValueError(
                f"step: batch leaf {path!r} has shape {shape}; with steps_per_call="
                f"{steps_per_call} it holds a batch for each step, [{steps_per_call}, batch, ...]. "
                f"Stack {steps_per_call} batches along a new dim 0."
            )


def check_batch(
    batch: PyTree,
    workers: Axis,
    num_workers: int,
    accumulate: int,
    batch_axes: tuple[str, ...],
    inner: int,
) -> None:
    """Dim 0 of every leaf divides over workers, micro-batches and inner batch axes."""
    divisor = num_workers * accumulate * inner
    factors = f"{num_workers} workers on axis {workers!r}"
    if accumulate > 1:
        factors += f" × {accumulate} micro-batches"
    if inner > 1:
        factors += f" × {inner} devices on axes {batch_axes}"
    if not jax.tree.leaves(batch):
        raise ValueError("step: the batch has no leaves.")
    for path, x in leaves_with_paths(batch):
        shape = jnp.shape(x)
        if not shape or shape[0] % divisor or not shape[0]:
            size = shape[0] if shape else "none (a scalar)"
            up = math.ceil((shape[0] if shape else 1) / divisor) * divisor or divisor
            raise ValueError(
                f"step: batch leaf {path!r} has shape {shape}; its dim 0 ({size}) is not a "
                f"positive multiple of {divisor} = {factors}. Use {up} samples, or fewer workers."
            )
