"""Files of token ids, memory-mapped: ``.npy``, or raw ``.bin`` whose dtype the user knows."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.integer[Any]]

TOKEN_SUFFIXES = (".bin", ".npy")

# How many tokens are looked at before training starts; every batch is checked again as it is drawn.
MAX_SAMPLED = 1 << 24
_BLOCK = 1 << 14


def read_tokens(path: str | os.PathLike[str], dtype: npt.DTypeLike | None = None) -> Tokens:
    """Maps a token file into memory.

    Args:
      path: ``.npy`` (one-dimensional, integers) or ``.bin`` (raw little-endian integers).
      dtype: Of the ids in a ``.bin`` file, such as ``"uint16"``; for ``.npy`` it may be left
        out, and must agree if given.

    Returns:
      Read-only integers ``[num_tokens]``, backed by the file.

    Raises:
      OSError: nothing is there or it cannot be read; carries the path.
      ValueError: empty, another suffix, a dtype that is no integer or does not fit the file.
    """
    file = Path(path).expanduser()
    if not file.exists():
        raise FileNotFoundError(
            errno.ENOENT, "no such token file; give the path of one that exists", str(file)
        )
    if file.suffix not in TOKEN_SUFFIXES:
        raise ValueError(f"{file} is no token file: expected a name ending in .bin or .npy.")
    wanted = None if dtype is None else _integer(np.dtype(dtype), file)
    try:
        tokens = _map_npy(file, wanted) if file.suffix == ".npy" else _map_bin(file, wanted)
    except OSError as error:
        raise OSError(
            error.errno, f"cannot read this token file: {error.strerror}", str(file)
        ) from error
    if not tokens.size:
        raise ValueError(f"the token file {file} is empty; give a file that holds tokens.")
    return tokens


def check_ids(tokens: Tokens, vocab_size: int, name: str, position: int = 0) -> None:
    """Raises ``ValueError`` if an id lies outside ``0 .. vocab_size - 1``.

    Looks at every token of a short array, and at evenly spaced blocks of a long one (16 M tokens).

    Args:
      tokens: Integers of any shape.
      vocab_size: Number of ids.
      name: What the message calls the tokens.
      position: Where ``tokens`` begins in what ``name`` names.
    """
    for start, block in sampled_blocks(tokens.reshape(-1)):
        low, high = int(np.min(block)), int(np.max(block))
        if low < 0 or high >= vocab_size:
            bad = low if low < 0 else high
            where = position + start + int(np.argmax(block == bad))
            raise ValueError(
                f"{name} holds the token id {bad} (position {where}), but the vocabulary has "
                f"{vocab_size} ids, 0 .. {vocab_size - 1}. Give the vocabulary of the tokenizer "
                f"that wrote it, or the right dtype (read as {tokens.dtype})."
            )


def sampled_blocks(tokens: Tokens) -> Iterator[tuple[int, Tokens]]:
    """``(start, block)``: all of a short array, 16 M tokens of a long one, both ends included."""
    num_blocks = -(-tokens.size // _BLOCK)
    num_sampled = min(num_blocks, MAX_SAMPLED // _BLOCK)
    for k in np.linspace(0, num_blocks - 1, num_sampled).round().astype(np.int64).tolist():
        yield k * _BLOCK, tokens[k * _BLOCK : (k + 1) * _BLOCK]


def _integer(dtype: np.dtype[Any], file: Path) -> np.dtype[Any]:
    if not np.issubdtype(dtype, np.integer):
        raise ValueError(
            f"{file}: token ids are integers, got dtype {dtype}; expected one such as uint16."
        )
    return dtype


def _map_npy(file: Path, dtype: np.dtype[Any] | None) -> Tokens:
    try:
        tokens = np.load(file, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{file} cannot be read as a .npy array of integers: {error}") from error
    if tokens.ndim != 1:
        raise ValueError(f"{file}: expected one dim of token ids, got shape {tokens.shape}.")
    _integer(tokens.dtype, file)
    if dtype is not None and dtype != tokens.dtype:
        raise ValueError(
            f"{file} holds {tokens.dtype}, but dtype {dtype} was asked for; leave the dtype out: "
            "a .npy file states its own."
        )
    return np.asarray(tokens)


def _map_bin(file: Path, dtype: np.dtype[Any] | None) -> Tokens:
    if dtype is None:
        raise ValueError(
            f"{file} is raw and does not say what it holds; give its dtype, such as uint16."
        )
    num_bytes = file.stat().st_size
    if num_bytes % dtype.itemsize:
        raise ValueError(
            f"{file} has {num_bytes} bytes, which is no whole number of {dtype} "
            f"({dtype.itemsize} bytes each); the dtype is another one, or the file is cut short."
        )
    if not num_bytes:  # which cannot be mapped
        return np.zeros(0, dtype)
    return np.asarray(np.memmap(file, dtype=dtype.newbyteorder("<"), mode="r"))
