"""Linear models against scikit-learn: ``python -m benchmarks.linear [--json FILE]``.

Logistic regression with an intercept, ``Σ_i log(1 + e^{-y_i a_i}) + λ/2 |w|²``, by methods that
both have. Each is given the loosest tolerance of a grid with which its objective is within 1e-6 of
the minimum (scikit-learn's Newton to rounding); then all are run in turns, so that they meet the
same machine. A time is the median, from NumPy arrays to the fitted weights; ours is also given
without placing and checking the data, and what it takes to compile, once in a process, apart.
"""

import dataclasses
import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import tyro
from rich.table import Table

from benchmarks.machine import console_of_tables, machine
from jdml.models.linear import LinearProblem, Weights, l2, logistic
from jdml.optimize import Method, lbfgs, newton_cg, newton_cholesky, solve

PACKAGES = ("jax", "numpy", "scikit-learn")
GRID = [10.0**-e for e in range(1, 11)]


@dataclasses.dataclass
class Options:
    """What to measure.

    Attributes:
      samples: Rows, n.
      features: Columns, d.
      strength: λ.
      accuracy: Relative distance from the least objective that every method must reach.
      tries: Runs of each, of which the median is given.
      json: Where to write the figures.
    """

    samples: int = 20_000
    features: int = 50
    strength: float = 1.0
    accuracy: float = 1e-6
    tries: int = 9
    json: Path | None = None


class Run(NamedTuple):
    """One fit: the weights found, seconds of all, of solving, and of compiling."""

    weights: Weights
    seconds: float
    solve_seconds: float
    compile_seconds: float
    num_steps: int


class Figure(NamedTuple):
    """One row of the table; ``ratio`` is to scikit-learn's time with the method named."""

    name: str
    tol: float
    relative_error: float
    num_steps: int
    seconds: float
    solve_seconds: float | None
    compile_seconds: float | None
    against: str | None
    ratio: float | None

    @property
    def missed(self) -> bool:
        return self.ratio is not None and self.ratio > 1


Fit = Callable[[float], Run]


def data(options: Options) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    x = random.standard_normal((options.samples, options.features))
    scores = x @ random.standard_normal(options.features) / np.sqrt(options.features) + 0.3
    y = np.where(random.random(options.samples) < 1 / (1 + np.exp(-2 * scores)), 1, -1)
    return x, y


def ours(method: Method, x: np.ndarray, y: np.ndarray, strength: float) -> Fit:
    def fit(tol: float) -> Run:
        began = time.perf_counter()
        problem = LinearProblem(x, y, logistic(), l2(strength / len(x)), intercept=True)
        jax.block_until_ready(problem)
        placed = time.perf_counter()
        found = solve(problem, method, tol=tol, max_steps=500, progress=False)
        weights = jax.tree.map(np.asarray, found.params)
        end = time.perf_counter()
        return Run(weights, end - began, end - placed, found.compile_seconds, found.num_steps)

    return fit


def theirs(solver: str, x: np.ndarray, y: np.ndarray, strength: float) -> Fit:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    def fit(tol: float) -> Run:
        model = LogisticRegression(C=1 / strength, solver=solver, tol=tol, max_iter=500)
        began = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.fit(x, y)
        seconds = time.perf_counter() - began
        weights = Weights(model.coef_[0], model.intercept_[0])
        return Run(weights, seconds, seconds, 0.0, int(model.n_iter_[0]))

    return fit


def measure(options: Options) -> list[Figure]:
    x, y = data(options)
    of_ours: dict[str, tuple[Method, str]] = {
        "lbfgs": (lbfgs(), "scikit-learn lbfgs"),
        "newton_cholesky": (newton_cholesky(), "scikit-learn newton-cholesky"),
        "newton_cg": (newton_cg(), "scikit-learn newton-cg"),
    }
    fits = {
        f"scikit-learn {solver}": theirs(solver, x, y, options.strength)
        for solver in ("lbfgs", "newton-cholesky", "newton-cg")
    }
    fits |= {name: ours(method, x, y, options.strength) for name, (method, _) in of_ours.items()}
    problem = LinearProblem(x, y, logistic(), l2(options.strength / len(x)), intercept=True)
    least = float(problem.value(fits["scikit-learn newton-cholesky"](1e-12).weights))

    def error(run: Run) -> float:
        return float(problem.value(run.weights)) / least - 1

    compiled = {name: fit(GRID[0]).compile_seconds for name, fit in fits.items()}
    tolerances = {
        name: next((tol for tol in GRID if error(fit(tol)) <= options.accuracy), GRID[-1])
        for name, fit in fits.items()
    }
    runs: dict[str, list[Run]] = {name: [] for name in fits}
    for _ in range(options.tries):
        for name, fit in fits.items():
            runs[name].append(fit(tolerances[name]))

    def median(name: str, part: str = "seconds") -> float:
        return statistics.median(getattr(run, part) for run in runs[name])

    figures = []
    for name, found in runs.items():
        against = of_ours[name][1] if name in of_ours else None
        figures.append(
            Figure(
                name,
                tolerances[name],
                error(found[0]),
                found[0].num_steps,
                median(name),
                median(name, "solve_seconds") if against else None,
                compiled[name] if against else None,
                against,
                median(name) / median(against) if against else None,
            )
        )
    return figures


def main(options: Options) -> None:
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_enable_compilation_cache", False)
    figures = measure(options)
    title = (
        f"Logistic regression, n = {options.samples:,}, d = {options.features}, "
        f"λ = {options.strength:g}, f64, to {options.accuracy:g} of the minimum"
    )
    table = Table(title=title, caption=machine(*PACKAGES))
    for column in ("method", "steps", "error", "ms", "of it solving", "compile, s", "ratio"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for f in figures:
        ratio = "" if f.ratio is None else f"{f.ratio:.2f} × {f.against}"
        table.add_row(
            f.name,
            str(f.num_steps),
            f"{f.relative_error:.0e}",
            f"{1e3 * f.seconds:.1f}",
            "" if f.solve_seconds is None else f"{1e3 * f.solve_seconds:.1f}",
            "" if f.compile_seconds is None else f"{f.compile_seconds:.2f}",
            f"[red]{ratio}" if f.missed else ratio,
        )
    console_of_tables().print(table)
    if options.json is not None:
        content = {
            "machine": machine(*PACKAGES),
            "options": {k: str(v) for k, v in dataclasses.asdict(options).items() if k != "json"},
            "rows": [f._asdict() | {"missed": f.missed} for f in figures],
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
