"""Sparse rows packed for products that gather and add up, and scatter nothing.

XLA scatters on one core of a CPU, element by element, and reduces what it gathers at about 5 ns an
element. Here rows of about the same number of non-zeros stand side by side, filled up with zeros to
one width, as ``[width, rows]``, and the products of eight lines at a time are added to all rows at
once: 1 ns an element in f64 on two cores, as SciPy. The same non-zeros stand row after row as well,
so that a sample can be taken by itself; with rows packed by columns too, each is there four times.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse

Link = Callable[[jax.Array], jax.Array]

LINES = 8
"""Lines of a group that are added in one loop over its rows; more was slower."""

FEW_ROWS = 64
"""A group of fewer rows joins a wider one if that costs little, and is reduced row by row."""

AT_A_TIME = 2**16
"""Elements of a group that are packed at a time: their indices stay in the cache."""

ALIGNMENT = 64
"""Bytes: XLA uses memory that starts at a multiple of these as it is."""


def same(w: jax.Array) -> jax.Array:
    """``w``."""
    return w


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["columns", "values", "starts", "counts", "places", "groups"],
    meta_fields=["width"],
)
@dataclasses.dataclass(frozen=True)
class Packed:
    """Sparse rows.

    Attributes:
      columns: int32 ``[nnz + width]``, row after row; zeros at the end, so that ``width`` of them
        may be read from any row's start.
      values: ``[nnz + width]``, theirs.
      starts: ``[n]``, where each row starts.
      counts: int32 ``[n]``, its non-zeros.
      places: int32 ``[n]``, its place in the order of groups; None where there are no groups.
      groups: ``(columns, values)`` of each group of rows, ``[its width, its rows]``; 0 and 0 where
        there is nothing.
      width: Most non-zeros of a row.
    """

    columns: jax.Array
    values: jax.Array
    starts: jax.Array
    counts: jax.Array
    places: Any
    groups: tuple[tuple[jax.Array, jax.Array], ...]
    width: int

    def product(self, w: jax.Array) -> jax.Array:
        """``[n]`` or ``[n, outputs]``: each row times ``w``."""
        w = jnp.asarray(w)
        return gather(jnp.concatenate([_group_product(*g, w) for g in self.groups]), self.places)

    def sums_of_squares(self) -> jax.Array:
        """``[n]``."""
        return gather(jnp.concatenate([jnp.sum(v**2, axis=0) for _, v in self.groups]), self.places)

    def square(self) -> "Packed":
        """Every element squared."""
        groups = tuple((columns, values**2) for columns, values in self.groups)
        return dataclasses.replace(self, values=self.values**2, groups=groups)

    def row(self, number: jax.Array) -> tuple[jax.Array, jax.Array]:
        """``(columns, values)`` of one row, both ``[width]``; past its end 0 and 0."""
        start = self.starts[number]
        within = jnp.arange(self.width, dtype=self.counts.dtype) < self.counts[number]
        columns = jax.lax.dynamic_slice(self.columns, (start,), (self.width,))
        values = jax.lax.dynamic_slice(self.values, (start,), (self.width,))
        return jnp.where(within, columns, 0), jnp.where(within, values, 0)

    def dot(self, number: jax.Array, w: jax.Array, through: Link = same) -> jax.Array:
        """``x_iᵀ through(w)`` of one row."""
        return self.dot_of(number, through, w)

    def dot_of(self, number: jax.Array, f: Callable[..., jax.Array], *vectors: Any) -> jax.Array:
        """``x_iᵀ f(*vectors)``, f of one element of each; it is read in fours."""

        def add(columns: jax.Array, values: jax.Array, total: jax.Array) -> jax.Array:
            terms = [
                values[e] * f(*(element(v, columns[e]) for v in vectors))
                for e in range(values.shape[0])
            ]
            while len(terms) > 1:
                terms = [*map(jnp.add, terms[::2], terms[1::2]), *terms[len(terms) & ~1 :]]
            return total + terms[0]

        return self._along(number, 4, add, jnp.zeros((), vectors[0].dtype))

    def add(self, w: jax.Array, number: jax.Array, scale: jax.Array) -> jax.Array:
        """``w + scale x_i`` of one row; element by element in place, in a loop that keeps w."""

        def add(columns: jax.Array, values: jax.Array, w: jax.Array) -> jax.Array:
            for e in range(values.shape[0]):
                new = element(w, columns[e]) + scale * values[e]
                w = jax.lax.dynamic_update_slice(w, new[None], (columns[e],))
            return w

        return self._along(number, 8, add, w)

    def _along(
        self, number: jax.Array, few: int, add: Callable[..., jax.Array], first: jax.Array
    ) -> jax.Array:
        """``add(columns, values, ·)`` for every few elements of a row; those past its end are 0.

        Indices are unsigned: signed ones are compared with 0 at each element.
        """
        few = min(few, self.width)
        if few == 0:
            return first
        number = jnp.asarray(number, jnp.uint32)
        wide = jnp.uint64 if self.starts.dtype == jnp.int64 else jnp.uint32
        start, count = element(self.starts, number).astype(wide), element(self.counts, number)

        def read(part: jax.Array) -> tuple[jax.Array, jax.Array]:
            at = (start + (part * few).astype(wide),)
            columns = jax.lax.dynamic_slice(self.columns, at, (few,)).astype(jnp.uint32)
            return columns, jax.lax.dynamic_slice(self.values, at, (few,))

        count = count.astype(jnp.uint32)
        full = count // few
        result = jax.lax.fori_loop(
            jnp.uint32(0), full, lambda part, so_far: add(*read(part), so_far), first
        )
        columns, values = read(full)
        within = jnp.arange(few, dtype=jnp.uint32) < count - full * few
        return add(columns, jnp.where(within, values, 0), result)


def element(v: jax.Array, number: jax.Array) -> jax.Array:
    """``v[number]``, a scalar; ``number`` is unsigned and there."""
    return jax.lax.dynamic_slice(v, (number,), (1,))[0]


def gather(w: jax.Array, places: jax.Array) -> jax.Array:
    """``w[places]``, all of which must be there."""
    return jnp.asarray(w).at[places].get(mode="promise_in_bounds")


def pack(matrix: scipy.sparse.csr_array) -> Packed:
    """Packs a CSR matrix on the host, as NumPy arrays; its entries must be finite and given once.

    The large ones lie where ``jax.device_put`` on a CPU takes them without a copy: write to none.
    """
    counts = np.diff(matrix.indptr).astype(np.int64)
    widths = _joined(group_width(counts))
    most = int(counts.max())
    columns = _with_zeros(matrix.indices, most, np.int32)
    values = _with_zeros(matrix.data, most, matrix.dtype)
    members = [np.flatnonzero(widths == width) for width in _kinds(widths)]
    places = np.empty(len(counts), np.int32)
    places[np.concatenate(members)] = np.arange(len(counts), dtype=np.int32)
    starts = matrix.indptr[:-1].astype(np.intp)
    groups = [
        _group(int(width), starts[rows], counts[rows], columns, values, matrix.nnz)
        for width, rows in zip(_kinds(widths), members, strict=True)
    ]
    index = np.int32 if len(values) < 2**31 else np.int64
    return Packed(
        columns,  # type: ignore[arg-type]
        values,  # type: ignore[arg-type]
        starts.astype(index),
        counts.astype(np.int32),
        places,
        tuple(groups),  # type: ignore[arg-type]
        most,
    )


def _group(
    width: int,
    starts: np.ndarray,
    counts: np.ndarray,
    columns: np.ndarray,
    values: np.ndarray,
    zero: int,
) -> tuple[np.ndarray, np.ndarray]:
    """``(columns, values)``, ``[width, rows]``, of rows that start there; at ``zero`` are zeros."""
    rows = len(starts)
    of_group = _aligned((width, rows), columns.dtype), _aligned((width, rows), values.dtype)
    some = max(1, AT_A_TIME // rows)
    for first in range(0, width, some):
        lines = np.arange(first, min(first + some, width))[:, None]
        at = starts + lines
        np.copyto(at, zero, where=lines >= counts)
        for source, found in zip((columns, values), of_group, strict=True):
            # All are there; "clip" writes straight to out.
            np.take(source, at, out=found[first : first + some], mode="clip")
    return of_group


def _with_zeros(v: np.ndarray, number: int, dtype: Any) -> np.ndarray:
    """A copy, with this many zeros at its end."""
    found = _aligned((len(v) + number,), dtype)
    found[: len(v)], found[len(v) :] = v, 0
    return found


def _aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Empty, and starting where XLA wants it."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def _group_product(columns: jax.Array, values: jax.Array, w: jax.Array) -> jax.Array:
    width, rows = values.shape
    if w.ndim == 2:
        values = values[..., None]
    total = jnp.zeros((rows, *w.shape[1:]), jnp.result_type(values, w))
    if width <= LINES:
        return _add_lines(total, columns, values, w)
    if rows < FEW_ROWS:
        return total + jnp.sum(gather(w, columns) * values, axis=0)

    def some(i: jax.Array, total: jax.Array) -> jax.Array:
        take = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=i * LINES)
        return _add_lines(total, take(columns, slice_size=LINES), take(values, slice_size=LINES), w)

    return jax.lax.fori_loop(0, width // LINES, some, total)


def _add_lines(total: jax.Array, columns: jax.Array, values: jax.Array, w: jax.Array) -> jax.Array:
    for line in range(len(columns)):
        total = total + gather(w, columns[line]) * values[line]
    return total


def group_width(counts: np.ndarray) -> np.ndarray:
    """The least of 0, 1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 256, 512, … that is not below."""
    power = 2 ** np.ceil(np.log2(np.maximum(counts, 1))).astype(np.int64)
    half_way = power * 3 // 4
    powers = np.where((power >= 32) & (power <= 128) & (counts <= half_way), half_way, power)
    return np.where(counts == 0, 0, powers)


def _joined(widths: np.ndarray) -> np.ndarray:
    """Groups of few rows put to the next wider one, if that stores at most a fiftieth more."""
    widths, stored = widths.copy(), widths.sum()
    for width, wider in itertools.pairwise(_kinds(widths)):
        rows = np.flatnonzero(widths == width)
        if len(rows) < FEW_ROWS and len(rows) * (wider - width) <= stored / 50:
            widths[rows] = wider
    return widths


def _kinds(widths: np.ndarray) -> np.ndarray:
    """Those that occur, in order."""
    return np.flatnonzero(np.bincount(widths))
