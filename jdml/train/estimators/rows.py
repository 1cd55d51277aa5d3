"""What is done to X before a problem is made of it, and undone to the answer.

Dense columns are centred where there is an intercept that is not penalised: ``Xw + b`` is
``(X - 1 mᵀ)w + (b + mᵀw)``, so the objective stays, and curvature along b no longer meets that
along w. Small dense arrays are filled up with rows of no weight and columns of zeros, so that fits
of about one size (the folds of a cross-validation) share a compiled program. Sparse X is left
alone: either would change its pattern.
"""

from typing import Any, NamedTuple

import numpy as np
import scipy.sparse

LEAST_ROWS, LEAST_COLUMNS = 512, 16
"""What small arrays are filled up to; more than these rows to the next power of two."""
SMALL = 1 << 18
"""Most elements of an array that is filled up."""


class Prepared(NamedTuple):
    """Attributes:
    x: ``[n', d']``, dense or CSR.
    weight: f64 ``[n']``.
    means: ``[d]``, what was taken off the columns.
    shape: ``(n, d)``, as given.
    """

    x: Any
    weight: np.ndarray
    means: np.ndarray
    shape: tuple[int, int]

    def labels(self, y: np.ndarray) -> np.ndarray:
        """``[n']``; the first stands in where there is no row."""
        filled = np.full(self.x.shape[0], y[0])
        filled[: len(y)] = y
        return filled

    def weights(self, w: np.ndarray) -> np.ndarray:
        """``[d]`` or ``[d, outputs]`` of what was found for ``[d']``."""
        return w[: self.shape[1]]


def prepare(x: Any, weight: np.ndarray, *, centre: bool, fill_columns: bool) -> Prepared:
    """X ``[n, d]``, f32 or f64, dense or CSR, and the weights of its rows, ``[n]``.

    ``fill_columns`` is for problems in which a column of zeros does no harm.
    """
    n, d = x.shape
    if scipy.sparse.issparse(x):
        return Prepared(x, weight, np.zeros(d, x.dtype), (n, d))
    means = weighted_mean(x, weight).astype(x.dtype) if centre else np.zeros(d, x.dtype)
    rows, columns = _filled(n, max(d, LEAST_COLUMNS) if fill_columns else d, (n, d))
    out = np.zeros((rows, columns), x.dtype)
    own = out[:n, :d]
    np.subtract(x, means, out=own)
    if centre:
        # The rounding of the first sum; and what is left of a constant column would pass for data.
        rest = weighted_mean(own, weight).astype(x.dtype)
        own -= rest
        means = means + rest
        noise = 8 * np.finfo(x.dtype).eps * np.abs(means)
        own[:, np.abs(own).max(axis=0) <= noise] = 0
    return Prepared(out, np.pad(weight, (0, rows - n)), means, (n, d))


def weighted_mean(x: np.ndarray, weight: np.ndarray) -> Any:
    """Over rows, summed in f64."""
    return weight / weight.sum() @ x.astype(np.float64, copy=False)


def with_column(x: Any, value: float) -> Any:
    """X with a last column of one value."""
    n = x.shape[0]
    column = np.full((n, 1), value, x.dtype)
    if scipy.sparse.issparse(x):
        return scipy.sparse.csr_array(scipy.sparse.hstack([x, column]))
    return np.hstack([x, column])


def _filled(n: int, columns: int, shape: tuple[int, int]) -> tuple[int, int]:
    rows = max(LEAST_ROWS, 1 << (n - 1).bit_length())
    return (rows, columns) if rows * columns <= SMALL else shape
