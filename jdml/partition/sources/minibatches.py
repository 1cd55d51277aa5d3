"""Stochastic passes over a stream: mini-batches of rows, shuffled as far as memory goes."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse

from jdml.partition.divisions import reordered
from jdml.partition.samples import check_state, permutation
from jdml.partition.sources.libsvm import Examples
from jdml.partition.sources.passes import read_ahead
from jdml.partition.sources.stream import Chunk, Stream


class StreamBatches:
    """Endless mini-batches of a stream: in an epoch each row once, ``num_rows % batch`` left out.

    An epoch takes the chunks in an order drawn for it, ``shuffle_chunks`` at a time, and shuffles
    their rows together. Neighbours in the file so meet in a batch with rows of other chunks; where
    the file is sorted by label, take more chunks, or smaller ones. Everything is a function of
    (seed, epoch), and a run goes on from a saved position without reading what lies before it,
    save for the chunks under way.

    Args:
      stream: The rows.
      batch: Rows of a batch.
      seed: ``0 <= seed < 2**64``.
      shuffle_chunks: Chunks in memory at a time, and one that is being read.

    Attributes:
      step: Batches given out.

    Raises:
      ValueError: fewer rows than a batch, or an argument out of its range.
    """

    def __init__(
        self, stream: Stream, batch: int, seed: int = 0, *, shuffle_chunks: int = 8
    ) -> None:
        if not 1 <= batch <= stream.shape[0]:
            raise ValueError(
                f"StreamBatches(batch={batch}): {stream.name} has {stream.shape[0]} rows; expected "
                "1 .. that."
            )
        if shuffle_chunks < 1 or not 0 <= seed < 2**64:
            raise ValueError(
                f"StreamBatches(seed={seed}, shuffle_chunks={shuffle_chunks}): expected a seed of "
                "0 .. 2**64 - 1 and at least one chunk."
            )
        self.stream, self.batch, self.seed = stream, int(batch), int(seed)
        self.shuffle_chunks = int(shuffle_chunks)
        self.step = 0
        self._coming: Iterator[Examples] | None = None

    @property
    def batches_per_epoch(self) -> int:
        """Full batches in one epoch."""
        return self.stream.shape[0] // self.batch

    @property
    def epoch(self) -> int:
        """Epochs completed."""
        return self.step // self.batches_per_epoch

    def __iter__(self) -> Iterator[Examples]:
        return self

    def __next__(self) -> Examples:
        """``(rows [batch, num_features], labels [batch])``, the caller's own."""
        epoch, k = divmod(self.step, self.batches_per_epoch)
        if self._coming is None or k == 0:
            self._coming = self._epoch(epoch, k)
        batch = next(self._coming)
        self.step += 1
        return batch

    def state(self) -> dict[str, Any]:
        """The position, and all that it is relative to; rows are known by their number alone."""
        return {
            "step": self.step,
            "seed": self.seed,
            "num_rows": self.stream.shape[0],
            "num_chunks": self.stream.num_chunks,
            "batch": self.batch,
            "shuffle_chunks": self.shuffle_chunks,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Moves to a saved position.

        Raises:
          ValueError: the state belongs to another order; names each difference, and moves nothing.
        """
        self.step = check_state(
            state, self.state(), hint="Resume with the saved values, or start anew."
        )
        self._coming = None

    def _epoch(self, epoch: int, first: int) -> Iterator[Examples]:
        """The epoch's batches from number ``first`` on."""
        order = permutation(self.stream.num_chunks, self.seed, epoch)
        sizes = np.diff(self.stream.starts)
        groups = np.split(order, np.arange(self.shuffle_chunks, len(order), self.shuffle_chunks))
        ends = np.cumsum([sizes[group].sum() for group in groups])
        at = first * self.batch  # rows of the epoch that are given out
        start = int(np.searchsorted(ends, at, side="right"))
        skip = at - (int(ends[start - 1]) if start else 0)
        return _mixed(self.stream, groups, start, skip, self.batch, (self.seed, epoch))


def padded_rows(
    rows: scipy.sparse.csr_array, width: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[Any]]:
    """Sparse rows as ``(columns, values)``, both ``[num_rows, width]``: one shape for any batch.

    ``x_iᵀw = Σ_j values[i, j] w[columns[i, j]]``. Past a row's entries stand column 0 and value 0.

    Raises:
      ValueError: a row has more entries than ``width``.
    """
    counts = np.diff(rows.indptr)
    if np.max(counts, initial=0) > width:
        raise ValueError(
            f"padded_rows(width={width}): row {int(np.argmax(counts))} has {np.max(counts)} entries"
            "; take the stream's fullest row's (most_row_entries)."
        )
    columns, values = np.zeros((len(counts), width), np.int32), np.zeros((len(counts), width))
    values = values.astype(rows.dtype)
    filled = np.arange(width) < counts[:, None]
    columns[filled], values[filled] = rows.indices, rows.data
    return columns, values


def _mixed(
    stream: Stream,
    groups: Sequence[np.ndarray],
    start: int,
    skip: int,
    batch: int,
    key: tuple[int, int],
) -> Iterator[Examples]:
    """Batches of the groups' rows from group ``start`` on, without the first ``skip`` of them.

    A function, for a method would keep its object, and the chunks, until garbage is collected.
    """
    read = read_ahead(stream, np.concatenate(groups[start:]).tolist())
    rest: list[Examples] = []
    for number in range(start, len(groups)):
        mixed = _joined([_examples(next(read)) for _ in groups[number]])
        mixing = reordered(np.arange(len(mixed.labels)), *key, number)[skip:]
        skip = 0
        while len(mixing):
            missing = batch - sum(len(x.labels) for x in rest)
            taken, mixing = mixing[:missing], mixing[missing:]
            rest.append(Examples(mixed.rows[taken], mixed.labels[taken]))
            if len(taken) == missing:
                yield _joined(rest)
                rest = []


def _examples(chunk: Chunk) -> Examples:
    return Examples(chunk.rows, chunk.labels)


def _joined(parts: list[Examples]) -> Examples:
    if len(parts) == 1:
        return parts[0]
    labels = np.concatenate([part.labels for part in parts])
    if scipy.sparse.issparse(parts[0].rows):
        return Examples(scipy.sparse.vstack([p.rows for p in parts], format="csr"), labels)
    return Examples(np.concatenate([part.rows for part in parts]), labels)
