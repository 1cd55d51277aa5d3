"""The samples of a linear model, ``X [n, d]``: dense, or sparse and never densified.

Both are pytrees with the same methods, which work under ``jit``. ``w`` is ``[d]`` or, with several
outputs, ``[d, outputs]``; ``v`` is ``[n]`` or ``[n, outputs]``.

Sparse rows are packed by rows and by columns (``packed.py``), so that both products are gathers
and sums, and the transpose costs nothing.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse

from jdml.models.linear.packed import Link, Packed, gather, pack, same

GRAM_ROWS = 1024
"""Rows of which a sparse Gram matrix is summed at a time."""


@functools.partial(jax.tree_util.register_dataclass, data_fields=["x"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Dense:
    """``x [n, d]``; made by :func:`as_rows`, which checks."""

    x: jax.Array

    @property
    def shape(self) -> tuple[int, int]:
        n, d = self.x.shape
        return n, d

    @property
    def dtype(self) -> Any:
        return self.x.dtype

    @property
    def T(self) -> "Dense":
        """``Xᵀ``, whose rows are the columns."""
        return Dense(self.x.T)

    def matvec(self, w: jax.Array) -> jax.Array:
        """``X w``."""
        return self.x @ w

    def rmatvec(self, v: jax.Array) -> jax.Array:
        """``Xᵀ v``."""
        # Read row by row, which for one vector takes a third of what x.T @ v takes on a CPU.
        return v @ self.x if v.ndim == 1 else self.x.T @ v

    def squared_norms(self) -> jax.Array:
        """``|x_i|²``, ``[n]``."""
        return jnp.einsum("ij,ij->i", self.x, self.x)

    def gram(self, weights: jax.Array) -> jax.Array:
        """``Xᵀ diag(weights) X``, ``[d, d]``; weights ``[n]``."""
        return self.x.T @ (self.x * weights[:, None])

    def take(self, samples: jax.Array) -> "Dense":
        """The rows of these numbers, ``[b]``, as rows."""
        return Dense(self.x[samples])

    def products(self) -> jax.Array:
        """``X Xᵀ``, ``[n, n]``."""
        return self.x @ self.x.T

    def in_turn(self) -> "Dense":
        """For loops over samples: ``dot`` and ``add``, and no array that these do not read."""
        return self

    def dot(self, sample: jax.Array, w: jax.Array, through: Link = same) -> jax.Array:
        """``x_iᵀ through(w)`` of one sample's number; ``through`` works element by element.

        This and ``add`` read one row, and a loop that holds nothing else becomes one kernel on a
        CPU.
        """
        return jnp.sum(_row(self.x, sample) * through(w))

    def dot_of(self, sample: jax.Array, f: Callable[..., jax.Array], *vectors: Any) -> jax.Array:
        """``x_iᵀ f(*vectors)``, f element by element; computed where x_i may not be 0."""
        return self.x[sample] @ f(*vectors)

    def square(self) -> "Dense":
        """Every element squared."""
        return Dense(self.x * self.x)

    def add(self, w: jax.Array, sample: jax.Array, scale: jax.Array) -> jax.Array:
        """``w + scale x_i`` of one sample's number; ``w`` is ``[d]``."""
        return w + scale * _row(self.x, sample)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["by_row", "by_column"], meta_fields=["shape"]
)
@dataclasses.dataclass(frozen=True)
class Sparse:
    """Sparse rows; made by :func:`as_rows`. Methods as :class:`Dense`."""

    by_row: Packed
    by_column: Packed
    shape: tuple[int, int]

    @property
    def dtype(self) -> Any:
        return self.by_row.values.dtype

    @property
    def T(self) -> "Sparse":
        """``Xᵀ``; costs nothing."""
        return Sparse(self.by_column, self.by_row, self.shape[::-1])

    def matvec(self, w: jax.Array) -> jax.Array:
        return self.by_row.product(w)

    def rmatvec(self, v: jax.Array) -> jax.Array:
        return self.by_column.product(v)

    def squared_norms(self) -> jax.Array:
        return self.by_row.sums_of_squares()

    def gram(self, weights: jax.Array) -> jax.Array:
        """As of Dense; ``GRAM_ROWS`` rows at a time are spread out to ``[rows, d]``."""
        n, d = self.shape
        size = min(GRAM_ROWS, n)
        numbers = jnp.arange(-(-n // size) * size).reshape(-1, size)

        def more(total, samples):
            part = self.take(jnp.minimum(samples, n - 1))
            x = jnp.zeros((size, d), self.dtype)
            x = x.at[jnp.arange(size)[:, None], part.columns].add(part.values)
            heavy = jnp.where(samples < n, gather(weights, jnp.minimum(samples, n - 1)), 0)
            return total + x.T @ (x * heavy[:, None]), None

        return jax.lax.scan(more, jnp.zeros((d, d), self.dtype), numbers)[0]

    def take(self, samples: jax.Array) -> "Taken":
        return Taken(*jax.vmap(self.by_row.row)(samples), self.shape[1])

    def in_turn(self) -> Packed:
        return dataclasses.replace(self.by_row, groups=(), places=None)

    def dot(self, sample: jax.Array, w: jax.Array, through: Link = same) -> jax.Array:
        return self.by_row.dot(sample, w, through)

    def dot_of(self, sample: jax.Array, f: Callable[..., jax.Array], *vectors: Any) -> jax.Array:
        columns, values = self.by_row.row(sample)
        return values @ f(*(gather(vector, columns) for vector in vectors))

    def square(self) -> "Sparse":
        return Sparse(self.by_row.square(), self.by_column.square(), self.shape)

    def add(self, w: jax.Array, sample: jax.Array, scale: jax.Array) -> jax.Array:
        return self.by_row.add(w, sample, scale)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["columns", "values"], meta_fields=["num_columns"]
)
@dataclasses.dataclass(frozen=True)
class Taken:
    """Some of the sparse rows, ``columns`` and ``values`` ``[b, widest row]``."""

    columns: jax.Array
    values: jax.Array
    num_columns: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape[0], self.num_columns

    @property
    def dtype(self) -> Any:
        return self.values.dtype

    def matvec(self, w: jax.Array) -> jax.Array:
        values = self.values[..., None] if w.ndim == 2 else self.values
        return jnp.sum(gather(w, self.columns) * values, axis=1)

    def rmatvec(self, v: jax.Array) -> jax.Array:
        values = self.values[..., None] if v.ndim == 2 else self.values
        total = jnp.zeros((self.num_columns, *v.shape[1:]), self.dtype)
        return total.at[self.columns].add(values * v[:, None], mode="promise_in_bounds")

    def squared_norms(self) -> jax.Array:
        return jnp.sum(self.values**2, axis=1)

    def products(self) -> jax.Array:
        """``X Xᵀ``, ``[b, b]``; one row at a time is spread out to ``[d]``."""

        def one(row):
            columns, values = row
            spread = jnp.zeros(self.num_columns, self.dtype)
            return self.matvec(spread.at[columns].add(values, mode="promise_in_bounds"))

        return jax.lax.map(one, (self.columns, self.values))


Rows = Dense | Sparse


def as_rows(x: Any, name: str = "X") -> Rows:
    """Rows of an array, of a SciPy sparse matrix or array, or of rows, checked.

    Args:
      x: ``[n, d]``, f32 or f64 (whole numbers become JAX's default float); what is f64 wants a
        session with x64. Entries of a sparse matrix given several times are summed. What has the
        methods of rows, such as a stream's ``StreamedRows``, is taken as it is.
      name: What messages call it.

    Raises:
      ValueError: wrong shape or dtype, f64 without x64, or rows with NaN or infinity, whose numbers
        are given.
    """
    if isinstance(x, (Dense, Sparse)) or hasattr(x, "squared_norms"):
        return x
    if scipy.sparse.issparse(x):
        matrix = scipy.sparse.csr_array(x)
        _check_shape(matrix.shape, name)
        matrix = matrix.astype(float_dtype(matrix.dtype, name), copy=False)
        if not matrix.has_canonical_format or np.count_nonzero(matrix.data) < matrix.nnz:
            matrix = matrix.copy()  # what follows works in place, and x is the caller's
            matrix.sum_duplicates()
            matrix.eliminate_zeros()
        check_finite(matrix, name)
        by_column = scipy.sparse.csr_array(matrix.T)
        return jax.device_put(Sparse(pack(matrix), pack(by_column), matrix.shape))
    if not isinstance(x, jax.Array):
        x = np.asarray(x)
    _check_shape(x.shape, name)
    dtype = float_dtype(x.dtype, name)
    found = jnp.asarray(x, dtype)
    finite = np.asarray(jnp.isfinite(found).all(axis=1))
    if not finite.all():
        _refuse_rows(np.flatnonzero(~finite), name)
    return Dense(found)


def check_finite(x: np.ndarray | scipy.sparse.csr_array, name: str = "X") -> None:
    """Raises ``ValueError`` with the numbers of the rows, ``[n, d]``, that have NaN or infinity."""
    if isinstance(x, np.ndarray):
        finite = np.isfinite(x)
        bad = np.zeros(0) if finite.all() else np.flatnonzero(~finite.all(axis=1))
    else:
        number_of = np.repeat(np.arange(x.shape[0]), np.diff(x.indptr))
        bad = np.unique(number_of[~np.isfinite(x.data)])
    if bad.size:
        _refuse_rows(bad, name)


def float_dtype(dtype: Any, name: str) -> Any:
    """The dtype in which numbers of this one are kept; raises for f64 without x64."""
    default = jnp.zeros(()).dtype
    dtype = np.dtype(dtype)
    if dtype.kind in "biu":
        return default
    if dtype == np.float64 and default != np.float64:
        raise ValueError(
            f"{name} is float64, and this session of JAX has no float64. Switch it on with "
            'jax.config.update("jax_enable_x64", True), work within `with jax.enable_x64():`, or '
            f"give {name}.astype(np.float32)."
        )
    if dtype not in (np.float32, np.float64):
        raise ValueError(f"{name} has dtype {dtype}; expected float32 or float64.")
    return dtype


def _row(x: jax.Array, sample: jax.Array) -> jax.Array:
    sample = jnp.asarray(sample, jnp.uint32)
    return jax.lax.dynamic_slice(x, (sample, jnp.uint32(0)), (1, x.shape[1]))[0]


def _check_shape(shape: tuple[int, ...], name: str) -> None:
    if len(shape) != 2 or 0 in shape:
        raise ValueError(
            f"{name} has shape {tuple(shape)}; expected [samples, features], at least one of each."
        )


def _refuse_rows(numbers: np.ndarray, name: str) -> None:
    shown = ", ".join(map(str, numbers[:10])) + (", …" if len(numbers) > 10 else "")
    raise ValueError(
        f"{name} has NaN or infinity in {len(numbers)} rows: {shown}. Leave these rows out or "
        "impute what is missing."
    )
