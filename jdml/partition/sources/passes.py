"""Passes over a stream, and sums: one chunk is read while the one before it is in use."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from jdml.partition.sources.stream import Chunk, Stream

PyTree = Any


def accumulate(
    stream: Stream, contribution: Callable[[Chunk], PyTree], *, progress: bool | None = None
) -> PyTree:
    """``Σ_chunks contribution(chunk)``, leaf by leaf: one pass, two chunks in memory.

    What a full-batch method needs is such a sum: of losses and gradients,
    ``(Σ_i φ(x_iᵀw, y_i), Σ_i φ'(x_iᵀw, y_i) x_i)``, or of a Hessian times a vector,
    ``Σ_i φ''(x_iᵀw, y_i) (x_iᵀv) x_i``. A compiled contribution takes ``stream.padded(chunk)``,
    whose shapes are those of every chunk, and leaves out the rows from ``num_rows`` on.

    Args:
      stream: The rows.
      contribution: Of a chunk, a pytree of arrays. While it computes, the next chunk is read.
      progress: Whether to show how far the pass is, on standard error; by default if that is a
        terminal.

    Returns:
      NumPy arrays; floats are summed, and returned, in f64.
    """
    total: PyTree = None
    with pass_line(stream, progress) as show:
        for chunk in read_ahead(stream, range(stream.num_chunks)):
            part = jax.tree.map(_wide, contribution(chunk))
            total = part if total is None else jax.tree.map(np.add, total, part)
            show(chunk)
    return total


def read_ahead(stream: Stream, numbers: Iterable[int]) -> Iterator[Chunk]:
    """Those chunks in that order, each read by a thread while the one before it is in use.

    Who stops early waits for nobody: the thread ends by itself when this iterator is gone.
    """
    # No ``with``, which would wait for the thread: an iterator that was dropped may be closed by
    # the garbage collector, in any thread and at any point. In one that is just starting, and
    # holds a lock that the end of this one needs, that would be for ever.
    reader = ThreadPoolExecutor(1, thread_name_prefix="read ahead")
    order = iter(numbers)
    number = next(order, None)
    coming = None if number is None else reader.submit(stream.chunk, number)
    while coming is not None:
        chunk = coming.result()
        number = next(order, None)
        coming = None if number is None else reader.submit(stream.chunk, number)
        yield chunk


@contextlib.contextmanager
def pass_line(
    stream: Stream, progress: bool | None, title: str | None = None
) -> Iterator[Callable[[Chunk], None]]:
    """A function to be told of each chunk that is done; shows a bar of rows."""
    console = Console(stderr=True)
    if not (console.is_terminal if progress is None else progress):
        yield lambda chunk: None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("rows"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=console.is_terminal) as bar:
        # A whole path would leave the count no room.
        task = bar.add_task(title or Path(stream.name).name, total=stream.shape[0])
        yield lambda chunk: bar.advance(task, len(chunk.labels))


def _wide(x: Any) -> np.ndarray:
    array = np.asarray(x)
    return array.astype(np.float64) if array.dtype.kind == "f" else array
