"""Distributed linear models: ``python -m benchmarks.cocoa [--json FILE]``.

Two questions. How many rounds CoCoA+ and CoCoA take to a duality gap of 1e-4 with K simulated
workers, in relation to one worker (target for CoCoA+: at most twice as many up to K = 64). A round
is one pass over each worker's samples, so that it is as many coordinate steps in all whatever K is;
rows are of length 1, as the theory has them, dense ones and sparse ones. CoCoA+ runs with the safe
``σ' = K``, with one that it measures in each round, and with searched steps. And how long consensus
ADMM over four blocks takes to 1e-6 of the least objective of a logistic regression,
``Σ_i log(1 + e^{-y_i a_i}) + λ/2 |w|²``, beside GIANT, DANE and, where installed, dask-glm's
ADMM on the same blocks (target: 50 times faster). Each is given the loosest tolerance of a grid
that takes it there. Times are medians, from placed data to the weights, dask-glm's of one run;
what compiling takes, once in a process, is apart.
"""

import dataclasses
import itertools
import json
import statistics
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import scipy.sparse
import tyro
from rich.table import Table

from benchmarks import admm_dask_glm
from benchmarks.machine import console_of_tables, machine
from jdml.aggregate.linear import LocalSDCA, cocoa, consensus, dane, giant
from jdml.models.linear import LinearProblem, divide, hinge, l2, logistic
from jdml.optimize import newton_cholesky, solve

PACKAGES = ("jax", "numpy", "dask-glm", "dask")
WORKERS = (1, 2, 4, 8, 16, 64)
LOSSES = {"hinge": hinge(), "logistic": logistic()}
METHODS: dict[str, dict[str, Any]] = {
    "CoCoA+, searched": {"gamma": "search"},
    "CoCoA+, measured σ'": {"sigma": "measured"},
    "CoCoA+, σ' = K": {},
    "CoCoA": {"gamma": None},
}
TARGET = 2.0
BLOCKS = 4
ACCURACY = 1e-6
DASK_GLM = "dask-glm's ADMM"


@dataclasses.dataclass
class Options:
    """What to measure.

    Attributes:
      samples: Rows, n.
      features: Columns of the dense rows, d.
      sparse_features: Those of the sparse ones.
      non_zeros: Of a sparse row.
      strengths: λ of CoCoA's problems, ``(1/n) Σ φ + λ/2 |w|²``, with dense rows.
      sparse_strengths: With sparse ones.
      gap: Duality gap to be reached.
      passes: Over a worker's samples, each round.
      rounds: At most.
      tries: Runs of each ADMM, of which the median is given.
      only: Measure the times of the ADMMs alone, or the rounds alone.
      json: Where to write the figures.
    """

    samples: int = 20_000
    features: int = 50
    sparse_features: int = 5_000
    non_zeros: int = 50
    strengths: tuple[float, ...] = (1e-2, 1e-3)
    sparse_strengths: tuple[float, ...] = (1e-3, 1e-4)
    gap: float = 1e-4
    passes: int = 1
    rounds: int = 300
    tries: int = 5
    only: Literal["times", "rounds"] | None = None
    json: Path | None = None


class Rounds(NamedTuple):
    """``bytes`` are what a worker would send until then."""

    rows: str
    method: str
    loss: str
    strength: float
    workers: int
    rounds: int
    converged: bool
    bytes: int


class Time(NamedTuple):
    """``rounds`` and ``compile_seconds`` are None for dask-glm, which does not tell."""

    method: str
    relative_error: float
    rounds: int | None
    seconds: float
    compile_seconds: float | None


