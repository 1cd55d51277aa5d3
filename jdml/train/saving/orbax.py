"""What is asked of Orbax.

The layer used is ``CheckpointManager``, which ``v1.training.Checkpointer`` wraps; their files are
the same. A state is handed over as a flat dict from leaf path to array, so that any pytree can be
saved and nothing hangs on how a container is written.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jdml.train.saving.record import RECORD_FILE, Json


def open_manager(
    folder: Path, keep: int, score: Callable[[Mapping[str, float]], float] | None, keep_best: int
) -> ocp.CheckpointManager:
    """A manager that keeps the latest ``keep`` steps, and the ``keep_best`` of greatest score."""
    policies = ocp.checkpoint_managers
    preservation: Any = policies.LatestN(keep)
    if score is not None:
        # max_to_keep with best_fn would drop the newest step for an older one of better score.
        best = policies.BestN(
            get_metric_fn=score, n=keep_best, keep_checkpoints_without_metrics=False
        )
        preservation = policies.AnyPreservationPolicy([preservation, best])
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    registry.add("state", ocp.args.PyTreeSave, ocp.PyTreeCheckpointHandler())
    registry.add("record", ocp.args.JsonSave, ocp.JsonCheckpointHandler(filename=RECORD_FILE))
    return ocp.CheckpointManager(
        folder,
        options=ocp.CheckpointManagerOptions(
            create=False,
            cleanup_tmp_directories=True,
            preservation_policy=preservation,
            best_fn=score,
            save_root_metadata=False,
            # Otherwise a folder that cannot be made shows after a time limit of minutes.
            async_options=ocp.options.AsyncOptions(create_directories_asynchronously=False),
        ),
        handler_registry=registry,
    )


def start_saving(
    manager: ocp.CheckpointManager,
    step: int,
    arrays: Mapping[str, jax.Array],
    record: Json,
    metrics: Mapping[str, float],
) -> None:
    """Copies what is to be saved and begins to write it."""
    manager.save(
        step,
        args=ocp.args.Composite(
            # Orbax refuses empty arrays; the record knows all that there is to know of them.
            state=ocp.args.PyTreeSave({name: x for name, x in arrays.items() if x.size}),
            record=ocp.args.JsonSave(record),
        ),
        metrics=dict(metrics) or None,
        force=True,
    )


def read_arrays(path: Path, wanted: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Reads arrays onto the shardings asked for; shapes and dtypes must be the saved ones.

    What is saved and not asked for is not read.
    """
    abstract = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
        for name, x in wanted.items()
        if math.prod(x.shape)
    }
    arguments = ocp.args.PyTreeRestore(
        abstract,
        restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
        partial_restore=True,
    )
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        arrays = reader.restore(path, args=arguments)
    return {
        name: arrays[name] if name in abstract else _empty(x, x.sharding)
        for name, x in wanted.items()
    }


def unlike(arrays: Mapping[str, jax.Array], wanted: Mapping[str, Any]) -> str | None:
    """What was read otherwise than asked for, or ``None``.

    When one of its own files is lost, Orbax may give plain numbers in place of typed keys.
    """
    for name, x in wanted.items():
        y = arrays[name]
        same_sharding = y.sharding.is_equivalent_to(x.sharding, y.ndim)
        if (y.shape, y.dtype) != (tuple(x.shape), x.dtype) or not same_sharding:
            return (
                f"its array {name!r} was read as {y.dtype}{list(y.shape)} with {y.sharding} in "
                f"place of {x.dtype}{list(x.shape)} with {x.sharding}"
            )
    return None


def _empty(x: Any, sharding: jax.sharding.Sharding) -> jax.Array:
    nothing = np.zeros(x.shape, x.dtype)
    return jax.make_array_from_callback(x.shape, sharding, lambda index: nothing[index])


def scorer(metric: str, mode: str) -> Callable[[Mapping[str, float]], float]:
    """Greater is better; a NaN, or no value, is worse than anything."""

    def score(metrics: Mapping[str, float]) -> float:
        value = float(metrics.get(metric, math.nan))
        if math.isnan(value):
            return -math.inf
        return value if mode == "max" else -value

    return score
