"""LIBSVM text to arrays: a whole chunk at once where it is regular, line by line where it is not.

The quick way looks at the bytes that are no digits: which of them may follow which, with digits
between or not, is the grammar. What passes is translated to one number per line and read by SciPy's
Matrix Market reader, the fastest parser of numbers that is there wherever JAX is. Whatever does not
pass goes to the slow way, which reads it all the same, or says what is wrong with which line.
"""

import io
import re
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import scipy.io

_SPACE, _NEWLINE, _COLON, _SIGN, _DOT, _EXPONENT, _POWER_SIGN, _OTHER, _DIGIT = range(9)

_CLASSES = bytearray([_OTHER] * 256)
for _chars, _class in (
    (b" \t\r", _SPACE),
    (b"\n", _NEWLINE),
    (b":", _COLON),
    (b"+-", _SIGN),
    (b".", _DOT),
    (b"eE", _EXPONENT),
    (b"0123456789", _DIGIT),
):
    for _char in _chars:
        _CLASSES[_char] = _class


def _allowed() -> npt.NDArray[np.bool_]:
    """``[before, digits between?, after]``: what may follow what, flattened."""
    allowed = np.zeros((8, 2, 8), np.bool_)
    ends = [_SPACE, _NEWLINE]
    for begin in (*ends, _COLON, _SIGN):
        allowed[begin, 1, [*ends, _EXPONENT]] = True
        allowed[begin, :, _DOT] = True
    for begin in (*ends, _COLON):
        allowed[begin, 0, _SIGN] = True
    for begin in ends:
        allowed[begin, 0, ends] = True
        allowed[begin, 1, _COLON] = True
    allowed[_DOT, :, [*ends, _EXPONENT]] = True
    allowed[_EXPONENT, 1, ends] = allowed[_POWER_SIGN, 1, ends] = True
    allowed[_EXPONENT, 0, _POWER_SIGN] = True
    return allowed.reshape(-1)


_FORBIDDEN = ~_allowed()
_ONE_PER_LINE = bytes.maketrans(b" \t\r:", b"\n\n\n\n")
_QUERY = re.compile(rb"^([ \t]*[^\s:]+[ \t]+)qid:\d+(?=\s)", re.MULTILINE)
_LONE_PLUS = re.compile(rb"\+(?![\d.])")
_HEADER = b"%%%%MatrixMarket matrix array real general\n%d 1\n"


class Parsed(NamedTuple):
    """Rows as the text has them.

    Attributes:
      labels: f64 ``[num_rows]``.
      indices: int64 ``[num_nonzeros]``, as written: zero- or one-based.
      values: f64 ``[num_nonzeros]``.
      row_sizes: int64 ``[num_rows]``: entries of each row.
      num_lines: Lines, with those that hold no row.
    """

    labels: npt.NDArray[np.float64]
    indices: npt.NDArray[np.int64]
    values: npt.NDArray[np.float64]
    row_sizes: npt.NDArray[np.int64]
    num_lines: int


class MalformedLine(Exception):
    """``line`` counts from 0 in the text that was parsed."""

    def __init__(self, line: int, reason: str) -> None:
        super().__init__(reason)
        self.line, self.reason = line, reason


def parse(text: bytes) -> Parsed:
    """Rows ``label index:value …``; comments from ``#`` on, empty lines and ``qid:…`` are left out.

    Args:
      text: Whole lines; the last one may lack its newline.

    Raises:
      MalformedLine: the first line that is no such row, has an index twice or out of order, or a
        number that is not finite.
    """
    plain = text if text.endswith(b"\n") else text + b"\n"
    if b"#" in plain:
        plain = re.sub(rb"#[^\n]*", b"", plain)
    if b"qid:" in plain:
        plain = _QUERY.sub(rb"\1", plain)
    parsed = None
    if not _LONE_PLUS.search(plain):
        if b"+" in plain:  # which the parser of numbers does not take
            plain = plain.replace(b"\n+", b"\n").replace(b":+", b":").removeprefix(b"+")
        parsed = _regular(plain)
    return _line_by_line(text) if parsed is None else parsed