def data(n: int, d: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    x = random.standard_normal((n, d))
    scores = x @ random.standard_normal(d) / np.sqrt(d) + 0.3
    return x, np.where(random.random(n) < 1 / (1 + np.exp(-2 * scores)), 1, -1)


def sparse_data(options: Options) -> tuple[scipy.sparse.csr_array, np.ndarray]:
    """Non-zeros in columns drawn evenly; labels with about as much noise as score."""
    random = np.random.default_rng(0)
    n, d, num = options.samples, options.sparse_features, options.non_zeros
    entries = (
        random.standard_normal(n * num),
        random.integers(0, d, n * num),
        np.arange(n + 1) * num,
    )
    x = scipy.sparse.csr_array(entries, shape=(n, d))
    x.sum_duplicates()
    scores = x @ random.standard_normal(d)
    y = np.where(scores + np.sqrt(num) / 3 * random.standard_normal(n) > 0, 1, -1)
    lengths = np.sqrt(np.add.reduceat(x.data**2, x.indptr[:-1]))
    x.data /= np.repeat(lengths, np.diff(x.indptr))
    return x, y


def measure_rounds(options: Options) -> list[Rounds]:
    x, y = data(options.samples, options.features)
    sets: dict[str, tuple[Any, np.ndarray, tuple[float, ...]]] = {
        "dense": (x / np.linalg.norm(x, axis=1, keepdims=True), y, options.strengths),
        "sparse": (*sparse_data(options), options.sparse_strengths),
    }
    found = []
    for kind, (x, y, strengths) in sets.items():
        for num, (loss_name, loss) in itertools.product(WORKERS, LOSSES.items()):
            problem = divide(LinearProblem(x, y, loss, l2(1.0)), num)
            for (name, chosen), strength in itertools.product(METHODS.items(), strengths):
                method = cocoa(local=LocalSDCA(options.passes), **chosen)
                run = solve(
                    problem.replace(penalty=l2(strength)), method, options.gap, options.rounds,
                    check_every=1, progress=False,
                )  # fmt: skip
                scalars = 10 if "search" in chosen.values() else "measured" in chosen.values()
                numbers = x.shape[1] + scalars
                sent = round(2 * (num - 1) / num * numbers * 8) * run.num_steps
                found.append(
                    Rounds(kind, name, loss_name, strength, num, run.num_steps, run.converged, sent)
                )
        jax.clear_caches()
    return found


def measure_times(options: Options) -> list[Time]:
    x, y = data(20_000, 50)
    problem = LinearProblem(x, y, logistic(), l2(1 / len(x)))
    least = solve(problem, newton_cholesky(), 1e-12, 50, progress=False).value
    divided = divide(problem, BLOCKS)
    jax.block_until_ready(divided)
    times = []
    for method in (consensus(), giant(), dane()):
        tolerances = [10.0 ** (-e / 4) for e in range(8, 41)]
        compiled = solve(divided, method, tolerances[0], 0, progress=False).compile_seconds

        def error(tol: float, method=method) -> float:
            return solve(divided, method, tol, 200, progress=False).value / least - 1

        tol = next((t for t in tolerances if error(t) <= ACCURACY), tolerances[-1])
        runs = [solve(divided, method, tol, 200, progress=False) for _ in range(options.tries)]
        seconds = statistics.median(run.seconds + run.compile_seconds for run in runs)
        times.append(
            Time(method.name, runs[0].value / least - 1, runs[0].num_steps, seconds, compiled)
        )
    if admm_dask_glm.is_installed():
        for tol in admm_dask_glm.TOLERANCES:
            fit = admm_dask_glm.fit(x, y, 1.0, BLOCKS, tol)
            params = problem.init()._replace(w=fit.weights)
            error_of_peer = float(problem.value(params)) / least - 1
            if error_of_peer <= ACCURACY:
                break
        name = f"{DASK_GLM} ({fit.scheduler})"
        times.append(Time(name, error_of_peer, None, fit.seconds, None))
    return times


def table_of_times(times: list[Time]) -> Table:
    peer = next((t.seconds for t in times if t.method.startswith(DASK_GLM)), None)
    table = Table(
        title=f"Logistic, n = 20,000, d = 50, λ = 1, f64, {BLOCKS} blocks, to {ACCURACY:g}",
        caption=machine(*PACKAGES),
    )
    for column in ("method", "rounds", "error", "ms", "compile, s", f"{DASK_GLM} / this"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for t in times:
        table.add_row(
            t.method,
            "–" if t.rounds is None else str(t.rounds),
            f"{t.relative_error:.0e}",
            f"{1e3 * t.seconds:.1f}",
            "–" if t.compile_seconds is None else f"{t.compile_seconds:.2f}",
            "–" if peer is None else f"{peer / t.seconds:.0f}",
        )
    return table


def table_of_rounds(options: Options, rounds: list[Rounds]) -> Table:
    table = Table(
        title=(
            f"Rounds to a gap of {options.gap:g}: n = {options.samples:,}, |x| = 1, "
            f"local passes {options.passes}; dense, d = {options.features}; sparse, "
            f"d = {options.sparse_features:,}, {options.non_zeros} non-zeros a row"
        ),
        caption=f"target of CoCoA+: at most {TARGET:g}\n{machine(*PACKAGES)}",
    )
    for column in (
        "rows",
        "loss",
        "λ",
        "method",
        *(f"K = {num}" for num in WORKERS),
        "most / K = 1",
    ):
        table.add_column(column, justify="left" if column == "method" else "right")
    keys = sorted({(r.rows, r.loss, -r.strength) for r in rounds})
    for (kind, loss, strength), name in itertools.product(keys, METHODS):
        row = [
            r
            for r in rounds
            if (r.rows, r.loss, -r.strength, r.method) == (kind, loss, strength, name)
        ]
        shown = [str(r.rounds) if r.converged else f"> {r.rounds}" for r in row]
        growth = max(r.rounds for r in row) / row[0].rounds
        said = f"{growth:.2f}" if all(r.converged for r in row) else f"> {growth:.1f}"
        missed = name != "CoCoA" and growth > TARGET
        table.add_row(
            kind, loss, f"{-strength:g}", name, *shown, f"[red]{said}" if missed else said
        )
    return table


def main(options: Options) -> None:
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_enable_compilation_cache", False)
    times = measure_times(options) if options.only != "rounds" else []
    rounds = measure_rounds(options) if options.only != "times" else []
    if times:
        console_of_tables().print(table_of_times(times))
    if rounds:
        console_of_tables().print(table_of_rounds(options, rounds))
    if options.json is not None:
        content = {
            "machine": machine(*PACKAGES),
            "options": {k: str(v) for k, v in dataclasses.asdict(options).items() if k != "json"},
            "times": [t._asdict() for t in times],
            "rounds": [r._asdict() for r in rounds],
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
