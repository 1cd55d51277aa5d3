"""The consensus ADMM of dask-glm on a logistic regression, for ``benchmarks.cocoa``.

Not installed by ``make bench``; ``make bench-peers BENCHMARKS=cocoa`` has it. Its rows are a dask
array of as many blocks as there are workers, in this process, on dask's threads or one after the
other, whichever is faster here. Its stopping test is the standard one, with a relative tolerance.
"""

import importlib.util
import time
from typing import NamedTuple

import numpy as np

TOLERANCES = (1e-4, 1e-6, 1e-8)
MAX_ROUNDS = 250
SCHEDULERS = ("threads", "synchronous")


class Fit(NamedTuple):
    """The weights found, and seconds from the placed data to them."""

    weights: np.ndarray
    seconds: float
    scheduler: str


def is_installed() -> bool:
    return importlib.util.find_spec("dask_glm") is not None


def fit(x: np.ndarray, y: np.ndarray, strength: float, blocks: int, tol: float) -> Fit:
    """``Σ_i log(1 + e^{-y_i x_iᵀw}) + strength/2 |w|²`` with labels ±1, by dask-glm's ADMM.

    Args:
      x: ``[n, d]``.
      y: ``[n]``, -1 or 1.
      blocks: Into which the rows are cut.
      tol: Its relative tolerance; the absolute one is a hundredth of it.
    """
    import dask
    import dask.array
    from dask_glm.algorithms import admm

    rows = -(-len(x) // blocks)
    blocks_of_x = dask.array.from_array(x, chunks=(rows, x.shape[1]))
    blocks_of_y = dask.array.from_array((y > 0).astype(x.dtype), chunks=rows)
    fits = []
    for scheduler in SCHEDULERS:
        with dask.config.set(scheduler=scheduler):
            began = time.perf_counter()
            weights = admm(
                blocks_of_x, blocks_of_y, regularizer="l2", lamduh=strength, max_iter=MAX_ROUNDS,
                abstol=tol / 100, reltol=tol, normalize=False,
            )  # fmt: skip
            fits.append(Fit(np.asarray(weights), time.perf_counter() - began, scheduler))
    return min(fits, key=lambda fit: fit.seconds)
