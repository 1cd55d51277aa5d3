"""Offline data: arrays that were there before the run, and which of their rows are drawn when."""

import zlib
from collections.abc import Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh

from jdml.partition.divisions import Indices, check_division, reordered
from jdml.partition.samples import generator, permutation
from jdml.partition.sources.base import Batch, PlacedBatches

Draws = Literal["replacement", "global", "local", "in order"]
_DRAWS: tuple[Draws, ...] = ("replacement", "global", "local", "in order")


class Offline:
    """Batches of rows of arrays in memory or mapped files, drawn by ``(seed, worker, step)``.

    | draws | worker k's batches |
    |---|---|
    | ``"replacement"`` | uniform from its part, or from all the data: each draw by itself |
    | ``"global"`` | its part of an epoch's permutation of all samples; they change hands |
    | ``"local"`` | its own part, in an order of its own for each epoch |
    | ``"in order"`` | its own part as it stands |

    The arrays are neither copied nor placed: a batch is. In-order batches of contiguous parts are
    views, not even that. Threads share one source; so do processes, over arrays that they map
    (:class:`~jdml.partition.sources.shared.SharedArrays`, ``np.load(…, mmap_mode="r")``). Kept
    besides: the order of the epoch, 8 bytes per sample (nothing for the two that draw or go in
    order).

    Args:
      data: Arrays with the samples along dim 0, in any pytree; memory-mapped ones and SciPy's CSR
        arrays (which go to threads, not on a mesh) as well.
      batch: Samples of one worker's step.
      num_workers: How many share the work. Without ``parts``, ``"replacement"`` shows each of them
        all the data (computation parallelism).
      seed: ``0 <= seed < 2**64``.
      draws: As in the table.
      parts: For each worker its sample numbers, from any of the divisions. By default everybody's
        are all samples for ``"replacement"``, and contiguous parts of equal size otherwise: of the
        data in order, of a permutation for ``"local"``.

    Raises:
      ValueError: arrays of different lengths, more workers than samples, parts that are not there
        or too small for a batch.
    """

    def __init__(
        self,
        data: Any,
        batch: int,
        num_workers: int = 1,
        seed: int = 0,
        *,
        draws: Draws = "global",
        parts: Sequence[Indices] | None = None,
    ) -> None:
        self.data, self.batch, self.num_workers = data, int(batch), int(num_workers)
        self.seed, self.draws = int(seed), draws
        self.num_samples = _num_samples(data)
        if draws not in _DRAWS:
            raise ValueError(f"Offline(draws={draws!r}): expected one of {list(_DRAWS)}.")
        check_division("Offline", "samples", self.num_samples, num_workers, self.seed)
        if batch < 1:
            raise ValueError(f"Offline(batch={batch}): expected at least one sample.")
        self.parts = None if parts is None else self._checked(parts)
        self.batches_per_epoch = self._smallest() // self.batch
        """Batches of a worker until it begins anew; what fills none of them is left out."""
        if not self.batches_per_epoch and draws != "replacement":
            raise ValueError(
                f"Offline: a worker has {self._smallest()} samples, which do not fill a batch of "
                f"{batch}; take a smaller batch or fewer workers."
            )
        self._fixed = zlib.crc32(b"".join(np.asarray(p, "<i8").tobytes() for p in self.parts or ()))
        # Each worker's own slot, so that threads that are an epoch apart do not undo each other's.
        self._orders: list[tuple[int, Indices | slice]] = [(-1, slice(0))] * self.num_workers

    def __call__(self, worker: int, step: int) -> Batch:
        """That worker's batch: every array's rows :meth:`rows`, as NumPy arrays."""
        rows = self.rows(worker, step)
        return jax.tree.map(lambda x: x[rows], self.data)

    def rows(self, worker: int, step: int) -> Indices | slice:
        """Which samples: int64 ``[batch]``, or a slice where they are neighbours.

        Raises:
          ValueError: no such worker or step.
        """
        if not 0 <= worker < self.num_workers or step < 0:
            raise ValueError(
                f"Offline: worker {worker}, step {step}; expected a worker of 0 .. "
                f"{self.num_workers - 1} and a step >= 0."
            )
        if self.draws == "replacement":
            random = generator(self.seed, int(step), int(worker))
            if self.parts is None:
                return random.integers(self.num_samples, size=self.batch)
            part = self.parts[worker]
            return part[random.integers(len(part), size=self.batch)]
        epoch, k = divmod(int(step), self.batches_per_epoch)
        found, order = self._orders[worker]
        if found != epoch:
            order = self._order(worker, epoch)
            self._orders[worker] = (epoch, order)
        if isinstance(order, slice):
            start = order.start + k * self.batch
            return slice(start, start + self.batch)
        return order[k * self.batch : (k + 1) * self.batch]

    def batches(self, mesh: Mesh, workers: str | tuple[str, ...] = "data") -> PlacedBatches:
        """An endless iterator of global batches, K times ``batch`` samples each.

        Raises:
          ValueError: the mesh has another number of workers.
        """
        placed = PlacedBatches(self, mesh, workers)
        if placed.num_workers != self.num_workers:
            raise ValueError(
                f"batches: the mesh has {placed.num_workers} workers along {placed.axes}, the "
                f"source {self.num_workers}; make both equal."
            )
        return placed

    def state(self) -> dict[str, Any]:
        """What a position is relative to; the data's contents are not looked at."""
        return {
            "source": "offline",
            "num_samples": self.num_samples,
            "batch": self.batch,
            "seed": self.seed,
            "draws": self.draws,
            "parts": self._fixed,
        }

    def _order(self, worker: int, epoch: int) -> Indices | slice:
        """The worker's samples in the epoch's order."""
        if self.draws == "in order" and self.parts is not None:
            part = self.parts[worker]
            neighbours = part[-1] - part[0] == len(part) - 1 and np.all(np.diff(part) == 1)
            return slice(int(part[0]), int(part[-1]) + 1) if neighbours else part
        if self.draws == "local" and self.parts is not None:
            return reordered(self.parts[worker], self.seed, epoch, worker)
        share, more = divmod(self.num_samples, self.num_workers)
        start = worker * share + min(worker, more)
        mine = slice(start, start + share + (worker < more))
        if self.draws == "in order":
            return mine
        # As shuffle_split has it, without the other workers' parts.
        moves = self.draws == "global"
        part = permutation(self.num_samples, self.seed, epoch if moves else 0)[mine].copy()
        return part if moves or not epoch else reordered(part, self.seed, epoch, worker)

    def _smallest(self) -> int:
        if self.parts is not None:
            return min(map(len, self.parts))
        whole = self.draws == "replacement"
        return self.num_samples if whole else self.num_samples // self.num_workers

    def _checked(self, parts: Sequence[Indices]) -> list[Indices]:
        if self.draws == "global":
            raise ValueError(
                'Offline: parts with draws="global", where samples change hands every epoch; take '
                '"local", "in order" or "replacement".'
            )
        found = [np.asarray(part) for part in parts]
        if len(found) != self.num_workers:
            raise ValueError(f"Offline: {len(found)} parts for {self.num_workers} workers.")
        for k, part in enumerate(found):
            if part.ndim != 1 or not len(part) or not np.issubdtype(part.dtype, np.integer):
                raise ValueError(
                    f"Offline: part {k} is {part.dtype}{list(part.shape)}; expected sample "
                    "numbers, at least one."
                )
            if np.min(part) < 0 or np.max(part) >= self.num_samples:
                raise ValueError(
                    f"Offline: part {k} has the sample numbers {np.min(part)} .. {np.max(part)}; "
                    f"there are {self.num_samples} samples."
                )
        return [part.astype(np.int64) for part in found]


def _num_samples(data: Any) -> int:
    lengths = {
        jax.tree_util.keystr(path, simple=True, separator="/") or "data": np.shape(x)[:1]
        for path, x in jax.tree_util.tree_leaves_with_path(data)
    }
    if not lengths or () in lengths.values() or len(set(lengths.values())) > 1:
        sizes = {name: size[0] if size else "a scalar" for name, size in lengths.items()}
        raise ValueError(
            f"Offline: expected arrays with as many samples along dim 0 each, got {sizes}."
        )
    return int(next(iter(lengths.values()))[0])
