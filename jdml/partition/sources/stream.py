"""Rows that need not fit into memory, in chunks: of LIBSVM files, ``.npy`` files, or arrays.

A stream knows how its rows are cut before it reads one, so that chunks can be read in any order
(``minibatches.py``), by a compiled program (``streamed_rows.py``) or one after the other
(``passes.py``). Labels are kept whole, 8 bytes a row: every method needs them at every pass.
"""

import abc
import os
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import scipy.sparse

from jdml.partition.sources.libsvm import (
    PARSED_AT_ONCE,
    ZeroBased,
    checked_features,
    floating,
    read_piece,
    scan_libsvm,
)
from jdml.partition.sources.npy import NpyRows

CHUNK_BYTES = 4 << 20
"""Of memory, or of text, that a chunk takes by default."""


class Chunk(NamedTuple):
    """Neighbouring rows.

    Attributes:
      rows: ``[num_rows, num_features]``, dense, or ``scipy.sparse.csr_array``.
      labels: ``[num_rows]``.
      start: Number of the first row.
    """

    rows: Any
    labels: npt.NDArray[Any]
    start: int


class Padded(NamedTuple):
    """A chunk in arrays of the same shapes for every chunk of a stream, for compiled programs.

    Dense: ``x [most rows, d]``; past the chunk's rows, zeros. Sparse: the entries, in order of
    rows, ``[most entries]`` each; past the chunk's, value 0 in the last row and column 0.

    Attributes:
      x: Dense rows, or ``(row, column, value)`` of the entries.
      labels: ``[most rows]``; past the chunk's rows, the chunk's first label again.
      num_rows: Rows of the chunk.
    """

    x: Any
    labels: npt.NDArray[Any]
    num_rows: np.int32


class Stream(abc.ABC):
    """Chunks of rows.

    Attributes:
      name: For messages and progress.
      shape: ``(num_rows, num_features)``.
      dtype: Of values and labels.
      sparse: Whether rows are CSR.
      labels: ``[num_rows]``.
      starts: int64 ``[num_chunks + 1]``: where each chunk begins, and the number of rows.
      most_entries: Of a sparse chunk.
      most_row_entries: Of a sparse row.
    """

    name: str
    shape: tuple[int, int]
    dtype: np.dtype[Any]
    sparse: bool
    labels: npt.NDArray[Any]
    starts: npt.NDArray[np.int64]
    most_entries: int = 0
    most_row_entries: int = 0

    @property
    def num_chunks(self) -> int:
        """Chunks of a pass."""
        return len(self.starts) - 1

    @property
    def most_rows(self) -> int:
        """Rows of the largest chunk."""
        return int(np.diff(self.starts).max())

    @abc.abstractmethod
    def rows(self, number: int) -> Any:
        """The rows of that chunk, read anew: the caller's own."""

    def chunk(self, number: int) -> Chunk:
        """That chunk."""
        start, stop = self.starts[number : number + 2].tolist()
        rows = self.rows(number)
        if rows.shape != (stop - start, self.shape[1]):
            raise ValueError(
                f"{self.name}: chunk {number} had {stop - start} rows and now has {rows.shape[0]}; "
                "the data have changed since they were opened. Open them again."
            )
        return Chunk(rows, self.labels[start:stop], start)

    def padded(self, chunk: Chunk) -> Padded:
        """A chunk of this stream in arrays of one shape."""
        count, num_rows = len(chunk.labels), self.most_rows
        labels = np.full(num_rows, chunk.labels[0], self.labels.dtype)
        labels[:count] = chunk.labels
        if not self.sparse:
            x = chunk.rows
            if count < num_rows:
                x = np.concatenate((x, np.zeros((num_rows - count, self.shape[1]), x.dtype)))
            return Padded(x, labels, np.int32(count))
        entries, csr = chunk.rows.nnz, chunk.rows
        row = np.full(self.most_entries, num_rows - 1, np.int32)
        row[:entries] = np.repeat(np.arange(count, dtype=np.int32), np.diff(csr.indptr))
        column, value = (
            np.zeros(self.most_entries, np.int32),
            np.zeros(self.most_entries, csr.dtype),
        )
        column[:entries], value[:entries] = csr.indices, csr.data
        return Padded((row, column, value), labels, np.int32(count))


