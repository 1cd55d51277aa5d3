"""A leaf of any number of dims as matrices, without moving an element."""

import math
from typing import NamedTuple

import jax

from jdml.communicate.codecs.orthogonalise import product


class MatrixView(NamedTuple):
    """A leaf of this shape as ``shape[:stack]`` matrices, ``shape[stack:split]`` by the rest.

    Factors have the rank before the long dims: left ones ``[*stack, rank, *rows]``, right ones
    ``[*stack, rank, *columns]``.
    """

    shape: tuple[int, ...]
    stack: int
    split: int

    @property
    def num_matrices(self) -> int:
        return math.prod(self.shape[: self.stack])

    @property
    def num_rows(self) -> int:
        return math.prod(self.shape[self.stack : self.split])

    @property
    def num_columns(self) -> int:
        return math.prod(self.shape[self.split :])

    def right_shape(self, rank: int) -> tuple[int, ...]:
        return (*self.shape[: self.stack], rank, *self.shape[self.split :])

    def left(self, matrix: jax.Array, right: jax.Array) -> jax.Array:
        """``(M Q)^T``."""
        columns = range(self.split, len(self.shape))
        return product(right, matrix, self.stack, range(self.stack + 1, right.ndim), columns)

    def right(self, matrix: jax.Array, left: jax.Array) -> jax.Array:
        """``P^T M``."""
        rows = range(self.stack, self.split)
        return product(left, matrix, self.stack, range(self.stack + 1, left.ndim), rows)

    def outer(self, left: jax.Array, right: jax.Array) -> jax.Array:
        """``P Q^T``, in the leaf's shape."""
        return product(left, right, self.stack, [self.stack], [self.stack])


def matrix_view(path: str, shape: tuple[int, ...], stacked: tuple[str, ...]) -> MatrixView | None:
    """The split with fewest rows and columns together; ``None`` for what is no matrix.

    Args:
      path: The leaf's, ``"layers/attention/query/kernel"``.
      shape: The leaf's.
      stacked: Names of components under which the first dim counts matrices.
    """
    stack = 1 if _is_stacked(path, stacked) else 0
    if len(shape) < stack + 2 or 0 in shape:
        return None
    views = [MatrixView(shape, stack, split) for split in range(stack + 1, len(shape))]
    return min(views, key=lambda view: view.num_rows + view.num_columns)


def _is_stacked(path: str, stacked: tuple[str, ...]) -> bool:
    """Whether one of the names stands in the path, but not before an index into a list."""
    parts = path.split("/")
    return any(
        part in stacked and not following.isdigit()
        for part, following in zip(parts, [*parts[1:], ""], strict=True)
    )
