"""Hogwild: threads that change one model in shared memory, without a lock and without a server."""

import dataclasses
import math
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jdml.communicate.pace.errors import PaceError
from jdml.communicate.pace.payload import Format
from jdml.communicate.pace.threads.wall import WallEvaluation
from jdml.communicate.pace.workers.base import Task

PyTree = Any


class Rows(NamedTuple):
    """A sparse update of a leaf: ``leaf[indices[i]] += values[i]``; an index may come twice.

    Attributes:
      indices: int ``[n]``, along the leaf's dim 0.
      values: ``[n, ...]``, the other dims as the leaf's.
    """

    indices: np.ndarray
    values: np.ndarray


@dataclasses.dataclass(frozen=True)
class HogwildRun:
    """What came of it.

    Attributes:
      params: The model, a pytree of NumPy arrays.
      wall_seconds: From the first step until all threads had stopped.
      num_steps: Of each thread.
      loss: Of each thread, what its last step returned.
      evaluations: What ``evaluate`` returned, in order; ``version`` counts all threads' steps.
    """

    params: PyTree
    wall_seconds: float
    num_steps: np.ndarray
    loss: list[Any]
    evaluations: list[WallEvaluation]


def hogwild(
    params: PyTree,
    task: Task,
    num_threads: int,
    *,
    num_steps: float = math.inf,
    seconds: float = math.inf,
    copy: bool = True,
    devices: Sequence[jax.Device] | None = None,
    evaluate: Callable[[Any], Any] | None = None,
    evaluate_every_seconds: float = math.inf,
) -> HogwildRun:
    """``w[e] += u(w)[e]`` for each thread, as fast as it can, whatever the others write meanwhile.

    A thread reads what stands there (perhaps half of another's update), computes a step of any
    loss, and adds it in place. Two that add to one element at one moment may lose one of the two.
    Where each step touches few elements, and most steps touch different ones, this converges nearly
    as fast as steps one after the other, which one thread does exactly.

    Python threads run NumPy and JAX in parallel only where these release the interpreter: on large
    leaves. State kept: one copy of the parameters, and one more per thread with ``copy``.

    Args:
      params: Pytree of arrays: the initial model. Copied.
      task: Its ``step`` returns the update of worker ``thread``'s step ``index``: a tree like the
        parameters, of whose leaves any may be :class:`Rows`.
      num_threads: At least 1.
      num_steps: Of each thread, at most.
      seconds: Wall seconds, at most.
      copy: Whether a step is handed a copy of the model as it stands. Without, it is handed the
        shared memory itself, read-only: for steps in NumPy that read a few elements. JAX may keep
        such memory as its own array, so that a task in JAX needs the copy.
      devices: Thread k computes on ``devices[k % len(devices)]``; by default
        ``jax.local_devices()``.
      evaluate: ``params -> value``, called in the caller's thread with a copy, before the start, at
        the end and every ``evaluate_every_seconds``.
      evaluate_every_seconds: > 0.

    Raises:
      ValueError: no limit, or no thread.
      PaceError: a thread failed; says which, at which step, and why.

    Reference: Recht, Ré, Wright & Niu, "Hogwild!: A Lock-Free Approach to Parallelizing Stochastic
    Gradient Descent", 2011, algorithm 1.
    """
    if num_threads < 1 or min(num_steps, seconds) == math.inf or not evaluate_every_seconds > 0:
        raise ValueError(
            f"hogwild(num_threads={num_threads!r}, num_steps={num_steps!r}, seconds={seconds!r}, "
            f"evaluate_every_seconds={evaluate_every_seconds!r}): expected at least one thread, a "
            "limit, and a time > 0."
        )
    places = list(jax.local_devices() if devices is None else devices)
    herd = _Herd(params, task, num_threads, num_steps, copy)
    evaluations: list[WallEvaluation] = []

    def look(wall_seconds: float) -> None:
        if evaluate is not None:
            version = int(herd.num_steps.sum())
            evaluations.append(WallEvaluation(wall_seconds, version, evaluate(herd.copied())))

    look(0.0)
    threads = [
        threading.Thread(target=herd.work, args=(k, places[k % len(places)]), name=f"hogwild {k}")
        for k in range(num_threads)
    ]
    began = time.monotonic()
    try:
        for thread in threads:
            thread.start()
        next_look = evaluate_every_seconds
        while any(thread.is_alive() for thread in threads):
            now = time.monotonic() - began
            if now >= seconds or herd.stop.is_set():
                break
            if now >= next_look:
                look(now)
                next_look = max(next_look + evaluate_every_seconds, time.monotonic() - began)
            left = min(seconds, next_look) - (time.monotonic() - began)
            herd.stopped.wait(min(max(left, 0.0), 60.0))
    finally:
        herd.stop.set()
        for thread in threads:
            if thread.ident is not None:
                thread.join()
        took = time.monotonic() - began
    if herd.error is not None:
        raise herd.error
    look(took)
    return HogwildRun(herd.copied(), took, herd.num_steps, herd.losses, evaluations)


class _Herd:
    """The shared model, and the threads' work."""

    def __init__(
        self, params: PyTree, task: Task, num_threads: int, num_steps: float, copy: bool
    ) -> None:
        self.task, self.most, self.copy = task, num_steps, copy
        self.format = Format(params, None)
        self.leaves = tuple(np.array(x) for x in jax.tree.leaves(params))
        views = tuple(x.view() for x in self.leaves)
        for x in views:
            x.flags.writeable = False
        self.shared = self.format.tree(views)
        self.num_steps = np.zeros(num_threads, np.int64)
        self.losses: list[Any] = [None] * num_threads
        self.running = num_threads
        self.stop, self.stopped = threading.Event(), threading.Event()
        self.error: PaceError | None = None
        self._counting = threading.Lock()

    def copied(self) -> PyTree:
        return self.format.tree(tuple(np.array(x) for x in self.leaves))

    def work(self, thread: int, device: jax.Device) -> None:
        try:
            with jax.default_device(device):
                state = self.task.init(thread, self.copied())
                while self.num_steps[thread] < self.most and not self.stop.is_set():
                    index = int(self.num_steps[thread])
                    read = self.copied() if self.copy else self.shared
                    update, state, self.losses[thread] = self.task.step(thread, read, state, index)
                    self.add(update)
                    self.num_steps[thread] += 1
        except BaseException as error:
            self.error = PaceError(
                f"hogwild: thread {thread} failed at its step {self.num_steps[thread]}: "
                f"{type(error).__name__}: {error}"
            )
            self.error.__cause__ = error
            self.stop.set()
        finally:
            with self._counting:
                self.running -= 1
            if self.stop.is_set() or not self.running:
                self.stopped.set()

    def add(self, update: PyTree) -> None:
        """In place, and without a lock."""
        parts = jax.tree.leaves(update, is_leaf=lambda x: isinstance(x, Rows))
        if len(parts) != len(self.leaves):
            raise ValueError(
                f"the update has {len(parts)} leaves, the parameters have {len(self.leaves)}: "
                f"{list(self.format.paths)}."
            )
        for x, part, path in zip(self.leaves, parts, self.format.paths, strict=True):
            if isinstance(part, Rows):
                np.add.at(x, part.indices, part.values)
                continue
            step = np.asarray(part)
            if step.shape != x.shape:
                raise ValueError(
                    f"the update's leaf {path!r} has shape {step.shape}, the parameter {x.shape}."
                )
            np.add(x, step, out=x, casting="same_kind")
