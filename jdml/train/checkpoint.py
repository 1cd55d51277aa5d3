"""Save and resume a whole run: asynchronously, atomically, verified.

Orbax writes the arrays in the background and lets a step appear only when it is complete. Added
here is what it leaves open: a digest of every array, verified when it is read back, with a fallback
to the newest step that verifies; a record that refuses another model or configuration before an
array is read; errors that name the true cause and the path; and no folder taken that is not ours.
"""

import errno
import json
import logging
import os
import shutil
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from jdml.train.saving import folder as folders
from jdml.train.saving import leaves, orbax, record, residuals
from jdml.train.saving.digest import digest_arrays
from jdml.train.saving.errors import HINTS, brief, os_error, true_cause
from jdml.train.saving.residuals import ResidualPolicy as ResidualPolicy

PyTree = Any

_log = logging.getLogger(__name__)


class CheckpointWarning(UserWarning):
    """A checkpoint was skipped because it is damaged."""


class Restored(NamedTuple):
    """What a checkpoint gives back.

    Attributes:
      state: The pytree, with the shardings that were asked for.
      data: The small JSON part (the sampler's position), or ``None``.
      step: The step it was saved at.
    """

    state: PyTree
    data: Any
    step: int


class Checkpointer:
    """Checkpoints of one run in one folder.

    Every process of a job makes one and makes the same calls, on a folder that all of them see.

    Args:
      folder: The folder for the checkpoints and nothing else; made if it is missing.
      config: Mapping or dataclass: what must be equal for a resume to make sense (leave out what
        may change, such as the number of steps). ``None`` checks no configuration.
      keep: How many of the latest checkpoints stay.
      best_metric: Name of a metric by which the best checkpoints stay as well.
      best_mode: ``"min"`` or ``"max"``: which value of it is best.
      keep_best: How many of the best stay.
      read_only: Neither makes nor probes the folder; ``save`` is refused.

    Raises:
      ValueError: the folder holds something else, or checkpoints of another configuration; names
        what was found. Nothing is written in that case.
      OSError: the folder cannot be made or written, or its disk is full; carries the path.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        config: Any = None,
        *,
        keep: int = 3,
        best_metric: str | None = None,
        best_mode: str = "min",
        keep_best: int = 1,
        read_only: bool = False,
    ) -> None:
        if keep < 1 or keep_best < 1:
            raise ValueError(f"keep and keep_best must be at least 1, got {keep} and {keep_best}.")
        if best_mode not in ("min", "max"):
            raise ValueError(f'best_mode must be "min" or "max", got {best_mode!r}.')
        self.folder = folders.absolute(folder)
        self.read_only = read_only
        self._config = record.plain(config)
        self._keep, self._keep_best = keep, keep_best
        self._best_metric, self._best_mode = best_metric, best_mode
        self._manager: ocp.CheckpointManager | None = None
        self._saving: int | None = None
        self._damaged: set[int] = set()
        folders.refuse_foreign(self.folder)
        self._refuse_other_config()
        if not read_only:
            folders.probe(self.folder)

    def steps(self) -> list[int]:
        """Steps whose checkpoint is complete, ascending; torn or running ones are not listed."""
        return folders.complete_steps(self.folder)

    def latest_step(self) -> int | None:
        """The newest complete step, or ``None``."""
        return max(self.steps(), default=None)

    def check_room(self, state: PyTree) -> None:
        """Raises ``OSError`` if the disk cannot hold one checkpoint of such a state.

        Args:
          state: Arrays or ``ShapeDtypeStruct``; call it before compiling the step.
        """
        needed, free = leaves.num_bytes(state), shutil.disk_usage(self.folder).free
        if free < needed:
            raise OSError(
                errno.ENOSPC,
                f"one checkpoint takes {needed / 1e6:.1f} MB and up to {self._keep + 1} are kept, "
                f"but {free / 1e6:.1f} MB are free; {HINTS[errno.ENOSPC]}",
                str(self.folder),
            )

    def save(
        self,
        step: int,
        state: PyTree,
        data: Any = None,
        metrics: Mapping[str, float] | None = None,
        wait: bool = False,
    ) -> None:
        """Saves in the background; the state may be donated as soon as this returns.

        Waits for the save before it, if that is still running. Processes exchange nothing but
        8 bytes per leaf.

        Args:
          step: Later than every saved step.
          state: Any pytree of ``jax.Array`` leaves, typed keys among them.
          data: Small and JSON: the sampler's ``state()``.
          metrics: Numbers to remember; must hold ``best_metric`` if there is one.
          wait: Return when it is on disk.

        Raises:
          ValueError: a step that is not later, a leaf that is no array, data that is no JSON.
          OSError: this save or the one before failed; carries the path and says what to do.
        """
        if self.read_only:
            raise ValueError(f"{self.folder} was opened read_only; open it without to save.")
        self.wait()
        arrays = leaves.by_path(state)
        leaves.check_savable(arrays)
        data, values = _checked_json(data), self._checked_metrics(metrics)
        self._set_damaged_aside()
        newest = self.latest_step()
        if step < 0 or (newest is not None and step <= newest):
            raise ValueError(
                f"cannot save step {step} in {self.folder}: steps begin at 0 and ascend, and the "
                f"newest checkpoint there is step {newest}. Resume from it, or give another folder."
            )
        about = {
            "format": record.FORMAT,
            "step": step,
            "config": self._config,
            "leaves": leaves.kinds(arrays),
            "digests": _digests(arrays),
            "residuals": sorted(residuals.debts(state)),
            "data": data,
            "metrics": values,
            "jax": jax.__version__,
        }
        self._saving = step
        try:
            if self._manager is None:
                self._manager = self._open_manager()
            orbax.start_saving(self._manager, step, arrays, record.seal(about), values)
        except Exception as error:
            raise self._failed(error) from error
        if wait:
            self.wait()

    def check(self) -> None:
        """Raises what went wrong in the background; does not wait. Call it every step.

        Raises:
          OSError: the last save failed; carries the path and says what to do.
        """
        if self._manager is not None and not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Waits until the last save is on disk.

        Raises:
          OSError: it failed; carries the path and says what to do.
        """
        if self._manager is None or self._saving is None:
            return
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._failed(error) from error
        self._saving = None

    def close(self) -> None:
        """Waits for the last save and ends the background threads."""
        try:
            self.wait()
        finally:
            manager, self._manager = self._manager, None
            if manager is not None:
                manager.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def restore(
        self,
        abstract_state: PyTree | None,
        step: int | None = None,
        residual: ResidualPolicy = "sum",
    ) -> Restored:
        """Reads a checkpoint onto the shardings asked for, whatever it was saved with.

        Every array's digest is compared with the saved one. A newest checkpoint that is damaged is
        skipped with a ``CheckpointWarning``, and the newest that verifies is taken; the damaged one
        is renamed, not removed, when the run saves again.

        What error feedback owes (leaves in a NamedTuple's field ``residual``) is moved to another
        number of workers, K to K', after it was verified: worker ``j`` takes over the residuals of
        all ``k`` with ``k mod K' = j``. A mean over the workers owes their sum divided by their
        number, so that ``"sum"`` keeps every worker's own debt, which then counts ``K / K'`` as
        much in the mean, as the workers' gradients do; ``"mean"`` keeps what the mean owes.

        Args:
          abstract_state: Pytree of ``jax.ShapeDtypeStruct`` with shardings, or of arrays. ``None``:
            whatever was saved, as ``{path: array}`` on this process's first device.
          step: This step and no other; the newest by default.
          residual: ``"sum"``; ``"mean"``, which multiplies by ``K' / K`` as well; or ``"reset"``,
            which begins with zeros whatever was saved, and reads none of it, on the same number of
            workers too (also where the checkpoint has no residuals, or the new run none).

        Raises:
          ValueError: the checkpoint is of another model or configuration, or holds another value
            per worker for another number of workers; names each difference. No array has been
            read.
          OSError: there is no such checkpoint, or none that verifies; says why for each.
        """
        self.wait()
        residuals.check_policy(residual)
        owed = residuals.debts(abstract_state)
        wanted = None if abstract_state is None else leaves.by_path(abstract_state)
        leaves.check_shardings(wanted or {})
        steps = self.steps()
        if not steps or (step is not None and step not in steps):
            what = "no checkpoint" if step is None else f"no checkpoint of step {step}"
            raise FileNotFoundError(errno.ENOENT, f"{what}; there are {steps}", str(self.folder))
        reasons = []
        for candidate in reversed(steps) if step is None else [step]:
            arrays, data, reason = self._read(candidate, wanted, owed, residual)
            if reason is None:
                if wanted is None:
                    return Restored(arrays, data, candidate)
                structure = jax.tree.structure(abstract_state)
                state = jax.tree.unflatten(structure, [arrays[path] for path in wanted])
                return Restored(state, data, candidate)
            reasons.append(f"step {candidate}: {reason}")
            if step is None:
                self._damaged.add(candidate)
                message = f"Checkpoint of step {candidate} in {self.folder} skipped: {reason}."
                _log.error(message)
                warnings.warn(message, CheckpointWarning, stacklevel=2)
        raise OSError(
            errno.EIO,
            f"no checkpoint could be restored:{record.listed(reasons)}\nRestore another copy of "
            "the folder, or start anew in another",
            str(self.folder),
        )

    def _read(
        self,
        step: int,
        wanted: dict[str, Any] | None,
        owed: frozenset[str],
        policy: ResidualPolicy,
    ) -> tuple[dict[str, jax.Array], Any, str | None]:
        """``(arrays, data, None)``, or the reason why the checkpoint is damaged."""
        try:
            about = self._record(step)
        except (OSError, ValueError) as error:
            return {}, None, str(error)
        self._refuse_other_record(step, about)
        if wanted is None:
            wanted = leaves.as_recorded(about["leaves"])
        plan = residuals.plan(about, wanted, owed, policy)
        if plan.refusal:
            raise ValueError(f"the checkpoint of step {step} in {self.folder} {plan.refusal}")
        arrays: dict[str, jax.Array] = {}
        reason = None
        try:
            arrays = orbax.read_arrays(folders.arrays_path(self.folder, step), plan.asked)
            reason = orbax.unlike(arrays, plan.asked)
        except (MemoryError, jax.errors.JaxRuntimeError):
            raise  # the machine's trouble, not the checkpoint's
        except Exception as error:
            reason = f"its arrays cannot be read ({brief(true_cause(error))})"
        if not _everywhere(reason is None):
            return {}, None, reason or "its arrays cannot be read by another process"
        digests = _digests(arrays)
        changed = [path for path in arrays if digests[path] != about["digests"].get(path)]
        if changed:
            more = f" and {len(changed) - 3} more leaves" if len(changed) > 3 else ""
            names = ", ".join(repr(path) for path in changed[:3])
            return {}, None, f"{names}{more}: the bits are not those saved (digests differ)"
        return arrays | residuals.settle(arrays, wanted, plan), about["data"], None

    def _record(self, step: int) -> record.Json:
        return record.unseal(folders.record_path(self.folder, step).read_bytes())

    def _refuse_other_config(self) -> None:
        for step in reversed(self.steps()):
            try:
                about = self._record(step)
            except (OSError, ValueError):
                continue  # damaged: restore() says so, and takes an older one
            self._refuse_other_record(step, about)
            return

    def _refuse_other_record(self, step: int, about: record.Json) -> None:
        if self._config is None:
            return
        differences = record.config_differences(about["config"], self._config)
        if differences:
            raise ValueError(
                f"the checkpoint of step {step} in {self.folder} is of another configuration:"
                f"{record.listed(differences)}\nResume with the saved values, or start anew in "
                "another folder. Nothing was written."
            )

    def _set_damaged_aside(self) -> None:
        if not self._damaged:
            return
        if jax.process_index() == 0:
            folders.set_aside(self.folder, self._damaged)
        self._damaged.clear()
        _everywhere(True)  # nobody may list the folder before the names have changed
        if self._manager is not None:
            self._manager.reload()

    def _open_manager(self) -> ocp.CheckpointManager:
        score = self._best_metric and orbax.scorer(self._best_metric, self._best_mode)
        return orbax.open_manager(self.folder, self._keep, score or None, self._keep_best)

    def _checked_metrics(self, metrics: Mapping[str, float] | None) -> dict[str, float]:
        values = {name: float(value) for name, value in (metrics or {}).items()}
        if self._best_metric is not None and self._best_metric not in values:
            raise ValueError(
                f"save() needs metrics with {self._best_metric!r}, by which the best checkpoints "
                f"are kept; got {sorted(values)}."
            )
        return values

    def _failed(self, error: Exception) -> OSError:
        """Drops the manager, which promises nothing after an error, and what it left behind."""
        step, self._saving = self._saving, None
        manager, self._manager = self._manager, None
        try:
            if manager is not None:
                manager.close()
        except Exception as second:
            _log.warning("closing after a failed save: %s", brief(second))
        if jax.process_index() == 0 and step is not None:
            folders.remove_unfinished(self.folder, step)
        return os_error(error, f"the checkpoint of step {step} was not saved", self.folder)


def _digests(arrays: Mapping[str, jax.Array]) -> dict[str, int]:
    return dict(zip(arrays, digest_arrays(list(arrays.values())), strict=True))


def _checked_json(data: Any) -> Any:
    try:
        return json.loads(json.dumps(data))
    except (TypeError, ValueError) as error:
        raise ValueError(f"data must be JSON (numbers, strings, lists, dicts): {error}.") from error


def _everywhere(flag: bool) -> bool:
    """Whether the flag is true in every process; also a barrier."""
    if jax.process_count() == 1:
        return flag
    return bool(np.all(multihost_utils.process_allgather(np.array([flag]))))
