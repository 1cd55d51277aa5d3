"""Which division of a linear model's data sends fewer bytes: by sample, by feature, or both."""

import dataclasses
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Division:
    """One way to divide, and what a worker sends in a pass (``X w`` and ``Xᵀ v``).

    Attributes:
      by: ``"sample"``, ``"feature"`` or ``"both"``.
      grid: ``(S, F)``: parts of the samples and of the columns.
      margin_bytes: Partial margins ``X_sf w_f``, summed over the F parts of the columns.
      parameter_bytes: Partial gradients ``X_sfᵀ v_s``, summed over the S parts of the samples.
      work: Multiplications of a pass on one worker, ``2 nnz / K`` where non-zeros are balanced.
    """

    by: str
    grid: tuple[int, int]
    margin_bytes: int
    parameter_bytes: int
    work: int

    @property
    def sent_bytes(self) -> int:
        """Both."""
        return self.margin_bytes + self.parameter_bytes


@dataclasses.dataclass(frozen=True)
class Choice:
    """What :func:`choose_partition` found.

    Attributes:
      best: The division that sends least; the simpler one where two send the same.
      candidates: The best of each kind that is possible, by bytes.
      reasons: Sentences with the figures.
    """

    best: Division
    candidates: tuple[Division, ...]
    reasons: tuple[str, ...]

    @property
    def by(self) -> str:
        return self.best.by

    @property
    def grid(self) -> tuple[int, int]:
        return self.best.grid

    def __str__(self) -> str:
        return "\n".join(self.reasons)


def choose_partition(n: int, d: int, nnz: int, workers: int, *, dtype: Any = np.float64) -> Choice:
    """The division of ``X [n, d]`` over K workers whose passes send fewest bytes.

    A pass is a product with X and one with Xᵀ, as a gradient costs. On a grid ``S × F`` a worker
    takes part in an all-reduce of ``n/S`` margins among F and one of ``d/F`` parameters among S:

        bytes = 2 (F-1)/F · n/S · size + 2 (S-1)/S · d/F · size.

    ``F = 1`` is by sample and sends parameters alone, ``S = 1`` by feature and sends margins alone.
    Sums are dense whatever the rows are, so that non-zeros weigh in the work and not in the bytes.

    Args:
      n: Samples.
      d: Columns.
      nnz: Non-zeros, at most n d; ``n d`` of dense rows.
      workers: K.
      dtype: Of margins and parameters.

    Raises:
      ValueError: more workers than both rows and columns, or numbers that cannot be.

    Reference: the all-reduce is the bandwidth-optimal one of Thakur, Rabenseifner & Gropp 2005.
    """
    if min(n, d, workers) < 1 or not 0 <= nnz <= n * d:
        raise ValueError(
            f"choose_partition(n={n}, d={d}, nnz={nnz}, workers={workers}): expected at least one "
            "sample, column and worker, and 0 <= nnz <= n d."
        )
    size = np.dtype(dtype).itemsize
    grids = [(s, workers // s) for s in range(1, workers + 1) if workers % s == 0]
    found = [_division(n, d, nnz, grid, size) for grid in grids if grid[0] <= n and grid[1] <= d]
    if not found:
        raise ValueError(
            f"choose_partition: no grid of {workers} workers has at most {n} parts of the samples "
            f"and at most {d} of the columns; everybody needs one of each. Take fewer workers."
        )
    simple = {"sample": 0, "feature": 1, "both": 2}
    found.sort(key=lambda division: (division.sent_bytes, simple[division.by]))
    kinds: dict[str, Division] = {}
    for division in found:
        kinds.setdefault(division.by, division)
    candidates = tuple(kinds.values())
    return Choice(candidates[0], candidates, tuple(_reasons(n, d, nnz, workers, candidates)))


def _division(n: int, d: int, nnz: int, grid: tuple[int, int], size: int) -> Division:
    s, f = grid
    by = "sample" if f == 1 else "feature" if s == 1 else "both"
    margins, parameters = -(-n // s), -(-d // f)
    return Division(
        by,
        grid,
        -(-2 * (f - 1) * margins * size // f),
        -(-2 * (s - 1) * parameters * size // s),
        -(-2 * nnz // (s * f)),
    )


def _reasons(n, d, nnz, workers, candidates):
    if workers == 1:
        yield "One worker sends nothing."
        return
    for division in candidates:
        s, f = division.grid
        parts = []
        if s > 1:
            parts.append(f"{division.parameter_bytes:,} of {-(-d // f):,} parameters among {s}")
        if f > 1:
            parts.append(f"{division.margin_bytes:,} of {-(-n // s):,} margins among {f}")
        yield (
            f"By {division.by} ({s} × {f}), a worker sends {division.sent_bytes:,} bytes a pass: "
            f"{' and '.join(parts)}."
        )
    best = candidates[0]
    if best.by == "both":
        yield "A grid sends less than either alone: each sum is of a part, among fewer workers."
    else:
        less, more = ("columns", "samples") if best.by == "sample" else ("samples", "columns")
        yield (
            f"There are {min(n, d):,} {less} and {max(n, d):,} {more}, and what travels by "
            f"{best.by} is a number for each of the former."
            if n != d
            else f"There are as many columns as samples; by {best.by} is the simplest."
        )
    share = best.sent_bytes / max(best.work, 1)
    yield (
        f"A pass is {best.work:,} multiplications on a worker ({nnz / (n * d):.2g} of X is not 0), "
        f"{share:.2g} bytes sent for each."
    )