class ArrayStream(Stream):
    """Of arrays that are there: in memory, or mapped, where the system decides what stays.

    Args:
      rows: ``[num_rows, num_features]``, an array or ``scipy.sparse`` CSR.
      labels: ``[num_rows]``.
      chunk_rows: Rows of a chunk; by default ``CHUNK_BYTES``' worth.

    Raises:
      ValueError: shapes that do not fit.
    """

    def __init__(self, rows: Any, labels: npt.ArrayLike, chunk_rows: int | None = None) -> None:
        self.sparse = scipy.sparse.issparse(rows)
        self._rows = scipy.sparse.csr_array(rows) if self.sparse else rows
        self.name, self.dtype = "arrays", np.dtype(rows.dtype)
        self.shape = _checked_shape(self.name, rows.shape)
        self.labels = _checked_labels(self.name, labels, self.shape[0])
        per_row = self.dtype.itemsize * self.shape[1]
        if self.sparse:
            per_row = -(-self._rows.nnz * (self.dtype.itemsize + 4) // self.shape[0])
        self.starts = _cut(self.shape[0], chunk_rows, per_row, CHUNK_BYTES)
        if self.sparse:
            self.most_entries = int(np.diff(self._rows.indptr[self.starts]).max())
            self.most_row_entries = int(np.diff(self._rows.indptr).max())

    def rows(self, number: int) -> Any:
        return self._rows[self.starts[number] : self.starts[number + 1]]


class NpyStream(Stream):
    """Of a ``.npy`` file of rows: read chunk by chunk, not mapped.

    Resident: the chunks that the reader keeps, and the labels.

    Args:
      path: Floats ``[num_rows, num_features]``, in C order.
      labels: ``[num_rows]``, or the path of a ``.npy`` file of them.
      chunk_bytes: Of a chunk, about.

    Raises:
      OSError: nothing is there, or it cannot be read; carries the path.
      ValueError: shapes that do not fit, or values that are no floats.
    """

    sparse = False

    def __init__(
        self,
        path: str | os.PathLike[str],
        labels: str | os.PathLike[str] | npt.ArrayLike,
        chunk_bytes: int = CHUNK_BYTES,
    ) -> None:
        self._file = NpyRows(path)
        self.name, self.dtype = str(path), self._file.dtype
        self.shape = _checked_shape(self.name, self._file.shape)
        if self.dtype.kind != "f":
            raise ValueError(f"{path} holds {self.dtype}; expected floats.")
        if isinstance(labels, (str, os.PathLike)):
            file = NpyRows(labels)
            labels = file.read(0, len(file))
        self.labels = _checked_labels(self.name, labels, self.shape[0])
        self.starts = _cut(self.shape[0], None, self._file.row_nbytes, chunk_bytes)

    def rows(self, number: int) -> Any:
        return self._file.read(*self.starts[number : number + 2].tolist())


class LibsvmStream(Stream):
    """Of a LIBSVM file, parsed anew at every pass.

    Opening it reads the file once, checks every line, and keeps the labels and where chunks begin.
    Resident in a pass: about ``15 * PARSED_AT_ONCE`` (8 MB) of parsing, the chunks that the reader
    keeps, and the labels.

    Args:
      path: The file; a compressed one is refused, for it has no places to start from.
      num_features: By default as many as the largest index needs.
      zero_based: As for ``read_libsvm``.
      dtype: Of values and labels.
      chunk_bytes: Of the text of a chunk, about; at least ``PARSED_AT_ONCE``.

    Raises:
      OSError: nothing is there, or it cannot be read; carries the path.
      ValueError: a malformed line, with file and line number; an index beyond ``num_features``;
        no rows; a compressed file.
    """

    sparse = True

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        num_features: int | None = None,
        zero_based: ZeroBased = "auto",
        dtype: npt.DTypeLike = np.float64,
        chunk_bytes: int = CHUNK_BYTES,
    ) -> None:
        self.path, self.name, self.dtype = path, str(path), floating(dtype)
        if self.name.endswith((".gz", ".bz2", ".xz")):
            raise ValueError(
                f"{path} is compressed and can be read from its start only; unpack it to stream "
                "it, or read_libsvm it whole."
            )
        summary = scan_libsvm(path)
        self.most_row_entries = summary.max_row_nonzeros
        self._based = summary.based(path, zero_based)
        needed = summary.num_features(path, zero_based)
        self.shape = summary.num_rows, checked_features(path, num_features, needed)
        self.labels = summary.labels.astype(self.dtype)
        # Pieces without a row belong to their neighbours.
        pieces = max(1, round(chunk_bytes / PARSED_AT_ONCE))
        first, starts = [0], [0]
        for k in range(pieces, len(summary.lines), pieces):
            if summary.row_offsets[k] > starts[-1] and summary.row_offsets[k] < summary.num_rows:
                first.append(k)
                starts.append(summary.row_offsets[k])
        self.starts = np.array([*starts, summary.num_rows], np.int64)
        self._pieces = [
            [(summary.offsets[k], summary.offsets[k + 1], summary.lines[k]) for k in range(a, b)]
            for a, b in zip(first, [*first[1:], len(summary.lines)], strict=True)
        ]
        ends = np.concatenate(([0], np.cumsum(summary.nonzeros)))
        self.most_entries = int(np.diff(ends[[*first, len(summary.lines)]]).max())

    def rows(self, number: int) -> Any:
        parts = [
            read_piece(
                self.path,
                *piece,
                num_features=self.shape[1],
                zero_based=self._based,
                dtype=self.dtype,
            ).rows
            for piece in self._pieces[number]
        ]
        return parts[0] if len(parts) == 1 else scipy.sparse.vstack(parts, format="csr")


def _checked_shape(name: str, shape: tuple[int, ...]) -> tuple[int, int]:
    if len(shape) != 2 or not shape[0]:
        raise ValueError(f"{name}: shape {shape}; expected [num_rows, num_features], with rows.")
    return shape[0], shape[1]


def _checked_labels(name: str, labels: npt.ArrayLike, num_rows: int) -> npt.NDArray[Any]:
    found = np.asarray(labels)
    if found.shape != (num_rows,):
        raise ValueError(f"{name}: {num_rows} rows, and labels of shape {found.shape}.")
    return found


def _cut(
    num_rows: int, chunk_rows: int | None, row_nbytes: int, chunk_bytes: int
) -> npt.NDArray[np.int64]:
    """Where chunks begin: of equal size within a row."""
    if chunk_rows is None:
        chunk_rows = max(1, chunk_bytes // max(1, row_nbytes))
    if chunk_rows < 1:
        raise ValueError(f"chunk_rows={chunk_rows}; expected at least 1.")
    num_chunks = -(-num_rows // chunk_rows)
    return np.arange(num_chunks + 1, dtype=np.int64) * num_rows // num_chunks
