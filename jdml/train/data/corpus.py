"""A corpus: one long array of token ids, and its contiguous split for validation."""

import dataclasses
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy.typing as npt

from jdml.partition.sources.tokens import (
    TOKEN_SUFFIXES,
    Tokens,
    check_ids,
    read_tokens,
    sampled_blocks,
)
from jdml.train.data.text import SUFFIXES, read_text, standard_library

NUM_BYTE_IDS = 256


@dataclasses.dataclass(frozen=True, eq=False)  # arrays do not compare to one bool
class Corpus:
    """Token ids, in their order.

    Attributes:
      tokens: Integers ``[num_tokens]``, perhaps backed by a file.
      vocab_size: Number of ids; every token lies in ``0 .. vocab_size - 1``.
      name: What messages call it: a path, or a description.

    Raises:
      ValueError: a token lies outside the vocabulary (a sample of a long corpus is looked at).
    """

    tokens: Tokens
    vocab_size: int
    name: str

    def __post_init__(self) -> None:
        if not 1 <= self.vocab_size <= 2**31:
            raise ValueError(f"vocab_size must lie in 1 .. 2**31, got {self.vocab_size}.")
        check_ids(self.tokens, self.vocab_size, self.name)

    def split(self, holdout: float = 0.05) -> tuple["Corpus", "Corpus"]:
        """``(train, validation)``: the last ``holdout`` of the tokens is for validation.

        The parts are contiguous, so no sequence of one reaches into the other, and they depend on
        nothing but the corpus and the fraction.

        Raises:
          ValueError: the fraction leaves one part empty.
        """
        num_held = round(self.tokens.size * holdout)
        if not 0 < num_held < self.tokens.size:
            raise ValueError(
                f"a holdout of {holdout} of {self.name} ({self.tokens.size} tokens) leaves "
                "nothing to train on or nothing to validate on; use a fraction such as 0.05."
            )
        cut = self.tokens.size - num_held
        return (
            Corpus(self.tokens[:cut], self.vocab_size, f"{self.name} (training part)"),
            Corpus(self.tokens[cut:], self.vocab_size, f"{self.name} (validation part)"),
        )

    def fingerprint(self) -> str:
        """16 hex digits of the length and the ids; of a long corpus, of 16 M evenly spaced ones."""
        digest = hashlib.blake2b(str(self.tokens.size).encode(), digest_size=8)
        for _, block in sampled_blocks(self.tokens):
            digest.update(block.astype("<i4").tobytes())
        return digest.hexdigest()


def read_corpus(
    path: str | os.PathLike[str] | None = None,
    *,
    vocab_size: int | None = None,
    dtype: npt.DTypeLike | None = None,
    suffixes: Sequence[str] = SUFFIXES,
    max_bytes: int | None = None,
) -> Corpus:
    """Reads the user's text or tokens, or else the text of Python's standard library.

    Args:
      path: Text file or folder (a token is a byte), or a token file ``.bin`` or ``.npy``.
      vocab_size: Number of ids; needed for a token file, and 256 by default for text.
      dtype: Of a ``.bin`` file's ids, such as ``"uint16"``.
      suffixes: Which files of a folder are text.
      max_bytes: Read so many bytes of text at most.

    Raises:
      OSError: nothing is there or it cannot be read; carries the path.
      ValueError: empty, or not what it should be; says what was found and what was expected.
    """
    if path is not None and Path(path).suffix in TOKEN_SUFFIXES and not Path(path).is_dir():
        tokens = read_tokens(path, dtype)
        if vocab_size is None:
            raise ValueError(f"{path} holds token ids; give vocab_size, the number of ids.")
        return Corpus(tokens, vocab_size, str(path))
    if dtype is not None:
        raise ValueError(
            f"dtype {dtype} was given for text, whose tokens are bytes; it is for .bin files."
        )
    vocab_size = NUM_BYTE_IDS if vocab_size is None else vocab_size
    if path is None:
        data = standard_library() if max_bytes is None else standard_library(max_bytes)
        return Corpus(data, vocab_size, "Python's standard library")
    return Corpus(read_text(path, suffixes, max_bytes), vocab_size, str(path))