def _regular(text: bytes) -> Parsed | None:
    """All of it at once; ``None`` where anything is out of the ordinary."""
    classes = np.frombuffer(text.translate(bytes(_CLASSES)), np.uint8)
    places = np.flatnonzero(classes != _DIGIT).astype(np.int32 if len(text) < 2**31 else np.int64)
    kinds = classes[places]
    # A newline that is not there stands before the first line.
    kinds = np.concatenate((np.array([_NEWLINE], np.uint8), kinds))
    gaps = np.diff(places, prepend=places.dtype.type(-1)) > 1
    signs = (kinds[1:] == _SIGN) & (kinds[:-1] == _EXPONENT) & ~gaps
    kinds[1:][signs] = _POWER_SIGN
    if _FORBIDDEN[kinds[:-1] * np.uint8(16) + gaps * np.uint8(8) + kinds[1:]].any():
        return None
    dots = np.flatnonzero(kinds[1:-1] == _DOT)  # the text ends with a newline
    if not np.all(gaps[dots] | gaps[dots + 1]):  # a point without a digit
        return None

    bounds = np.flatnonzero(kinds <= _COLON)
    ends = kinds[bounds[1:]]
    places = np.concatenate((np.array([-1], places.dtype), places))[bounds]
    is_number = np.diff(places) > 1
    is_index = (ends == _COLON)[is_number]
    numbers_in_lines = np.cumsum(is_number)[ends == _NEWLINE]
    in_line = np.diff(numbers_in_lines, prepend=0)
    num_lines = len(in_line)
    in_line = in_line[in_line > 0]
    first = np.cumsum(in_line) - in_line  # the number of each row's label
    if np.any(in_line % 2 == 0):
        return None
    rest = np.ones(len(is_index), np.bool_)
    rest[first] = False
    pairs = is_index[rest].reshape(-1, 2)
    if is_index[first].any() or not pairs[:, 0].all() or pairs[:, 1].any():
        return None
    if not len(is_index):
        none = np.zeros(0)
        return Parsed(none, none.astype(np.int64), none, none.astype(np.int64), num_lines)
    matrix_market = _HEADER % len(is_index) + text.translate(_ONE_PER_LINE)
    try:
        numbers = scipy.io.mmread(io.BytesIO(matrix_market)).reshape(-1)
    except (ValueError, OverflowError):  # a number that f64 does not hold
        return None
    if not np.all(np.isfinite(numbers)):
        return None
    entries = numbers[rest].reshape(-1, 2)
    if entries.size and np.max(entries[:, 0]) >= 2**53:
        return None
    indices = entries[:, 0].astype(np.int64)
    row_sizes = in_line // 2
    ascends = np.diff(indices) > 0
    begins = np.cumsum(row_sizes)[:-1]
    ascends[begins[(begins > 0) & (begins < len(indices))] - 1] = True
    if not ascends.all():
        return None
    return Parsed(numbers[first], indices, entries[:, 1].copy(), row_sizes, num_lines)


def _line_by_line(text: bytes) -> Parsed:
    labels: list[float] = []
    indices: list[int] = []
    values: list[float] = []
    sizes: list[int] = []
    lines = text.split(b"\n")
    if not lines[-1]:
        lines.pop()
    for number, line in enumerate(lines):
        words = line.partition(b"#")[0].split()
        if not words:
            continue
        labels.append(_number(words[0], number, "the label"))
        words = words[1:]
        if words and words[0].startswith(b"qid:") and words[0][4:].isdigit():
            words = words[1:]
        last = -1
        for word in words:
            index, colon, value = word.partition(b":")
            if not colon or not index.isdigit() or not int(index) < 2**53:
                raise MalformedLine(number, f"expected index:value, got {_shown(word)}")
            if int(index) <= last:
                raise MalformedLine(
                    number, f"index {int(index)} follows {last}; each row's must ascend"
                )
            last = int(index)
            indices.append(last)
            values.append(_number(value, number, f"the value of index {last}"))
        sizes.append(len(words))
    return Parsed(
        np.array(labels, np.float64),
        np.array(indices, np.int64),
        np.array(values, np.float64),
        np.array(sizes, np.int64),
        len(lines),
    )


def _number(word: bytes, line: int, what: str) -> float:
    try:
        number = float(word)
    except ValueError:
        raise MalformedLine(line, f"{what} is no number: {_shown(word)}") from None
    if not np.isfinite(number) or b"_" in word:
        raise MalformedLine(line, f"{what} is no finite number: {_shown(word)}")
    return number


def _shown(word: bytes) -> str:
    text = word.decode("utf-8", "replace")
    return repr(text if len(text) <= 40 else text[:40] + "…")
