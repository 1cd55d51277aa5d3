"""Samples divided over workers so that each has more of some labels than of others."""

import math

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]

_TRIES = 1000


def label_skew(
    labels: npt.ArrayLike, num_workers: int, alpha: float, seed: int = 0, min_samples: int = 1
) -> list[Indices]:
    """Each label's samples in shares drawn from a Dirichlet distribution, ``p_c ~ Dir_K(alpha)``.

    Small ``alpha`` gives each label to few workers (0.1: most of it to one or two), large ``alpha``
    the same mixture to all; ``math.inf`` gives equal shares. Divisions that leave a worker with
    fewer than ``min_samples`` are drawn again. Every sample goes to one worker.

    Args:
      labels: ``[num_samples]``; of any type that can be compared.
      num_workers: K >= 1.
      alpha: Concentration > 0.
      seed: Seed of the division, ``0 <= seed < 2**64``.
      min_samples: Fewest samples of a worker (its batch).

    Returns:
      For each worker its sample numbers, int64, ascending.

    Raises:
      ValueError: an argument is out of its range, there are too few samples, or 1,000 draws left
        some worker with too few.

    Reference: Yurochkin et al., "Bayesian Nonparametric Federated Learning of Neural Networks",
    2019 (section 4).
    """
    labels = np.asarray(labels)
    if labels.ndim != 1:
        raise ValueError(f"label_skew: labels of shape {labels.shape}; expected [num_samples].")
    if num_workers < 1 or min_samples < 0:
        raise ValueError(
            f"label_skew(num_workers={num_workers}, min_samples={min_samples}): expected at least "
            "one worker, and no negative number of samples."
        )
    if not alpha > 0:
        raise ValueError(f"label_skew(alpha={alpha!r}): expected a number > 0, or math.inf.")
    if len(labels) < num_workers * min_samples:
        raise ValueError(
            f"label_skew: {len(labels)} samples are not {min_samples} for each of {num_workers} "
            "workers."
        )
    random = np.random.Generator(np.random.Philox(key=np.array([seed, 0], dtype=np.uint64)))
    for _ in range(_TRIES):
        owner = np.empty(len(labels), np.int64)
        for label in np.unique(labels):
            samples = random.permutation(np.flatnonzero(labels == label))
            owner[samples] = _owners(len(samples), num_workers, alpha, random)
        counts = np.bincount(owner, minlength=num_workers)
        if np.min(counts) >= min_samples:
            return [np.flatnonzero(owner == k) for k in range(num_workers)]
    raise ValueError(
        f"label_skew: in {_TRIES} draws with alpha={alpha} there was always a worker of "
        f"{num_workers} with fewer than {min_samples} samples. Take a larger alpha, fewer workers "
        "or a smaller min_samples."
    )


def _owners(
    num_samples: int, num_workers: int, alpha: float, random: np.random.Generator
) -> Indices:
    """A worker for each of a label's samples, in proportions drawn for that label."""
    if math.isinf(alpha):
        # In turn, from a worker drawn anew, so that what is left over does not go to the first.
        return (np.arange(num_samples) + random.integers(num_workers)) % num_workers
    ends = np.cumsum(random.dirichlet(np.full(num_workers, alpha)))
    ends[-1] = 1.0  # save for rounding, it is
    places = (np.arange(num_samples) + 0.5) / num_samples
    return np.searchsorted(ends, places).astype(np.int64)
