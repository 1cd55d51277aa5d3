"""The loop around a step: progress, metrics, evaluation, checkpoints, a clean stop."""

import contextlib
import functools
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from jdml.sharding import bytes_per_axis, collectives
from jdml.sharding.fit import axes_of
from jdml.train.checkpoint import Checkpointer
from jdml.train.metrics_log import MetricsLog
from jdml.train.state import TrainState
from jdml.train.step import TrainStep

PyTree = Any

LINES_PER_RUN = 20
"""Without a terminal, about so many lines of progress are printed in a run."""


class Data(Protocol):
    """Endless batches with a position that can be saved; ``jdml.train.data.Batches`` is one."""

    def __next__(self) -> PyTree: ...
    def state(self) -> dict[str, Any]: ...


class FitResult(NamedTuple):
    """What :func:`fit` returns.

    Attributes:
      state: After the last step taken.
      finished: False if the run was told to stop (Ctrl-C, SIGTERM) before ``num_steps``.
    """

    state: TrainState
    finished: bool


def fit(
    step: TrainStep,
    state: TrainState,
    data: Data,
    num_steps: int,
    *,
    mesh: Mesh,
    workers: str | tuple[str, ...] = "data",
    checkpointer: Checkpointer | None = None,
    save_every: int = 0,
    evaluate: Callable[[TrainState], dict[str, float]] | None = None,
    eval_every: int = 0,
    log: MetricsLog | None = None,
    tokens_per_step: int = 0,
    name: str = "training",
    console: Console | None = None,
) -> FitResult:
    """Trains from ``state`` until ``state.step == num_steps``.

    Each row of the log holds ``step``, ``loss`` and the other metrics, ``seconds`` (time spent in
    steps since the run began, over all its resumptions; compilation, evaluation and saving left
    out), ``tokens_per_second``, ``bytes_per_step`` and ``bytes_sent``, and what ``evaluate`` gave.
    Bytes are what one device sends over axes that include the worker axis, read off the compiled
    program: of exchanges that happen on some steps only, those that happened
    (``jdml.communicate.branch``); a collective in a loop of unknown length counts as if that ran
    once.

    A ``step`` of several steps per call is given so many batches at once; the log still has a row
    for each step, which share the call's time. Checkpoints, evaluations and stops come after whole
    calls: after the call in which they fall due.

    Args:
      step: From :func:`jdml.train.make_step`.
      state: From ``init``, or restored.
      data: Endless batches, standing where ``state`` does.
      num_steps: Steps of the whole run, not of this call.
      mesh: The mesh of the step.
      workers: Its worker axis, or the tuple of them.
      checkpointer: Where to save every ``save_every`` steps, at the end, and on Ctrl-C or SIGTERM
        (one process).
      save_every: Steps between checkpoints; 0 saves at the end alone.
      evaluate: Called with the state every ``eval_every`` steps and at the end.
      eval_every: Steps between evaluations; 0 evaluates at the end alone.
      log: Takes a row per step.
      tokens_per_step: Tokens (or samples) of one global batch, for the speed.
      name: Shown before the progress bar.
      console: Where to print; by default the standard output of process 0.

    Raises:
      ValueError: the steps that are left are no whole number of calls.
    """
    first = int(state.step)
    log = MetricsLog(None) if log is None else log
    seconds = log.rows[-1]["seconds"] if log.rows else 0.0
    sent = log.rows[-1]["bytes_sent"] if log.rows else 0
    if console is None:
        console = Console(quiet=jax.process_index() != 0)
    if first >= num_steps:
        return FitResult(state, True)
    per_call = step.steps_per_call
    if (num_steps - first) % per_call:
        raise ValueError(
            f"fit: {num_steps - first} steps are left from step {first} to num_steps={num_steps}, "
            f"but a call takes steps_per_call={per_call}. Make num_steps "
            f"{first + -(-(num_steps - first) // per_call) * per_call}, or make_step with another "
            "steps_per_call."
        )

    batch = _next(data, per_call)
    started = time.perf_counter()
    compiled = step.lower(state, batch).compile()
    wire = _WireCounter(compiled, mesh, workers, per_call)
    at_most = "" if wire.always == wire.at_most else "at most "
    console.print(
        f"{name}: compiled in {time.perf_counter() - started:.1f} s; each device sends "
        f"{at_most}{format_bytes(wire.at_most)} per step over {workers!r}"
    )

    # On CPU, steps in flight together starve each other's collectives of threads.
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    in_flight: deque[tuple[int, dict[str, jax.Array]]] = deque()
    clock = time.perf_counter()

    def settle(more: Callable[[], dict[str, float]] | None = None) -> None:
        """Waits for the oldest call in flight and books it; time spent in ``more`` is not its."""
        nonlocal seconds, clock, sent
        number, metrics = in_flight.popleft()
        listed = {k: v.tolist() for k, v in jax.device_get(metrics).items()}
        elapsed = (time.perf_counter() - clock) / per_call
        for i in range(per_call):
            values = listed if per_call == 1 else {k: v[i] for k, v in listed.items()}
            seconds += elapsed
            row = {"step": number - per_call + 1 + i, **values, "seconds": seconds}
            if tokens_per_step:
                row["tokens_per_second"] = tokens_per_step / elapsed
            bytes_per_step = wire.sent(values)
            sent += bytes_per_step
            row |= {"bytes_per_step": bytes_per_step, "bytes_sent": sent}
            if more is not None and i == per_call - 1:
                row |= more()
            log.append(row)
            bar.update(row)
        clock = time.perf_counter()

    with _stop_on_signals() as stop, _Bar(console, name, first, num_steps) as bar:
        for number in range(first + per_call, num_steps + 1, per_call):
            if number > first + per_call:
                batch = _next(data, per_call)
            state, metrics = compiled(state, batch)
            in_flight.append((number, metrics))
            last = number == num_steps or stop.is_set
            saving = checkpointer is not None and (last or _due(number, save_every, per_call))
            evaluating = evaluate is not None and (last or _due(number, eval_every, per_call))
            if on_cpu:
                jax.block_until_ready(state)
            while len(in_flight) > 1:
                settle()
            if on_cpu or saving or evaluating or last:
                settle(functools.partial(evaluate, state) if evaluate and evaluating else None)
            if checkpointer is not None and saving:
                checkpointer.save(number, state, data=data.state(), wait=last)
                clock = time.perf_counter()
            elif checkpointer is not None:
                checkpointer.check()  # a save in the background may have failed
            if last:
                break
    return FitResult(state, number == num_steps)


