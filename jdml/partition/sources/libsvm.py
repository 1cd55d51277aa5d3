"""LIBSVM files, ``label index:value …`` a line: whole, or in pieces where memory is less."""

import bz2
import dataclasses
import errno
import gzip
import lzma
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import scipy.sparse

from jdml.partition.sources.libsvm_text import MalformedLine, Parsed, parse

ZeroBased = bool | Literal["auto"]

PARSED_AT_ONCE = 1 << 19
"""Bytes of text. Parsing them takes about 15 times as much memory; more at once is no faster."""

_OPENERS: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}


class Examples(NamedTuple):
    """Rows and their labels.

    Attributes:
      rows: CSR or dense ``[num_rows, num_features]``.
      labels: ``[num_rows]``.
    """

    rows: Any
    labels: npt.NDArray[Any]


@dataclasses.dataclass(frozen=True, eq=False)
class LibsvmSummary:
    """What one pass over a file finds out.

    Attributes:
      num_rows: Rows.
      num_nonzeros: Entries.
      max_row_nonzeros: Entries of the fullest row.
      min_index, max_index: As written; 0 and -1 of a file without entries.
      offsets: Byte offset of each piece of about ``PARSED_AT_ONCE`` bytes, and of the file's end.
      lines: Number of each piece's first line, from 0.
      row_offsets: Number of each piece's first row, and of the rows.
      nonzeros: Entries of each piece.
      labels: f64 ``[num_rows]``; all that is kept of the rows.
    """

    num_rows: int
    num_nonzeros: int
    max_row_nonzeros: int
    min_index: int
    max_index: int
    offsets: tuple[int, ...]
    lines: tuple[int, ...]
    row_offsets: tuple[int, ...]
    nonzeros: tuple[int, ...]
    labels: npt.NDArray[np.float64]

    def based(self, path: str | os.PathLike[str], zero_based: ZeroBased) -> bool:
        """Whether indices start at 0; ``"auto"``: whether a 0 occurs.

        Raises:
          ValueError: a 0 occurs in what is said to be one-based.
        """
        return _based(path, zero_based, self.min_index, self.max_index)

    def num_features(self, path: str | os.PathLike[str], zero_based: ZeroBased) -> int:
        """Of the largest index."""
        return max(0, self.max_index + (1 if self.based(path, zero_based) else 0))


def read_libsvm(
    path: str | os.PathLike[str],
    *,
    num_features: int | None = None,
    zero_based: ZeroBased = "auto",
    dtype: npt.DTypeLike = np.float64,
) -> Examples:
    """The whole file as ``scipy.sparse.csr_array`` and labels, read once.

    Comments from ``#`` on, empty lines and ``qid:…`` are skipped; ``.gz``, ``.bz2`` and ``.xz`` are
    read as they are.

    Args:
      path: The file.
      num_features: Columns of the result; by default as many as the largest index needs. Give it
        where a test set must have the columns of a training set.
      zero_based: Whether the first column has the index 0 in the text, or 1. ``"auto"``: 0 if it
        occurs, as scikit-learn's reader decides it.
      dtype: Of values and labels: f32 or f64.

    Raises:
      OSError: nothing is there, or it cannot be read; carries the path.
      ValueError: a malformed line, with file and line number (from 1); an index beyond
        ``num_features``; no rows.
    """
    dtype = floating(dtype)
    labels, indices, values, sizes = [], [], [], []
    for piece in _pieces(path):
        labels.append(piece.parsed.labels.astype(dtype))
        # 32 bits serve until it is known that they do not.
        narrow = np.max(piece.parsed.indices, initial=0) < 2**31
        indices.append(piece.parsed.indices.astype(np.int32 if narrow else np.int64))
        values.append(piece.parsed.values.astype(dtype))
        sizes.append(piece.parsed.row_sizes)
    if not labels or not sum(map(len, labels)):
        raise ValueError(f"{path} holds no rows; give a file that does.")
    columns = np.concatenate(indices)
    smallest, largest = (int(np.min(columns)), int(np.max(columns))) if columns.size else (0, -1)
    starts_at_0 = _based(path, zero_based, smallest, largest)
    needed = largest + (1 if starts_at_0 else 0)
    num_features = checked_features(path, num_features, needed)
    if not starts_at_0:
        columns -= columns.dtype.type(1)
    rows = _csr(np.concatenate(values), columns, np.concatenate(sizes), num_features)
    return Examples(rows, np.concatenate(labels))


