"""Rows cut into blocks, by sample, by feature, or both: what each of several workers has.

Block ``(s, f)`` of a grid ``S × F`` has the s-th part of the samples and the f-th of the columns.
All are of one shape and stand in one pytree with two dims more, ``[S, F, ...]``. On a mesh these
are sharded, a block on each device, and what must be summed is summed by one all-reduce each:

- ``matvec``: partial margins ``X_sf w_f``, over the axis of the features;
- ``rmatvec``: partial gradients ``X_sfᵀ v_s``, over the axis of the samples.

Without a mesh the blocks stand side by side on one device: workers are simulated.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jdml.models.linear.packed import Packed, group_width
from jdml.models.linear.rows import Dense, Sparse


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["blocks", "columns"],
    meta_fields=["shape", "grid", "mesh", "axes"],
)
@dataclasses.dataclass(frozen=True)
class Divided:
    """Methods as :class:`Dense`, for whole passes; no sample is taken by itself.

    Attributes:
      blocks: Rows whose leaves have ``[S, F]`` in front.
      columns: int32 ``[F, d/F]``, the column of X that stands at each place; -1 for one of zeros.
      shape: ``(n, d)`` of all, what fills blocks up included.
      grid: ``(S, F)``.
      mesh: Where; None on one device.
      axes: Mesh axes of the samples and of the features, None where not divided.
    """

    blocks: Any
    columns: jax.Array
    shape: tuple[int, int]
    grid: tuple[int, int]
    mesh: Mesh | None
    axes: tuple[str | None, str | None]

    @property
    def dtype(self) -> Any:
        return self.blocks.dtype

    def matvec(self, w: jax.Array) -> jax.Array:
        """``X w``. Travels: n/S margins (times outputs), summed along the axis of features."""
        return self._product(w, 1)

    def rmatvec(self, v: jax.Array) -> jax.Array:
        """``Xᵀ v``. Travels: d/F numbers (times outputs), summed along the axis of samples."""
        return self._product(v, 0)

    def squared_norms(self) -> jax.Array:
        """``|x_i|²``, ``[n]``. Travels: as matvec."""
        return self._sum(lambda block: block.squared_norms(), 1)

    def square(self) -> "Divided":
        return dataclasses.replace(self, blocks=self.blocks.square())

    def gram(self, weights: jax.Array) -> jax.Array:
        """As of Dense, of rows divided by sample. Travels: d² numbers."""
        if self.grid[1] > 1:
            raise ValueError(
                f"gram: these rows are divided into {self.grid[1]} parts by feature, and no worker "
                "has two columns of different parts. Take newton_cg or lbfgs, or divide by sample."
            )
        return self._sum(lambda block, weights: block.gram(weights), 0, weights)

    def each(
        self, f: Callable[..., Any], parts: Sequence[Any] = (), shared: Sequence[Any] = ()
    ) -> Any:
        """``f(block, *parts, *shared)`` of every block, for rows divided one way, on its device.

        Args:
          f: Sees one worker's rows and its part of ``parts``.
          parts: Pytrees whose leaves are ``[K, ...]``, a row for each of the K blocks.
          shared: Pytrees that all of them see.

        Returns:
          What f returned, ``[K, ...]``, a row on each device. Nothing travels.
        """
        num_blocks = self.grid[0] * self.grid[1]
        assert num_blocks == max(self.grid), self.grid
        blocks = jax.tree.map(lambda x: x.reshape(num_blocks, *x.shape[2:]), self.blocks)
        if self.mesh is None:
            if num_blocks == 1:
                return _put_in_front(f(*_first((blocks, *parts)), *shared))
            # One after the other: loops within f stay loops, and branches branches.
            return jax.lax.map(lambda own: f(*own, *shared), (blocks, *parts))

        def local(own: Any, shared: Any) -> Any:
            return _put_in_front(f(*_first(own), *shared))

        spec = P(self.axes[0] or self.axes[1])
        on_mesh = jax.shard_map(
            local, mesh=self.mesh, in_specs=(spec, P()), out_specs=spec, check_vma=False
        )
        return on_mesh((blocks, *parts), tuple(shared))

    def parts(self, v: jax.Array) -> jax.Array:
        """``v`` of all samples, or of all columns where these are divided, as ``[K, ...]``."""
        return v.reshape(max(self.grid), -1, *v.shape[1:])

    def in_order(self, w: jax.Array) -> np.ndarray:
        """``w`` of these columns as that of X's own, ``[d]`` or ``[d, outputs]``, in X's order."""
        columns = np.asarray(self.columns).ravel()
        found = np.asarray(w)[columns >= 0]
        return found[np.argsort(columns[columns >= 0])]

    def _product(self, v: jax.Array, over: int) -> jax.Array:
        def one(block: Any, v: jax.Array) -> jax.Array:
            return block.matvec(v) if over else block.rmatvec(v)

        return self._sum(one, over, v)

    def _sum(self, f: Callable[..., jax.Array], over: int, *args: jax.Array) -> jax.Array:
        """``f(block, part)``, summed over a dim of the grid; parts are of that dim.

        What is left of the grid is joined with the first dim of what f returns; a Gram matrix of
        rows divided by sample has nothing left.
        """
        cut = [v.reshape(self.grid[over], -1, *v.shape[1:]) for v in args]
        if self.mesh is None:
            blocks = jax.tree.map(lambda x: jnp.moveaxis(x, over, 1), self.blocks)
            if max(self.grid) == 1:
                return f(_first(_first(blocks)), *(c[0] for c in cut))
            found = jax.vmap(lambda row: jax.vmap(f)(row, *cut))(blocks)
            return _joined(jnp.sum(found, axis=1))

        def local(blocks: Any, *cut: jax.Array) -> jax.Array:
            part = f(_first(_first(blocks)), *(c[0] for c in cut))
            axis = self.axes[over]
            return (part if axis is None else jax.lax.psum(part, axis))[None]

        on_mesh = jax.shard_map(
            local,
            mesh=self.mesh,
            in_specs=(P(*self.axes), *(P(self.axes[over]) for _ in cut)),
            out_specs=P(self.axes[1 - over]),
            check_vma=False,
        )
        return _joined(on_mesh(self.blocks, *cut))


def _first(tree: Any) -> Any:
    return jax.tree.map(lambda x: x[0], tree)


def _put_in_front(tree: Any) -> Any:
    return jax.tree.map(lambda x: x[None], tree)


def _joined(x: jax.Array) -> jax.Array:
    return x.reshape(-1, *x.shape[2:])


def cut(
    rows: Dense | Sparse,
    places: np.ndarray,
    columns: np.ndarray,
    mesh: Mesh | None,
    axes: tuple[str | None, str | None],
) -> Divided:
    """Rows in blocks.

    Args:
      rows: X ``[n, d]``.
      places: ``[S, n_s]``: the row that stands at each place, -1 for a row of zeros.
      columns: ``[F, d_f]``: the column that stands at each place, -1 for one of zeros.
      mesh, axes: As :class:`Divided`.
    """
    blocks: Dense | Sparse
    if isinstance(rows, Dense):
        blocks = _cut_dense(rows, places, columns)
    else:
        blocks = _cut_sparse(rows, places, columns)
    number = columns.astype(np.int32)
    if mesh is not None:
        blocks = jax.device_put(blocks, NamedSharding(mesh, P(*axes)))
        number = jax.device_put(number, NamedSharding(mesh, P(axes[1])))
    else:
        blocks, number = jax.tree.map(jnp.asarray, (blocks, number))
    grid = len(places), len(columns)
    return Divided(blocks, number, (places.size, columns.size), grid, mesh, axes)


def _cut_dense(rows: Dense, places: np.ndarray, columns: np.ndarray) -> Dense:
    x = np.pad(np.asarray(rows.x), ((0, 1), (0, 1)))  # the last row and column stand for -1
    found = x[places.ravel()][:, columns.ravel()].reshape(*places.shape, *columns.shape)
    return Dense(np.ascontiguousarray(found.transpose(0, 2, 1, 3)))  # type: ignore[arg-type]


def _cut_sparse(rows: Sparse, places: np.ndarray, columns: np.ndarray) -> Sparse:
    matrix = to_csr(rows)
    # Those past the last row and column are empty, and stand for -1.
    n, d = matrix.shape
    matrix.resize((n + 1, d + 1))
    places, columns = np.where(places < 0, n, places), np.where(columns < 0, d, columns)
    strips = [matrix[own] for own in places]
    blocks = [strip[:, own] for strip in strips for own in columns]
    shape = (places.shape[1], columns.shape[1])
    by_row = pack_alike([scipy.sparse.csr_array(b) for b in blocks])
    by_column = pack_alike([scipy.sparse.csr_array(b.T) for b in blocks])
    grid = len(places), len(columns)
    stacked = Sparse(by_row, by_column, shape)
    return jax.tree.map(lambda x: x.reshape(*grid, *x.shape[1:]), stacked)


def to_csr(rows: Sparse) -> scipy.sparse.csr_array:
    """What was packed."""
    counts = np.asarray(rows.by_row.counts)
    indptr = np.concatenate([[0], np.cumsum(counts)])
    content = np.asarray(rows.by_row.values)[: indptr[-1]]
    columns = np.asarray(rows.by_row.columns)[: indptr[-1]]
    return scipy.sparse.csr_array((content, columns, indptr), shape=rows.shape)


def pack_alike(matrices: Sequence[scipy.sparse.csr_array]) -> Packed:
    """As ``pack`` each, leaves ``[number, ...]``: groups are of the most rows that any needs."""
    most_counts = [np.diff(m.indptr).astype(np.int64) for m in matrices]
    widths = [group_width(counts) for counts in most_counts]
    kinds = np.unique(np.concatenate(widths))
    sizes = {kind: max(int((w == kind).sum()) for w in widths) for kind in kinds}
    most = max(1, *(int(counts.max()) for counts in most_counts))
    length = max(m.nnz for m in matrices) + most
    packed = []
    for matrix, counts, wide in zip(matrices, most_counts, widths, strict=True):
        columns = np.pad(matrix.indices.astype(np.int32), (0, length - matrix.nnz))
        values = np.pad(matrix.data, (0, length - matrix.nnz))
        places = np.empty(len(counts), np.int32)
        groups, offset = [], 0
        for kind, size in sizes.items():
            rows = np.flatnonzero(wide == kind)
            places[rows] = offset + np.arange(len(rows))
            offset += size
            lines = np.arange(kind)[:, None]
            there = lines < counts[rows]
            at = np.where(there, matrix.indptr[rows] + lines, 0)
            fill = ((0, 0), (0, size - len(rows)))
            groups.append(
                (
                    np.pad(np.where(there, columns[at], 0), fill),
                    np.pad(np.where(there, values[at], 0).astype(matrix.dtype), fill),
                )
            )
        starts = matrix.indptr[:-1].astype(np.int32 if length < 2**31 else np.int64)
        leaves: Any = columns, values, starts, counts.astype(np.int32), places, tuple(groups)
        packed.append(Packed(*leaves, most))  # type: ignore[call-arg]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *packed)