def _due(number: int, every: int, per_call: int) -> bool:
    """Whether a multiple of ``every`` is among the last ``per_call`` steps up to ``number``."""
    return every > 0 and number % every < per_call


def _next(data: Data, per_call: int) -> PyTree:
    """A batch, or several as the leading dim of one."""
    if per_call == 1:
        return next(data)
    batches = [next(data) for _ in range(per_call)]
    return jax.tree.map(lambda *xs: _stack(xs), *batches)


def _stack(xs: tuple[Any, ...]) -> Any:
    if not isinstance(xs[0], jax.Array):
        return np.stack(xs)
    sharding = xs[0].sharding
    if not isinstance(sharding, NamedSharding):
        return jnp.stack(xs)
    # Rows stay on their devices.
    spec = PartitionSpec(None, *sharding.spec)
    return _stack_placed(xs, NamedSharding(sharding.mesh, spec))


@functools.partial(jax.jit, static_argnums=1)
def _stack_placed(xs: tuple[jax.Array, ...], sharding: NamedSharding) -> jax.Array:
    return jax.lax.with_sharding_constraint(jnp.stack(xs), sharding)


def format_bytes(count: float) -> str:
    """``"1.90 MB"``; decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


class _WireCounter:
    """Bytes that one device sends between workers, step by step, from the compiled program.

    Of a program of several steps a step's share: each of its collectives runs in all of them.
    """

    def __init__(self, compiled: Any, mesh: Mesh, workers: str | tuple[str, ...], per_call: int):
        self._per_call = per_call
        between = set(axes_of(workers))
        self._listed = [c for c in collectives(compiled, mesh) if between & set(c.axes or ())]
        self._names = {name for c in self._listed for name, _ in c.branches}
        self._known: dict[tuple[tuple[str, int], ...], int] = {}
        self.at_most = self._sum({})
        self.always = self._sum(dict.fromkeys(self._names, -1))

    def sent(self, metrics: dict[str, float]) -> int:
        """Of a step with these metrics, which tell the branches that were taken."""
        taken = {
            name: round(metrics[f"branch.{name}"])
            for name in sorted(self._names)
            if f"branch.{name}" in metrics
        }
        key = tuple(taken.items())
        if key not in self._known:
            self._known[key] = self._sum(taken)
        return self._known[key]

    def _sum(self, taken: dict[str, int]) -> int:
        total = sum(bytes_per_axis(self._listed, unknown_count=1, taken=taken).values())
        return round(total / self._per_call)


class _Flag:
    is_set = False


@contextlib.contextmanager
def _stop_on_signals() -> Iterator[_Flag]:
    """Ctrl-C and SIGTERM end the run after the step in hand; a second one ends it at once.

    With several processes they end it at once: a process that stopped by itself would leave the
    others waiting, and the newest checkpoint is there to go on from.
    """
    flag = _Flag()
    previous: dict[signal.Signals, Any] = {}
    if jax.process_count() > 1:
        yield flag
        return

    def handle(number: int, frame: Any) -> None:
        flag.is_set = True
        for which, handler in previous.items():
            signal.signal(which, handler)

    try:
        for which in (signal.SIGINT, signal.SIGTERM):
            previous[which] = signal.signal(which, handle)
    except ValueError:  # not in the main thread, where signals cannot be handled
        previous = {}
    try:
        yield flag
    finally:
        for which, handler in previous.items():
            signal.signal(which, handler)


class _Bar:
    """A progress bar on a terminal; a line now and then elsewhere."""

    def __init__(self, console: Console, name: str, first: int, num_steps: int):
        self._console = console
        self._name = name
        self._every = max(1, num_steps // LINES_PER_RUN)
        self._num_steps = num_steps
        self._first = first
        self._speed = 0.0
        self._progress: Progress | None = None

    def __enter__(self) -> "_Bar":
        if self._console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TextColumn("{task.fields[text]}"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._progress.start()
            self._task = self._progress.add_task(
                self._name, total=self._num_steps, completed=self._first, text=""
            )
        return self

    def update(self, row: dict[str, Any]) -> None:
        """Shows a row of metrics."""
        speed = row.get("tokens_per_second", 0.0)
        self._speed = speed if not self._speed else 0.9 * self._speed + 0.1 * speed
        parts = [f"loss {row['loss']:.3f}"]
        parts += [f"{k} {v:.3f}" for k, v in row.items() if k.startswith("val_")]
        if speed:
            parts.append(f"{self._speed:,.0f} tokens/s")
        parts.append(f"{format_bytes(row['bytes_sent'])} sent")
        text = "  ".join(parts)
        if self._progress is not None:
            self._progress.update(self._task, completed=row["step"], text=text)
        elif row["step"] % self._every == 0 or row["step"] == self._num_steps:
            self._console.print(f"{self._name}  {row['step']}/{self._num_steps}  {text}")

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.stop()
