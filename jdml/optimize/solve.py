"""Takes steps until a certificate says that they are enough."""

import contextlib
import functools
import math
import sys
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from jdml.optimize.base import Method, Params, Problem, State

CHECKS = 256
"""Most certificates in one call of the compiled program."""
SECONDS = 0.25
"""What a call should take: long beside its dispatch, short for who watches or interrupts."""


class History(NamedTuple):
    """What was measured on the way, an entry for each check, the start included.

    Attributes:
      steps: int ``[checks]``, steps taken.
      values: ``[checks]``, the objective.
      certificates: ``[checks]``.
    """

    steps: np.ndarray
    values: np.ndarray
    certificates: np.ndarray


class Solution(NamedTuple):
    """What ``solve`` found.

    Attributes:
      params: The parameters.
      value: The objective there.
      certificate: The method's certificate there.
      num_steps: Steps taken.
      converged: Whether the certificate is at most ``tol``.
      history: See :class:`History`.
      state: The method's state, from which ``solve`` can go on.
      compile_seconds: Wall time of tracing and compiling; about 0 when that was done before.
      seconds: Wall time of everything else.
    """

    params: Params
    value: float
    certificate: float
    num_steps: int
    converged: bool
    history: History
    state: State
    compile_seconds: float
    seconds: float


def solve(
    problem: Problem,
    method: Method,
    tol: float = 1e-6,
    max_steps: int = 1000,
    *,
    params: Params | None = None,
    state: State | None = None,
    check_every: int | None = None,
    progress: bool | None = None,
) -> Solution:
    """Minimises ``problem`` by ``method`` until its certificate is at most ``tol``.

    Steps are compiled, and many are taken in one call, as many as last about a quarter of a second.
    A method, shapes and dtypes are compiled once per process.

    Args:
      problem: What to minimise.
      method: By what.
      tol: Bound on the certificate, in its units (``method.certificate``); 0 takes all steps.
      max_steps: Steps at most, those of ``state`` not counted.
      params: Where to start; ``problem.init()`` by default.
      state: A state to go on from, instead of ``params``.
      check_every: Steps between certificates; the method's own choice by default.
      progress: Whether to show a line of progress; by default if standard error is a terminal.

    Returns:
      The solution. ``converged`` is False when the steps ran out, and when the objective or the
      certificate stopped being a number (the last state is there to be looked at).

    Raises:
      ValueError: the method cannot do the loss or the penalty (those that can are named), ``tol``
        or ``max_steps`` are out of range, or f64 data meet a session of JAX without f64.
    """
    if not (math.isfinite(tol) and tol >= 0):
        raise ValueError(f"solve(tol={tol}): expected a number >= 0.")
    if max_steps < 0:
        raise ValueError(f"solve(max_steps={max_steps}): expected at least 0.")
    if check_every is not None and check_every < 1:
        raise ValueError(f"solve(check_every={check_every}): expected at least 1.")
    if params is not None and state is not None:
        raise ValueError("solve: params and state were both given; expected one of them.")
    if problem.dtype == np.float64 and jnp.zeros(()).dtype != np.float64:
        raise ValueError(
            "solve: the problem is in float64, and this session of JAX has no float64. Switch it "
            'on with jax.config.update("jax_enable_x64", True), or call solve within '
            "`with jax.enable_x64():`, or build the problem from float32."
        )
    method.check(problem)
    every = min(check_every or method.check_every(problem), max(max_steps, 1))

    start = time.perf_counter()
    if state is None:
        state = _init(method, problem, problem.init() if params is None else params)
        state = method.seeded(state)
    found = _Run(state, *_measure(method, problem, state))
    # No step is taken yet: this compiles.
    _advance(method, problem, found, tol, 0, 0, every)
    compiled = time.perf_counter()

    parts = [(0, np.asarray(found.value)[None], np.asarray(found.certificate)[None])]
    taken, checks = 0, 4
    with _line(progress, method, tol) as show:
        while found.certificate > tol and taken < max_steps and np.isfinite(found.value):
            before = time.perf_counter()
            found, steps, count, values, certificates = _advance(
                method, problem, found, tol, min(checks, CHECKS), max_steps - taken, every
            )
            num = int(count)
            parts.append((taken, np.asarray(values)[:num], np.asarray(certificates)[:num]))
            taken += int(steps)
            spent = max(time.perf_counter() - before, 1e-6)
            checks = int(np.clip(checks * SECONDS / spent, 1, 8 * checks))
            show(taken, found)
        params = _params(method, problem, found.state)
        jax.block_until_ready(params)
    end = time.perf_counter()

    numbers = [np.minimum(at + every * np.arange(1, len(v) + 1), taken) for at, v, _ in parts]
    numbers[0] = np.zeros(1, int)
    history = History(
        np.concatenate(numbers),
        np.concatenate([v for _, v, _ in parts]),
        np.concatenate([c for _, _, c in parts]),
    )
    value, certificate = float(found.value), float(found.certificate)
    return Solution(
        params,
        value,
        certificate,
        taken,
        bool(certificate <= tol and math.isfinite(value)),
        history,
        found.state,
        compiled - start,
        end - compiled,
    )


class _Run(NamedTuple):
    state: Any
    value: jax.Array
    certificate: jax.Array


@functools.partial(jax.jit, static_argnames="method")
def _init(method: Method, problem: Problem, params: Params) -> State:
    return method.init(problem, params)


@functools.partial(jax.jit, static_argnames="method")
def _measure(method: Method, problem: Problem, state: State):
    return method.measure(problem, state)


@functools.partial(jax.jit, static_argnames="method")
def _params(method: Method, problem: Problem, state: State) -> Params:
    return method.params(problem, state)


@functools.partial(jax.jit, static_argnames="method")
def _advance(method: Method, problem: Problem, run: _Run, tol, checks, max_steps, every):
    """Up to ``checks`` times ``every`` steps, fewer when ``tol`` or ``max_steps`` is reached.

    Returns:
      The run, steps taken, checks made, and the values and certificates of those, ``[CHECKS]``.
    """
    empty = jnp.zeros(CHECKS, run.value.dtype), jnp.zeros(CHECKS, run.certificate.dtype)

    def unfinished(carry):
        run, steps, count, *_ = carry
        # A value that is no number ends it; so does a certificate, which compares as False.
        going = (run.certificate > tol) & jnp.isfinite(run.value)
        return going & (count < checks) & (steps < max_steps)

    def more(carry):
        run, steps, count, values, certificates = carry
        num = jnp.minimum(every, max_steps - steps)
        state = jax.lax.fori_loop(0, num, lambda _, s: method.step(problem, s), run.state)
        value, certificate = method.measure(problem, state)
        return (
            _Run(state, value, certificate),
            steps + num,
            count + 1,
            values.at[count].set(value),
            certificates.at[count].set(certificate),
        )

    zero = jnp.zeros((), jnp.int32)
    return jax.lax.while_loop(unfinished, more, (run, zero, zero, *empty))


@contextlib.contextmanager
def _line(progress: bool | None, method: Method, tol: float):
    """A function that shows how far a run is, on standard error."""
    console = Console(stderr=True)
    if not (console.is_terminal if progress is None else progress):
        yield lambda steps, run: None
        return
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=sys.stderr.isatty()) as bar:
        task = bar.add_task(method.name, total=None)

        def show(steps: int, run: _Run) -> None:
            bar.update(
                task,
                description=(
                    f"{method.name}: step {steps}, objective {float(run.value):.10g}, "
                    f"{method.certificate} {float(run.certificate):.2e} (until {tol:.0e})"
                ),
            )

        yield show