def scan_libsvm(path: str | os.PathLike[str]) -> LibsvmSummary:
    """One pass with bounded memory: sizes, labels, and where the rows stand.

    Raises:
      OSError: nothing is there, or it cannot be read; carries the path.
      ValueError: a malformed line, with file and line number; no rows.
    """
    rows = nonzeros = fullest = 0
    smallest, largest = 2**62, -1
    offsets, lines, row_offsets, in_pieces, labels = [], [], [], [], []
    end = 0
    for piece in _pieces(path):
        parsed, end = piece.parsed, piece.end
        offsets.append(piece.offset)
        lines.append(piece.line)
        row_offsets.append(rows)
        in_pieces.append(len(parsed.indices))
        labels.append(parsed.labels)
        rows += len(parsed.labels)
        nonzeros += len(parsed.indices)
        fullest = max(fullest, int(np.max(parsed.row_sizes, initial=0)))
        smallest = min(smallest, int(np.min(parsed.indices, initial=smallest)))
        largest = max(largest, int(np.max(parsed.indices, initial=-1)))
    if not rows:
        raise ValueError(f"{path} holds no rows; give a file that does.")
    return LibsvmSummary(
        num_rows=rows,
        num_nonzeros=nonzeros,
        max_row_nonzeros=fullest,
        min_index=smallest if largest >= 0 else 0,
        max_index=largest,
        offsets=(*offsets, end),
        lines=tuple(lines),
        row_offsets=(*row_offsets, rows),
        nonzeros=tuple(in_pieces),
        labels=np.concatenate(labels),
    )


def read_piece(
    path: str | os.PathLike[str],
    offset: int,
    end: int,
    line: int,
    *,
    num_features: int,
    zero_based: bool,
    dtype: npt.DTypeLike = np.float64,
) -> Examples:
    """The rows between two byte offsets of :class:`LibsvmSummary`; line ``line`` comes first.

    Raises:
      ValueError: a malformed line, an index beyond ``num_features``, or a file that has changed.
    """
    with _opened(path) as file:
        file.seek(offset)
        text = file.read(end - offset)
    if len(text) != end - offset:
        raise ValueError(f"{path} has become shorter since it was scanned; scan it again.")
    parsed = _parsed(path, text, line)
    columns = parsed.indices if zero_based else parsed.indices - 1
    if columns.size:
        if np.min(columns) < 0:
            raise ValueError(f"{path}: the index 0 occurs, and zero_based is False.")
        checked_features(path, num_features, int(np.max(columns)) + 1)
    dtype = floating(dtype)
    columns = columns.astype(np.int32 if num_features < 2**31 else np.int64)
    rows = _csr(parsed.values.astype(dtype), columns, parsed.row_sizes, num_features)
    return Examples(rows, parsed.labels.astype(dtype))


class _Piece(NamedTuple):
    offset: int
    end: int
    line: int
    parsed: Parsed


def _pieces(path: str | os.PathLike[str]) -> Iterator[_Piece]:
    """The file in pieces of whole lines, parsed."""
    with _opened(path) as file:
        rest, offset, line = b"", 0, 0
        while True:
            read = file.read(PARSED_AT_ONCE)
            text = rest + read if rest else read
            if not text:
                return
            cut = text.rfind(b"\n") + 1 if read else len(text)
            if not cut:  # a line longer than what is read at once
                rest = text
                continue
            text, rest = text[:cut], text[cut:]
            parsed = _parsed(path, text, line)
            yield _Piece(offset, offset + cut, line, parsed)
            offset, line = offset + cut, line + parsed.num_lines


def _parsed(path: str | os.PathLike[str], text: bytes, line: int) -> Parsed:
    try:
        return parse(text)
    except MalformedLine as error:
        raise ValueError(
            f"{path}, line {line + error.line + 1}: {error.reason}. A LIBSVM line reads "
            '"label index:value index:value …", indices ascending.'
        ) from None


def _opened(path: str | os.PathLike[str]) -> IO[bytes]:
    file = Path(path).expanduser()
    if not file.exists():
        raise FileNotFoundError(
            errno.ENOENT, "no such LIBSVM file; give the path of one that exists", str(file)
        )
    return _OPENERS.get(file.suffix, open)(file, "rb")


def _csr(
    values: npt.NDArray[Any], columns: npt.NDArray[Any], sizes: npt.NDArray[Any], num_features: int
) -> scipy.sparse.csr_array:
    pointers = np.zeros(len(sizes) + 1, columns.dtype if len(values) < 2**31 else np.int64)
    np.cumsum(sizes, out=pointers[1:])
    return scipy.sparse.csr_array((values, columns, pointers), shape=(len(sizes), num_features))


def checked_features(path: str | os.PathLike[str], given: int | None, needed: int) -> int:
    if given is None:
        return needed
    if needed > given:
        raise ValueError(
            f"{path} has the feature {needed} (counted from 1), and num_features={given}; give at "
            "least as many as there are."
        )
    return given


def _based(
    path: str | os.PathLike[str], zero_based: ZeroBased, smallest: int, largest: int
) -> bool:
    if zero_based == "auto":
        return smallest == 0 and largest >= 0
    if not zero_based and smallest == 0 and largest >= 0:
        raise ValueError(
            f"{path}: the index 0 occurs, and zero_based=False says that indices start at 1; "
            'pass zero_based=True, or "auto".'
        )
    return zero_based


def floating(dtype: npt.DTypeLike) -> np.dtype[Any]:
    found = np.dtype(dtype)
    if found not in (np.dtype(np.float32), np.dtype(np.float64)):
        raise ValueError(f"LIBSVM values are read as float32 or float64, got dtype {found}.")
    return found
