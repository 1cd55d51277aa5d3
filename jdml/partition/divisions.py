"""Samples divided over workers: index sets of which each sample is in one.

Sizes differ by at most one, or weights are balanced. Every division is a function of its arguments
alone. For experiments with workers that differ, ``label_skew``; for batches, ``sources``.
"""

import numpy as np
import numpy.typing as npt

from jdml.partition.samples import generator, permutation

Indices = npt.NDArray[np.int64]


def contiguous(
    num_samples: int, num_workers: int, weights: npt.ArrayLike | None = None
) -> list[Indices]:
    """Blocks of neighbours: worker k has the samples ``ends[k-1] .. ends[k] - 1``.

    Without weights, sizes differ by at most one, the first blocks being the larger. With weights,
    ``ends`` are where the running sum is nearest to ``k/K`` of the whole W: every block weighs at
    most ``W/K + max(w)`` and has at least one sample.

    Args:
      num_samples: n.
      num_workers: 1 <= K <= n.
      weights: ``[num_samples]``, finite and >= 0: what a sample costs, as its non-zeros.

    Returns:
      For each worker its sample numbers, int64, ascending.

    Raises:
      ValueError: more workers than samples, or weights that are none.
    """
    check_division("contiguous", "samples", num_samples, num_workers)
    samples = np.arange(num_samples, dtype=np.int64)
    if weights is None:
        return np.array_split(samples, num_workers)
    running = np.cumsum(checked_weights("contiguous", "samples", weights, num_samples))
    if not running[-1]:
        return np.array_split(samples, num_workers)
    aims = running[-1] * np.arange(1, num_workers) / num_workers
    cuts = np.searchsorted(running, aims, side="left")
    before = np.concatenate(([0.0], running))[cuts]
    cuts = cuts + (running[cuts] - aims <= aims - before)
    # Nobody is left without a sample.
    k = np.arange(num_workers - 1)
    cuts = np.maximum.accumulate(np.maximum(cuts - k, 1)) + k
    cuts = np.minimum(cuts, num_samples - num_workers + 1 + k)
    return np.split(samples, cuts)


def shuffle_split(
    num_samples: int,
    num_workers: int,
    seed: int = 0,
    epoch: int = 0,
    *,
    reshuffle: str = "global",
) -> list[Indices]:
    """One permutation in contiguous parts; the next epoch's is another.

    ``"global"``: parts of ``permutation(n, seed, epoch)``, so that samples change hands every
    epoch. ``"local"``: parts of epoch 0's; in a later epoch each worker goes through its own part
    in another order, and no sample moves.

    Args:
      num_samples: n.
      num_workers: 1 <= K <= n.
      seed: ``0 <= seed < 2**64``.
      epoch: >= 0.
      reshuffle: ``"global"`` or ``"local"``.

    Returns:
      For each worker its sample numbers in the order of the epoch, int64; sizes differ by at most
      one.

    Raises:
      ValueError: an argument is out of its range.

    Reference: Meng, Chen, Wang, Ma & Liu, "Convergence analysis of distributed stochastic gradient
    descent with shuffling", 2019.
    """
    check_division("shuffle_split", "samples", num_samples, num_workers, seed)
    if reshuffle not in ("global", "local"):
        raise ValueError(
            f'shuffle_split(reshuffle={reshuffle!r}): expected "global" (samples change hands '
            'every epoch) or "local".'
        )
    if epoch < 0:
        raise ValueError(f"shuffle_split(epoch={epoch}): epochs count from 0.")
    order = permutation(num_samples, seed, epoch if reshuffle == "global" else 0)
    parts = np.array_split(order, num_workers)
    if reshuffle == "local" and epoch:
        parts = [reordered(part, seed, epoch, k) for k, part in enumerate(parts)]
    return parts


def reordered(part: Indices, seed: int, epoch: int, worker: int) -> Indices:
    """A worker's own samples in another order, drawn from (seed, epoch, worker)."""
    return generator(seed, epoch, worker).permutation(part)


def with_replacement(
    num_samples: int, num_workers: int, seed: int = 0, epoch: int = 0, size: int | None = None
) -> list[Indices]:
    """Every worker draws by itself, uniformly from all samples, and may draw one twice.

    Args:
      num_samples: n >= 1.
      num_workers: K >= 1.
      seed: ``0 <= seed < 2**64``.
      epoch: Other draws for each.
      size: Draws of each worker; by default n draws in all, sizes differing by at most one.

    Returns:
      For each worker its draws, int64: independent of the other workers' and epochs'.

    Raises:
      ValueError: an argument is out of its range, or more workers than samples without ``size``.
    """
    if size is None:
        check_division("with_replacement", "samples", num_samples, num_workers, seed)
    elif min(size, num_samples, num_workers) < 1:
        raise ValueError(
            f"with_replacement(num_samples={num_samples}, num_workers={num_workers}, size={size}): "
            "expected at least one of each."
        )
    if epoch < 0:
        raise ValueError(f"with_replacement(epoch={epoch}): epochs count from 0.")
    share, more = divmod(num_samples, num_workers)
    return [
        generator(seed, epoch, k).integers(
            num_samples, size=share + (k < more) if size is None else size
        )
        for k in range(num_workers)
    ]


def stratified(labels: npt.ArrayLike, num_workers: int, seed: int = 0) -> list[Indices]:
    """Every worker has as many samples of each label as every other, within one.

    The samples, shuffled within their label, are dealt in turn, and the next label goes on with
    whose turn it is: so both the counts per label and the sizes differ by at most one.

    Args:
      labels: ``[num_samples]``, of any type that can be compared.
      num_workers: 1 <= K <= n.
      seed: ``0 <= seed < 2**64``.

    Returns:
      For each worker its sample numbers, int64, ascending.

    Raises:
      ValueError: more workers than samples, or labels that are no vector.
    """
    labels = np.asarray(labels)
    if labels.ndim != 1:
        raise ValueError(f"stratified: labels of shape {labels.shape}; expected [num_samples].")
    check_division("stratified", "samples", len(labels), num_workers, seed)
    shuffled = permutation(len(labels), seed, 0)
    dealt = shuffled[np.argsort(labels[shuffled], kind="stable")]
    return [np.sort(dealt[k::num_workers]) for k in range(num_workers)]


def check_division(caller: str, what: str, num: int, num_workers: int, seed: int = 0) -> None:
    """Raises ``ValueError`` where there is no such division."""
    if num_workers < 1:
        raise ValueError(f"{caller}(num_workers={num_workers}): expected at least one worker.")
    if num < num_workers:
        raise ValueError(
            f"{caller}: {num_workers} workers and {num} {what}; everybody needs at least one. Take "
            f"at most {num} workers."
        )
    if not 0 <= seed < 2**64:
        raise ValueError(f"{caller}(seed={seed}): expected 0 .. 2**64 - 1.")


def checked_weights(
    caller: str, what: str, weights: npt.ArrayLike, num: int
) -> npt.NDArray[np.float64]:
    """As f64 ``[num]``.

    Raises:
      ValueError: another shape, or one that is negative or not finite.
    """
    found = np.asarray(weights, np.float64)
    if found.shape != (num,):
        raise ValueError(f"{caller}: weights of shape {found.shape}; expected [{num}], of {what}.")
    if not np.all(np.isfinite(found)) or np.min(found, initial=0) < 0:
        where = int(np.flatnonzero(~(np.isfinite(found) & (found >= 0)))[0])
        raise ValueError(
            f"{caller}: the weight {found[where]} (position {where}); expected finite and >= 0."
        )
    return found
