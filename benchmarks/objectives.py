"""Least objectives against scikit-learn's: ``python -m benchmarks.objectives [--json FILE]``.

Each loss on scikit-learn's bundled data sets and on two generated ones, by the solver that suits it
and by another on the generated ones, in f64; in f32 by the first. For each the objective, computed
in f64, relative to that of scikit-learn's most precise solver (``references.py``), and the seconds
of both: from NumPy arrays to weights, once, without what compiling takes, which is apart. Target:
at most 1e-8 above it in f64, and 1e-5 in f32. Less than 0 is a lower objective than
scikit-learn's. Certificates (gradient norms, duality gaps) are asked to fall by a factor.
"""

import dataclasses
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import scipy.sparse
import tyro
from rich.table import Table
from sklearn import datasets

from benchmarks.machine import console_of_tables, machine
from benchmarks.references import Case, cases, reference
from jdml.models.linear import LinearProblem, Weights
from jdml.optimize import (
    Method,
    coordinate_descent,
    lbfgs,
    newton_cg,
    newton_cholesky,
    proximal,
    sdca,
    solve,
)

PACKAGES = ("jax", "numpy", "scipy", "scikit-learn")
TARGETS = {"float64": 1e-8, "float32": 1e-5}
FALLS = {
    ("float64", "duality gap"): 1e-10,
    ("float64", "gradient norm"): 1e-7,
    ("float32", "duality gap"): 1e-6,
    ("float32", "gradient norm"): 1e-5,
}
"""To which share of what it is at w = 0 a certificate must fall."""
BUNDLED = {
    "breast cancer": datasets.load_breast_cancer,
    "digits": datasets.load_digits,
    "diabetes": datasets.load_diabetes,
    "wine": datasets.load_wine,
}
GENERATED = ("dense", "sparse")
LOSSES = (
    "ridge", "lasso", "elastic net", "logistic", "multinomial", "hinge", "squared hinge",
    "smoothed hinge", "poisson",
)  # fmt: skip
COLUMNS = ["rows", "loss", "solver", "dtype", "relative", "steps", "s", "compile, s", "theirs, s"]


@dataclasses.dataclass
class Options:
    """What to measure.

    Attributes:
      sets: Of the bundled ones, "dense" and "sparse".
      losses: Of ``LOSSES``.
      only: Rows such as "sparse, lasso"; by default every loss on every set.
      dense: Rows and columns of the dense set.
      sparse: Of the sparse one.
      non_zeros: Of a sparse row.
      json: Where to write the figures.
      markdown: Where to write the table.
    """

    sets: tuple[str, ...] = (*BUNDLED, *GENERATED)
    losses: tuple[str, ...] = LOSSES
    only: tuple[str, ...] = ()
    dense: tuple[int, int] = (200_000, 200)
    sparse: tuple[int, int] = (100_000, 50_000)
    non_zeros: int = 50
    json: Path | None = None
    markdown: Path | None = None


class Row(NamedTuple):
    """``relative`` is (ours - theirs) / |theirs|; ``certificate`` is in the method's units."""

    set: str
    loss: str
    solver: str
    dtype: str
    relative: float
    certificate: float
    steps: int
    seconds: float
    compile_seconds: float
    objective: float
    their_objective: float
    their_seconds: float

    @property
    def missed(self) -> bool:
        return not self.relative <= TARGETS[self.dtype]


def load(name: str, options: Options) -> tuple[Any, np.ndarray, float]:
    """X, target and the strength of l2."""
    if name in BUNDLED:
        x, target = BUNDLED[name](return_X_y=True)
        spread = x.std(0)
        return (x - x.mean(0)) / np.where(spread > 0, spread, 1), target.astype(float), 0.01
    if name == "dense":
        return *dense_rows(*options.dense), 0.01
    # Rows are as long as dense ones, and columns far emptier: the same λ would leave nothing.
    return *sparse_rows(*options.sparse, options.non_zeros), 1e-4


def dense_rows(n: int, d: int) -> tuple[np.ndarray, np.ndarray]:
    """Columns that are correlated, and a target of which a half is noise."""
    random = np.random.default_rng(0)
    x = random.standard_normal((n, d))
    x += 0.5 * random.standard_normal((n, 1))
    score = x @ random.standard_normal(d)
    return x, score / score.std() + random.standard_normal(n)


def sparse_rows(n: int, d: int, non_zeros: int) -> tuple[scipy.sparse.csr_array, np.ndarray]:
    """As many non-zeros in each row, in columns drawn evenly."""
    random = np.random.default_rng(0)
    columns = random.integers(0, d, n * non_zeros, dtype=np.int32)
    starts = np.arange(n + 1, dtype=np.int32) * non_zeros
    x = scipy.sparse.csr_array((random.standard_normal(n * non_zeros), columns, starts), (n, d))
    x.sum_duplicates()
    score = x @ random.standard_normal(d)
    return x, score / score.std() + random.standard_normal(n)


