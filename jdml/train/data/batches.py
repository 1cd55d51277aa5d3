"""Batches of sequences: windows of a corpus, in the sampler's order, placed on the mesh.

A sample is a window of ``seq_len + 1`` tokens; windows start every ``seq_len`` tokens, so that each
token is predicted once per epoch. There is no prefetch thread: cutting a batch of 32 × 128 tokens
takes 25 µs, and the devices work on one step while the host prepares the next.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import numpy.typing as npt

from jdml.partition.samples import Sampler, check_state
from jdml.partition.sources.tokens import check_ids
from jdml.train.data.corpus import Corpus

Batch = dict[str, Any]


class Batches:
    """Endless batches ``{"inputs", "targets"}``, int32 ``[batch, seq_len]``, targets one ahead.

    Args:
      corpus: Where the sequences come from.
      batch: Rows of the global batch.
      seq_len: Tokens that the model sees of one sequence.
      seed: Seed of the order.
      sharding: Of the global arrays, such as ``NamedSharding(mesh, PartitionSpec("data"))``. Each
        process cuts the rows of its own devices only. Without it, batches are NumPy arrays and hold
        all rows.
      shuffle: ``False`` takes the windows in their order.

    Raises:
      ValueError: the corpus is shorter than one sequence or one batch, or the sharding does not
        divide the batch.
    """

    def __init__(
        self,
        corpus: Corpus,
        batch: int,
        seq_len: int,
        seed: int = 0,
        *,
        sharding: jax.sharding.Sharding | None = None,
        shuffle: bool = True,
    ) -> None:
        if seq_len < 1:
            raise ValueError(f"seq_len must be at least 1, got {seq_len}.")
        num_tokens = corpus.tokens.size
        if num_tokens < seq_len + 1:
            raise ValueError(
                f"{corpus.name} has {num_tokens} tokens, but one sequence needs seq_len + 1 = "
                f"{seq_len + 1}; give a longer text or a smaller seq_len."
            )
        num_windows = (num_tokens - 1) // seq_len
        if num_windows < batch:
            raise ValueError(
                f"{corpus.name} has {num_tokens} tokens, which is {num_windows} sequences of "
                f"{seq_len}; one batch needs {batch}, or {batch * seq_len + 1} tokens. Give a "
                "longer text, a smaller batch or a smaller seq_len."
            )
        self.corpus = corpus
        self.seq_len = seq_len
        self.sharding = sharding
        self._shape = (batch, seq_len)
        rows, self._columns = _local_part(sharding, self._shape)
        self._sampler = Sampler(num_windows, batch, seed, shuffle=shuffle, rows=rows)
        self._windows = np.lib.stride_tricks.sliding_window_view(corpus.tokens, seq_len + 1)
        self._fingerprint = corpus.fingerprint()

    @property
    def step(self) -> int:
        """Batches given out."""
        return self._sampler.step

    @property
    def epoch(self) -> int:
        """Epochs completed."""
        return self._sampler.epoch

    @property
    def batches_per_epoch(self) -> int:
        """Full batches in one epoch; the sequences that fill none are dropped."""
        return self._sampler.batches_per_epoch

    @property
    def tokens_per_batch(self) -> int:
        """Tokens predicted per global batch."""
        return self._shape[0] * self._shape[1]

    def batch_at(self, step: int) -> Batch:
        """Batch ``step``; moves nothing.

        Raises:
          ValueError: a token lies outside the vocabulary.
        """
        starts = self._sampler.batch_at(step) * self.seq_len
        windows = self._windows[starts]
        check_ids(windows, self.corpus.vocab_size, f"batch {step} of {self.corpus.name}")
        # A fresh array each time: a device array may go on using the host's memory.
        return {
            "inputs": self._place(windows[:, :-1].astype(np.int32)),
            "targets": self._place(windows[:, 1:].astype(np.int32)),
        }

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        batch = self.batch_at(self.step)
        self._sampler.step += 1
        return batch

    def one_epoch(self, max_batches: int | None = None) -> Iterator[Batch]:
        """The first epoch, or ``max_batches`` of it: the same each time; moves nothing."""
        num = self.batches_per_epoch
        for step in range(num if max_batches is None else min(num, max_batches)):
            yield self.batch_at(step)

    def state(self) -> dict[str, Any]:
        """The position, and all that it is relative to: JSON, the same on every process."""
        return {
            **self._sampler.state(),
            "seq_len": self.seq_len,
            "corpus": self._fingerprint,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Moves to a saved position.

        Raises:
          ValueError: the state belongs to another corpus, seed, batch or sequence length; names
            each difference, and moves nothing.
        """
        self._sampler.step = check_state(
            state,
            self.state(),
            hint=f"Resume with the saved values and the same text ({self.corpus.name}), or start "
            "anew in another folder.",
        )

    def _place(self, local: npt.NDArray[np.int32]) -> Any:
        local = np.ascontiguousarray(local[:, self._columns])
        if self.sharding is None:
            return local
        return jax.make_array_from_process_local_data(self.sharding, local, self._shape)


def _local_part(
    sharding: jax.sharding.Sharding | None, shape: tuple[int, int]
) -> tuple[npt.NDArray[np.int64], slice | npt.NDArray[np.int64]]:
    """Row and column numbers of the global batch that this process's devices hold."""
    everything = np.arange(shape[0])
    if sharding is None:
        return everything, slice(None)
    try:
        sharding.shard_shape(shape)
    except ValueError as error:
        raise ValueError(
            f"a batch of shape {list(shape)} (rows, seq_len) does not divide over {sharding}; "
            "make each dim a multiple of the mesh axes that shard it."
        ) from error
    if sharding.is_fully_addressable:
        return everything, slice(None)
    indices = sharding.addressable_devices_indices_map(shape).values()
    parts = [
        np.unique(np.concatenate([np.arange(n)[index[dim]] for index in indices if index]))
        for dim, n in enumerate(shape)
    ]
    return parts[0], parts[1]
