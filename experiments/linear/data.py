"""Two data sets: dense with many more samples than columns, and sparse with more columns."""

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse


def digits() -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's handwritten digits, 1,797 × 64, columns standardised; even against odd."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        sys.exit("The data come with scikit-learn: pip install 'jdml[experiments]'")
    x, digit = load_digits(return_X_y=True)
    spread = x.std(axis=0)
    return (x - x.mean(axis=0)) / np.where(spread > 0, spread, 1), np.where(digit % 2, 1.0, -1.0)


def words() -> tuple[Any, np.ndarray]:
    """240 × 480, 4 % non-zeros: texts of up to 25 words, the j-th of which is as frequent as 1/j.

    Rows are of length 1; labels are signs of ``xᵀw`` plus noise.
    """
    random = np.random.default_rng(0)
    n, d, length = 240, 480, 25
    share = 1 / np.arange(1, d + 1)
    drawn = random.choice(d, size=(n, length), p=share / share.sum())
    x = scipy.sparse.csr_array(
        (np.ones(n * length), drawn.ravel(), np.arange(n + 1) * length), shape=(n, d)
    )
    x.sum_duplicates()
    x.data[:] = 1 + np.log(x.data)
    x = scipy.sparse.csr_array(x / np.sqrt(x.multiply(x).sum(axis=1))[:, None])
    scores = x @ random.standard_normal(d)
    return x, np.where(scores + 0.3 * random.standard_normal(n) > 0, 1.0, -1.0)


class Data(NamedTuple):
    """Rows and labels when called for, and λ of the penalty ``λ/2 |w|²`` beside the mean loss."""

    load: Callable[[], tuple[Any, np.ndarray]]
    strength: float


DATA = {"digits": Data(digits, 1e-2), "words": Data(words, 1e-3)}
