"""A stream as the rows of a linear model: what a compiled solver multiplies by is read as it runs.

``LinearProblem(StreamedRows(stream), stream.labels, loss, penalty)`` is a problem like any other:
``jdml.optimize`` solves it by every method that wants no single rows. Chunks come into the program
by a callback, which reads and computes nothing of JAX, while a thread reads the next one.
"""

import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from jdml.partition.sources.passes import pass_line
from jdml.partition.sources.stream import Chunk, Stream

LARGEST_ARGUMENT = 64 << 10
"""Bytes. JAX copies larger arguments of a callback (from 100 kB on) in threads which, on a machine
of two cores, may all be waiting for that callback (seen with jax 0.12.0.1)."""


@jax.tree_util.register_static
class StreamedRows:
    """``X w``, ``Xᵀ v`` and ``Xᵀ f(X w)``, each in one pass over the stream.

    Methods as of ``jdml.models.linear.Dense`` and ``Sparse``, under ``jit`` or without. ``w`` is
    ``[d]`` or ``[d, outputs]``, ``v`` ``[n]`` or ``[n, outputs]``. In memory are two chunks, one of
    which is being read, one more on the device, and what is asked for: n or d numbers.

    Args:
      stream: The rows, in f32, or in f64 where the session has it.
      progress: Whether each pass shows a bar on standard error.

    Attributes:
      num_passes: Passes begun; a method's cost.

    Raises:
      ValueError: f64 in a session without.
    """

    def __init__(self, stream: Stream, *, progress: bool = False) -> None:
        if stream.dtype == np.float64 and jnp.zeros(()).dtype != np.float64:
            raise ValueError(
                f"{stream.name} is read as float64, and this session of JAX has no float64. Switch "
                'it on with jax.config.update("jax_enable_x64", True), or read float32.'
            )
        self.stream, self.shape, self.dtype = stream, stream.shape, stream.dtype
        self.num_passes = 0
        self._progress = progress
        self._bar = contextlib.ExitStack()
        self._show: Callable[[Chunk], None] = lambda chunk: None
        self._lock = threading.Lock()
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="read ahead")
        self._coming: tuple[int, Future[Chunk]] | None = None

    def matvec(self, w: jax.Array) -> jax.Array:
        """``X w``."""
        num_rows, most = self.shape[0], self.stream.most_rows
        starts = self._starts()

        def more(i, out):
            x, _ = self._read(i)
            # What a padded chunk writes beyond its rows, the next one overwrites.
            return jax.lax.dynamic_update_slice_in_dim(out, self._product(x, w), starts[i], 0)

        out = jnp.zeros((num_rows + most, *w.shape[1:]), self.dtype)
        return jax.lax.fori_loop(0, self.stream.num_chunks, more, out)[:num_rows]

    def rmatvec(self, v: jax.Array) -> jax.Array:
        """``Xᵀ v``."""
        most, starts = self.stream.most_rows, self._starts()
        v = jnp.concatenate((v, jnp.zeros((most, *v.shape[1:]), v.dtype)))

        def more(i, total):
            x, _ = self._read(i)
            return self._pulled(total, x, jax.lax.dynamic_slice_in_dim(v, starts[i], most, 0))

        zero = jnp.zeros((self.shape[1], *v.shape[1:]), self.dtype)
        return jax.lax.fori_loop(0, self.stream.num_chunks, more, zero)

    def there_and_back(
        self, w: jax.Array, f: Callable[..., jax.Array], *of_samples: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """``(Xᵀ v, Σ_i v_i)`` of ``v = f(X w, *of_samples)``, f row by row; one pass, not two.

        Hessian products are of this form. ``of_samples`` are ``[n, …]``; v is as ``X w``.
        """
        most, starts = self.stream.most_rows, self._starts()
        long = [jnp.concatenate((a, jnp.zeros((most, *a.shape[1:]), a.dtype))) for a in of_samples]

        def more(i, totals):
            pulled, total = totals
            x, num_rows = self._read(i)
            own = (jax.lax.dynamic_slice_in_dim(a, starts[i], most, 0) for a in long)
            v = f(self._product(x, w), *own)
            there = jnp.arange(most) < num_rows
            v = jnp.where(there.reshape(-1, *(1,) * (v.ndim - 1)), v, 0)
            return self._pulled(pulled, x, v), total + jnp.sum(v, axis=0)

        zeros = jnp.zeros((self.shape[1], *w.shape[1:]), self.dtype)
        first = zeros, jnp.zeros(w.shape[1:], self.dtype)
        return jax.lax.fori_loop(0, self.stream.num_chunks, more, first)

    def squared_norms(self) -> jax.Array:
        """``|x_i|²``, ``[n]``."""
        starts = self._starts()

        def more(i, out):
            x, _ = self._read(i)
            if self.stream.sparse:
                row, _, value = x
                part = jnp.zeros(self.stream.most_rows, self.dtype).at[row].add(value * value)
            else:
                part = jnp.einsum("ij,ij->i", x, x)
            return jax.lax.dynamic_update_slice_in_dim(out, part, starts[i], 0)

        out = jnp.zeros(self.shape[0] + self.stream.most_rows, self.dtype)
        return jax.lax.fori_loop(0, self.stream.num_chunks, more, out)[: self.shape[0]]

    def gram(self, weights: jax.Array) -> jax.Array:
        """``Xᵀ diag(weights) X``, ``[d, d]``; of sparse rows multiplied on the host."""
        most, width, starts = self.stream.most_rows, self.shape[1], self._starts()
        long = jnp.concatenate((weights, jnp.zeros(most, weights.dtype)))

        def more(i, total):
            own = jax.lax.dynamic_slice_in_dim(long, starts[i], most, 0)
            if self.stream.sparse:
                return total + self._sparse_gram(i, own)
            x, _ = self._read(i)
            return total + x.T @ (x * own[:, None].astype(x.dtype))

        zero = jnp.zeros((width, width), self.dtype)
        return jax.lax.fori_loop(0, self.stream.num_chunks, more, zero)

    def _sparse_gram(self, number: Any, weights: jax.Array) -> jax.Array:
        """Of one chunk, whose rows have these weights."""

        def of_chunk(i: Any, pieces: Any) -> np.ndarray:
            rows = self._chunk(int(i)).rows
            scale = np.concatenate([np.asarray(x) for x in pieces])[: rows.shape[0], None]
            return (rows.T @ rows.multiply(scale)).toarray().astype(self.dtype)

        step = LARGEST_ARGUMENT // weights.dtype.itemsize
        pieces = [weights[k : k + step] for k in range(0, len(weights), step)]
        result = jax.ShapeDtypeStruct((self.shape[1],) * 2, self.dtype)
        return jax.pure_callback(of_chunk, result, number, pieces, vmap_method="sequential")

    def take(self, samples: Any) -> NoReturn:
        self._no_single_rows()

    def dot(self, sample: Any, w: Any) -> NoReturn:
        self._no_single_rows()

    def add(self, w: Any, sample: Any, scale: Any) -> NoReturn:
        self._no_single_rows()

    @property
    def T(self) -> NoReturn:
        self._no_single_rows()

    def _no_single_rows(self) -> NoReturn:
        raise ValueError(
            f"{self.stream.name} is a stream, of which no single rows or columns can be taken. "
            "Take a method that uses all samples at every step, or mini-batches (StreamBatches)."
        )

    def _starts(self) -> jax.Array:
        index = np.int32 if self.shape[0] + self.stream.most_rows < 2**31 else np.int64
        return jnp.asarray(self.stream.starts.astype(index))

    def _product(self, x: Any, w: jax.Array) -> jax.Array:
        if not self.stream.sparse:
            return x @ w
        row, column, value = x
        terms = value.reshape(-1, *(1,) * (w.ndim - 1)) * w[column]
        zero = jnp.zeros((self.stream.most_rows, *w.shape[1:]), self.dtype)
        return zero.at[row].add(terms, indices_are_sorted=True, mode="promise_in_bounds")

    def _pulled(self, total: jax.Array, x: Any, part: jax.Array) -> jax.Array:
        """``total + Xᵀ part`` of a chunk."""
        if not self.stream.sparse:
            return total + x.T @ part
        row, column, value = x
        terms = value.reshape(-1, *(1,) * (part.ndim - 1)) * part[row]
        return total.at[column].add(terms, mode="promise_in_bounds")

    def _read(self, number: Any) -> tuple[Any, Any]:
        """``(x, num_rows)`` of :class:`Padded`, in the program."""
        most, entries = self.stream.most_rows, self.stream.most_entries
        of = jax.ShapeDtypeStruct
        x: Any = of((most, self.shape[1]), self.dtype)
        if self.stream.sparse:
            index = of((entries,), np.int32)
            x = (index, index, of((entries,), self.dtype))

        def read(i: Any) -> tuple[Any, Any]:
            padded = self.stream.padded(self._chunk(int(i)))
            return padded.x, padded.num_rows

        return jax.pure_callback(read, (x, of((), np.int32)), number, vmap_method="sequential")

    def _chunk(self, number: int) -> Chunk:
        """That chunk; a thread begins to read the next one."""
        with self._lock:
            coming = self._coming
            if coming is not None and coming[0] == number:
                chunk = coming[1].result()
            else:
                chunk = self.stream.chunk(number)
            after = (number + 1) % self.stream.num_chunks
            self._coming = (after, self._reader.submit(self.stream.chunk, after))
            if number == 0:
                self.num_passes += 1
                self._bar.close()
                title = f"{Path(self.stream.name).name}, pass {self.num_passes}"
                line = pass_line(self.stream, self._progress, title)
                self._show = self._bar.enter_context(line)
            self._show(chunk)
            if after == 0:
                self._bar.close()
            return chunk