def methods_of(name: str, case: Case) -> list[Method]:
    """The method that suits it first."""
    newton = newton_cholesky() if case.by_matrix else newton_cg()
    if not case.penalty.smooth:
        return [coordinate_descent(), proximal()]
    if not case.loss.differentiable:
        return [sdca()]
    others = {"squared hinge": sdca()}
    return [newton, others.get(name, lbfgs())]


def run(case: Case, method: Method, dtype: str) -> tuple[Any, float]:
    """What was found, and the seconds from arrays to weights."""
    many = 20_000 if len(case.y) < 10_000 else 500
    steps = 100 if "newton" in method.name else many
    with jax.enable_x64(dtype == "float64"):
        began = time.perf_counter()
        problem = case.problem(np.dtype(dtype))
        jax.block_until_ready(problem)
        placing = time.perf_counter() - began
        certificate = "duality gap" if method.certificate == "duality gap" else "gradient norm"
        start = solve(problem, method, max_steps=0, progress=False)
        first = start.certificate
        # Of one that is no number nothing is asked: what comes of it is a row of the table, too.
        tol = FALLS[dtype, certificate] * first if math.isfinite(first) else 0.0
        # At the end rounding may keep an f32 certificate from falling; what is there is compared.
        found = solve(problem, method, tol, steps, progress=False)
        found = found._replace(
            params=jax.tree.map(np.asarray, found.params),
            compile_seconds=start.compile_seconds + found.compile_seconds,
        )
    return found, placing + found.seconds


def measure(name: str, loss: str, case: Case, exact: LinearProblem) -> Iterator[Row]:
    theirs, their_seconds = reference(case)
    with jax.enable_x64():
        their_objective = float(exact.value(theirs))
    methods = methods_of(loss, case)
    runs = [(methods[0], "float64"), (methods[0], "float32")]
    if name in GENERATED:
        runs += [(method, "float64") for method in methods[1:]]
    for method, dtype in runs:
        found, seconds = run(case, method, dtype)
        with jax.enable_x64():
            params = Weights(*(p if p is None else p.astype(np.float64) for p in found.params))
            objective = float(exact.value(params))
        yield Row(
            name,
            loss,
            method.name,
            dtype,
            (objective - their_objective) / abs(their_objective),
            found.certificate,
            found.num_steps,
            seconds,
            found.compile_seconds,
            objective,
            their_objective,
            their_seconds,
        )


def asked(options: Options, name: str, loss: str) -> bool:
    return not options.only or f"{name}, {loss}" in options.only


def all_rows(options: Options) -> Iterator[Row]:
    for name in options.sets:
        losses = [loss for loss in options.losses if asked(options, name, loss)]
        if not losses:
            continue
        x, target, strength = load(name, options)
        of_set = cases(x, target, strength)
        with jax.enable_x64():
            whole = of_set["ridge"].problem()
        for loss in losses:
            case = of_set[loss]
            with jax.enable_x64():
                y = LinearProblem(np.zeros((len(target), 1)), case.y, case.loss, case.penalty).y
                exact = whole.replace(
                    y=y, loss=case.loss, penalty=case.penalty, intercept=case.intercept
                )
            for row in measure(name, loss, case, exact):
                print(*cells_of(row), sep="  ", file=sys.stderr, flush=True)
                yield row
        jax.clear_caches()


def cells_of(row: Row) -> list[str]:
    return [
        row.set,
        row.loss,
        row.solver,
        row.dtype.replace("float", "f"),
        f"{row.relative:+.0e}" + (" missed" if row.missed else ""),
        str(row.steps),
        f"{row.seconds:.2f}",
        f"{row.compile_seconds:.1f}",
        f"{row.their_seconds:.2f}",
    ]


def main(options: Options) -> None:
    jax.config.update("jax_enable_compilation_cache", False)
    sets = *BUNDLED, *GENERATED
    every = [f"{name}, {loss}" for name in sets for loss in LOSSES]
    for found, known in ((options.sets, sets), (options.losses, LOSSES), (options.only, every)):
        unknown = set(found) - set(known)
        if unknown:
            raise SystemExit(f"{', '.join(sorted(unknown))}: not among {', '.join(known)}")
    rows = list(all_rows(options))
    cells = [cells_of(row) for row in rows]
    caption = machine(*PACKAGES)
    table = Table(title="Objectives, relative to scikit-learn's", caption=caption)
    for number, column in enumerate(COLUMNS):
        table.add_column(column, justify="left" if number < 4 else "right")
    for line, row in zip(cells, rows, strict=True):
        table.add_row(*line, style="red" if row.missed else None)
    console_of_tables().print(table)
    if options.markdown is not None:
        lines = [COLUMNS, ["---"] * 4 + ["---:"] * (len(COLUMNS) - 4), *cells]
        text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        options.markdown.parent.mkdir(parents=True, exist_ok=True)
        options.markdown.write_text(f"{text}\n\n{caption}\n")
    if options.json is not None:
        content = {
            "machine": caption,
            "options": {k: str(v) for k, v in dataclasses.asdict(options).items()},
            "rows": [r._asdict() | {"missed": r.missed} for r in rows],
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
