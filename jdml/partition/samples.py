"""Which samples make up which batch: one permutation per epoch, drawn from the seed alone.

The order is a function of (seed, epoch), so a sampler has no hidden state: its whole position is
the number of batches already given out. It resumes anywhere, exactly, on any number of processes,
because every process computes the same global batch and keeps the rows that are its own.

An epoch has ``num_samples // batch`` batches, and no sample occurs twice in it. What is left at the
end of a permutation, ``num_samples % batch`` samples, is dropped; the next epoch drops others. The
permutation of the current epoch is held in memory: 8 bytes per sample.
"""

import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]

# Enough of a permutation to notice that another NumPy draws another one.
_NUM_FINGERPRINTED = 1000


def permutation(num_samples: int, seed: int, epoch: int) -> Indices:
    """The order of one epoch: int64 ``[num_samples]``, from Philox keyed by (seed, epoch)."""
    key = np.array([seed, epoch], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key)).permutation(num_samples)


def generator(seed: int, epoch: int, worker: int) -> np.random.Generator:
    """Draws of one worker in one epoch: Philox keyed by (seed, epoch), on a counter of its own.

    No two workers' counters meet, nor any of them that of :func:`permutation`.
    """
    key = np.array([seed, epoch], dtype=np.uint64)
    counter = np.array([0, 0, 0, worker + 1], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def process_rows(batch: int, index: int, count: int) -> slice:
    """The rows of a global batch that process ``index`` of ``count`` supplies: block ``index``.

    Raises:
      ValueError: the processes do not divide the batch, or there is no such process.
    """
    if count < 1 or not 0 <= index < count:
        raise ValueError(f"process {index} of {count} does not exist; indices run from 0.")
    if batch % count:
        raise ValueError(
            f"a global batch of {batch} rows does not divide over {count} processes; "
            f"use a multiple of {count}."
        )
    rows = batch // count
    return slice(index * rows, (index + 1) * rows)


class Sampler:
    """Endless batches of sample indices: deterministic, resumable, each sample once per epoch.

    Batch ``s`` is ``permutation(num_samples, seed, epoch)[k * batch : (k + 1) * batch]`` with
    ``epoch, k = divmod(s, num_samples // batch)``.

    Args:
      num_samples: Number of samples in the data set.
      batch: Rows of the global batch.
      seed: Seed of the order, ``0 <= seed < 2**64``.
      shuffle: ``False`` gives the samples in their own order every epoch.
      rows: Which rows of the global batch this process keeps: a slice (``process_rows``) or row
        numbers; all of them by default.

    Raises:
      ValueError: no full batch fits into an epoch, or an argument is out of range.
    """

    def __init__(
        self,
        num_samples: int,
        batch: int,
        seed: int = 0,
        *,
        shuffle: bool = True,
        rows: slice | Sequence[int] | Indices | None = None,
    ) -> None:
        if batch < 1:
            raise ValueError(f"batch must be at least 1, got {batch}.")
        if num_samples < batch:
            raise ValueError(
                f"{num_samples} samples do not fill one batch of {batch}; "
                f"use a batch of at most {num_samples}, or more data."
            )
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed must lie in 0 .. 2**64 - 1, got {seed}.")
        self.num_samples = int(num_samples)
        self.batch = int(batch)
        self.seed = int(seed)
        self.shuffle = shuffle
        self.step = 0
        self._rows = slice(None) if rows is None else rows
        self._epoch = -1
        self._order: Indices = np.arange(0, dtype=np.int64)

    @property
    def batches_per_epoch(self) -> int:
        """Full batches in one epoch; the remainder is dropped."""
        return self.num_samples // self.batch

    @property
    def epoch(self) -> int:
        """Epochs completed."""
        return self.step // self.batches_per_epoch

    def batch_at(self, step: int) -> Indices:
        """Indices of this process's rows of batch ``step``: int64 ``[rows]``; moves nothing."""
        if step < 0:
            raise ValueError(f"batches are counted from 0, got step {step}.")
        epoch, k = divmod(step, self.batches_per_epoch)
        if epoch != self._epoch:
            self._order = (
                permutation(self.num_samples, self.seed, epoch)
                if self.shuffle
                else np.arange(self.num_samples, dtype=np.int64)
            )
            self._epoch = epoch
        return self._order[k * self.batch : (k + 1) * self.batch][self._rows]

    def __iter__(self) -> Iterator[Indices]:
        return self

    def __next__(self) -> Indices:
        indices = self.batch_at(self.step)
        self.step += 1
        return indices

    def state(self) -> dict[str, int]:
        """The position, and all that it is relative to: small, JSON, the same on every process."""
        first = permutation(min(self.num_samples, _NUM_FINGERPRINTED), self.seed, 0)
        return {
            "step": self.step,
            "seed": self.seed,
            "num_samples": self.num_samples,
            "batch": self.batch,
            "shuffle": int(self.shuffle),
            "order": zlib.crc32(first.astype("<i8").tobytes()),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Moves to a saved position.

        Raises:
          ValueError: the state belongs to other data, another seed, batch or order; names each
            difference, and moves nothing.
        """
        step = check_state(state, self.state(), hint=_HINT)
        self.step = step


_HINT = (
    "The saved position means nothing there. Resume with the saved values, or start anew; "
    "'order' differs when this NumPy draws another permutation than the one that saved."
)


def check_state(saved: Mapping[str, Any], current: Mapping[str, Any], hint: str) -> int:
    """The saved step, if everything else in ``saved`` equals ``current``.

    Raises:
      ValueError: names every key that is missing, unknown or different, with both values.
    """
    differences = [
        f"{key}: saved {saved.get(key, '(nothing)')!r}, here {current.get(key, '(nothing)')!r}"
        for key in sorted({*saved, *current})
        if key != "step" and (key not in saved or key not in current or saved[key] != current[key])
    ]
    step = saved.get("step")
    if isinstance(step, bool) or not isinstance(step, int) or step < 0:
        differences.append(f"step: saved {step!r}, which is no number of batches")
    if differences:
        raise ValueError(
            "the saved state of the data does not fit: " + "; ".join(differences) + f". {hint}"
        )
    assert isinstance(step, int)
    return step
