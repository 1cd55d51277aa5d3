"""One method on rows divided one way: rounds, bytes and seconds until it is accurate enough."""

import collections
import functools
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.linear.methods import METHODS, WORKERS
from experiments.linear.wire import (
    FEATURES,
    LIGHTLY,
    SAMPLES,
    Tally,
    counted,
    first_state,
    wire_of,
)
from jdml.models.linear import LinearProblem, divide, shard_problem
from jdml.optimize import Method, solve
from jdml.partition import balanced_features, nonzeros_of_columns
from jdml.sharding import make_mesh

MOST_AT_ONCE = 256
"""Rounds between two looks at how far it is."""
SHORT = 0.5
"""Seconds below which the time is the median of three runs."""


class Case(NamedTuple):
    """A problem and one way to divide it.

    Attributes:
      problem: On one device.
      x: Its rows, as they were given.
      grid: ``(S, F)``.
    """

    problem: LinearProblem
    x: Any
    grid: tuple[int, int]

    def feature_parts(self) -> list[np.ndarray] | None:
        """Columns of about as many non-zeros for each worker; neighbours of dense rows."""
        if self.grid[1] == 1 or isinstance(self.x, np.ndarray):
            return None
        return balanced_features(nonzeros_of_columns(self.x), self.grid[1])

    def simulated(self) -> LinearProblem:
        """Its workers side by side on one device."""
        return divide(self.problem, *self.grid, feature_parts=self.feature_parts())

    def on_mesh(self, name: str) -> tuple[LinearProblem, Any]:
        """As a mesh of that many workers has it, and the mesh."""
        sizes = dict(zip((SAMPLES, FEATURES), self.grid, strict=True))
        shape = {axis: size for axis, size in sizes.items() if size > 1}
        mesh = make_mesh(shape, devices=jax.devices()[: self.grid[0] * self.grid[1]])
        if name in WORKERS:
            samples, features = (axis if axis in shape else 1 for axis in sizes)
            parts = self.feature_parts()
            return divide(self.problem, samples, features, mesh=mesh, feature_parts=parts), mesh
        axes = [axis if axis in shape else None for axis in sizes]
        return shard_problem(self.problem, mesh, *axes), mesh


class Path(NamedTuple):
    """What a method did on one device.

    Attributes:
      values: The objective after each round, the start included.
      seconds: Of these rounds without a look between, compiled before.
      compile_seconds: Once.
      counts: What each round computed, when asked for.
    """

    values: np.ndarray
    seconds: float
    compile_seconds: float
    counts: Any


class Result(NamedTuple):
    """What a method took.

    Attributes:
      rounds: Steps until the objective was near enough, or all that were allowed.
      converged: Whether it was.
      sent: Bytes a worker sent up to each round, ``[rounds + 1]``.
      gaps: ``(P - least) / least`` after each round, ``[rounds + 1]``.
      seconds, compile_seconds: As of :class:`Path`.
    """

    rounds: int
    converged: bool
    sent: np.ndarray
    gaps: np.ndarray
    seconds: float
    compile_seconds: float


class Bench:
    """One problem, its least objective, and what was found on the way.

    Methods of whole passes take the same steps however their rows are divided, save for rounding:
    they run once, undivided, and only their programs differ.
    """

    def __init__(
        self,
        problem: LinearProblem,
        x: Any,
        least: float,
        accuracy: float,
        max_rounds: int,
        max_seconds: float = 10.0,
    ) -> None:
        self.problem, self.x, self.least = problem, x, least
        self.accuracy, self.max_rounds, self.max_seconds = accuracy, max_rounds, max_seconds
        self._paths: dict[str, Path] = {}

    def measure(self, grid: tuple[int, int], name: str) -> Result:
        """Raises ``ValueError``, as ``solve`` does, where the method cannot do what it is given."""
        case, method = Case(self.problem, self.x, grid), METHODS[name]
        placed, mesh = case.on_mesh(name)
        method.check(placed)
        wire = wire_of(method, placed, mesh)
        path = self._paths.get(name)
        if path is None:
            path = self._follow(case.simulated() if name in WORKERS else self.problem, method)
            if name not in WORKERS:
                self._paths[name] = path
        rounds = len(path.values) - 1
        if wire.wants_counting:
            sent = [wire.sent(counts) for counts in path.counts()]
        else:
            sent = [wire.known] * rounds
        return Result(
            rounds,
            bool(path.values[-1] <= self.target),
            np.concatenate([[0], np.cumsum(sent)]).astype(np.int64),
            path.values / self.least - 1,
            path.seconds,
            path.compile_seconds,
        )

    @property
    def target(self) -> float:
        return self.least * (1 + self.accuracy)

    def _follow(self, problem: LinearProblem, method: Method) -> Path:
        """Until the target, in pieces that grow."""
        pieces: list[np.ndarray] = []
        compile_seconds, seconds, state, size = 0.0, 0.0, None, 16
        while True:
            found = solve(problem, method, 0.0, size, state=state, check_every=1, progress=False)
            pieces.append(found.history.values[bool(pieces) :])
            compile_seconds, state = compile_seconds + found.compile_seconds, found.state
            seconds += found.seconds
            left = (self.max_seconds - seconds) / max(found.seconds, 1e-6) * found.num_steps
            size = max(1, min(2 * size, MOST_AT_ONCE, int(left)))
            values = np.concatenate(pieces)
            near = np.flatnonzero(values <= self.target)
            spent = len(values) > self.max_rounds or seconds > self.max_seconds
            if near.size or spent or not np.isfinite(values[-1]):
                break
        rounds = int(near[0]) if near.size else min(len(values) - 1, self.max_rounds)
        count = functools.cache(lambda: counts_of(problem, method, rounds))
        return Path(
            values[: rounds + 1], seconds_of(problem, method, rounds), compile_seconds, count
        )


def counts_of(problem: Any, method: Method, rounds: int) -> list[collections.Counter[str]]:
    """What each round computed."""
    tally = Tally()
    seen = counted(problem, tally)
    state = jax.block_until_ready(first_state(method, seen))
    step = jax.jit(method.step, compiler_options=LIGHTLY)
    tally.take()
    found = []
    for _ in range(rounds):
        state = jax.block_until_ready(step(seen, state))
        found.append(tally.take())
    return found


def seconds_of(problem: Any, method: Method, rounds: int) -> float:
    """Of that many steps without a look between, compiled before."""

    def once() -> float:
        steps = max(rounds, 1)
        return solve(problem, method, 0.0, steps, check_every=steps, progress=False).seconds

    first = once()
    return first if first > SHORT else float(np.median([first, once(), once()]))
