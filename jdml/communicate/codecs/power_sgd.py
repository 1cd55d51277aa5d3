"""PowerSGD: the mean of matrices from the mean of two thin factors, by a step of power iteration.

The rank is the first dim of each factor: the long dim of a thin array is then contiguous, which
XLA's CPU products need (the other way round, one took 30 times as long) and TPU's tiles waste less.
Nothing is reshaped, so that a leaf divided over other mesh axes stays where it is: the thin factors
alone are summed over those axes.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jdml.communicate.branch import choose, first_branch
from jdml.communicate.codecs.matrix_view import MatrixView, matrix_view
from jdml.communicate.codecs.orthogonalise import orthonormal_rows, unit_rows
from jdml.communicate.codecs.reducer import Reducer
from jdml.communicate.joined import joined_mean
from jdml.sharding.paths import leaves_with_paths

PyTree = Any
Axis = str | tuple[str, ...]

_FRESH = 1e-3
"""Length of what is drawn anew each round and added to the rows, of length 1, of a kept factor."""


class PowerSgdState(NamedTuple):
    """State of :func:`power_sgd`.

    Attributes:
      steps: int32, rounds so far.
      residual: What this worker's matrices still owe, f32, per worker; ``()`` for an exact leaf.
      factors: The last round's right factors, f32 ``[*stack, rank, *columns]``, the same on every
        worker; ``()`` for an exact leaf, and for all of them without ``warm_start``.
      metrics: With ``start_step``, whether the last round was compressed.
    """

    steps: jax.Array
    residual: PyTree
    factors: PyTree
    metrics: dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class PowerSgd(Reducer):
    """See :func:`power_sgd`."""

    rank: int
    warm_start: bool = True
    min_ratio: float = 2.0
    start_step: int = 0
    stacked: tuple[str, ...] = ("layers",)

    def __post_init__(self) -> None:
        if not _is_int(self.rank) or self.rank < 1:
            raise ValueError(
                f"power_sgd(rank={self.rank!r}): expected an int >= 1, the number of columns of "
                "each factor; 4 is a good start."
            )
        if not isinstance(self.min_ratio, (int, float)) or not 0 <= self.min_ratio < math.inf:
            raise ValueError(
                f"power_sgd(min_ratio={self.min_ratio!r}): expected a number >= 0, how many times "
                "fewer numbers the factors of a matrix must hold than it does; 2 is the default."
            )
        if not _is_int(self.start_step) or self.start_step < 0:
            raise ValueError(
                f"power_sgd(start_step={self.start_step!r}): expected an int >= 0, the number of "
                "exact rounds before the first compressed one."
            )
        if not isinstance(self.stacked, tuple) or not all(_is_name(s) for s in self.stacked):
            raise ValueError(
                f"power_sgd(stacked={self.stacked!r}): expected a tuple of components of leaf "
                "paths, such as ('layers',), or () if no leaf holds several matrices."
            )
        object.__setattr__(self, "needs_key", not self.warm_start)

    def view(self, path: str, leaf: Any) -> MatrixView | None:
        """The matrices that a leaf is compressed as; ``None`` if it travels exactly.

        Raises:
          ValueError: they would be compressed and have no such rank.
        """
        view = matrix_view(path, tuple(leaf.shape), self.stacked)
        if view is None:
            return None
        n, m = view.num_rows, view.num_columns
        if (n + m) * self.rank * self.min_ratio >= n * m:
            return None
        if self.rank > min(n, m):
            raise ValueError(
                f"power_sgd(rank={self.rank}, min_ratio={self.min_ratio}): leaf {path!r} "
                f"{list(leaf.shape)} is taken as {n} × {m}, whose rank is at most {min(n, m)}. "
                "Lower the rank, or raise min_ratio: from 1 on, such a matrix travels exactly."
            )
        return view

    def num_elements(self, tree: PyTree) -> int:
        """How many f32 numbers a compressed round's all-reduces hold, for trees like ``tree``."""
        total = 0
        for path, leaf in leaves_with_paths(tree):
            view = self.view(path, leaf)
            if view is None:
                total += math.prod(leaf.shape)
            else:
                total += view.num_matrices * self.rank * (view.num_rows + view.num_columns)
        return total

    def init(self, tree: PyTree) -> PowerSgdState:
        leaves, treedef = _flatten(tree)
        views = self._views(tree)
        residual: list[Any] = [() for _ in leaves]
        factors: list[Any] = [() for _ in leaves]
        for i, view in views.items():
            residual[i] = jnp.zeros_like(leaves[i], dtype=jnp.float32)
            factors[i] = jnp.zeros(view.right_shape(self.rank), jnp.float32)
        return PowerSgdState(
            steps=jnp.zeros((), jnp.int32),
            residual=treedef.unflatten(residual),
            factors=treedef.unflatten(factors) if self.warm_start else (),
            metrics=first_branch("power_sgd") if self.start_step else {},
        )

    def reduce_mean(
        self, tree: PyTree, state: PowerSgdState, axis: Axis, key: jax.Array | None = None
    ) -> tuple[PyTree, PowerSgdState]:
        leaves, treedef = _flatten(tree)
        views = self._views(tree)
        owed = treedef.flatten_up_to(state.residual)
        kept = treedef.flatten_up_to(state.factors) if self.warm_start else None

        def compressed() -> Any:
            return self._round(leaves, owed, kept, views, axis, state.steps, key)

        def exact() -> Any:
            return _rounded(joined_mean([_wide(x) for x in leaves], axis), leaves), owed, kept

        metrics = state.metrics
        if jax.lax.axis_size(axis) == 1:
            tree, state = self.alone(tree, state)
            wide = [_wide(x) for x in jax.tree.leaves(tree)]
            return treedef.unflatten(_rounded(joined_mean(wide, axis), leaves)), state
        if not views:
            means, owed, kept = exact()
        elif self.start_step:
            started = state.steps >= self.start_step
            (means, owed, kept), metrics = choose("power_sgd", started, (exact, compressed))
        else:
            means, owed, kept = compressed()
        return treedef.unflatten(means), PowerSgdState(
            steps=state.steps + 1,
            residual=treedef.unflatten(owed),
            factors=() if kept is None else treedef.unflatten(kept),
            metrics=metrics,
        )

    def alone(self, tree: PyTree, state: PowerSgdState) -> tuple[PyTree, PowerSgdState]:
        leaves, treedef = _flatten(tree)
        owed = treedef.flatten_up_to(state.residual)
        for i in self._views(tree):
            leaves[i] = (_wide(leaves[i]) + owed[i]).astype(leaves[i].dtype)
        residual = jax.tree.map(jnp.zeros_like, state.residual)
        return treedef.unflatten(leaves), state._replace(steps=state.steps + 1, residual=residual)

    def _views(self, tree: PyTree) -> dict[int, MatrixView]:
        """The views of the leaves that are compressed, by their number."""
        views = [self.view(path, leaf) for path, leaf in leaves_with_paths(tree)]
        return {i: view for i, view in enumerate(views) if view is not None}

    def _round(
        self,
        leaves: list[jax.Array],
        owed: list[Any],
        kept: list[Any] | None,
        views: dict[int, MatrixView],
        axis: Axis,
        steps: jax.Array,
        key: jax.Array | None,
    ) -> tuple[list[jax.Array], list[Any], list[Any] | None]:
        """Means, what they owe and the right factors, of one compressed round."""
        numbers, plans = list(views), list(views.values())
        exact = [i for i in range(len(leaves)) if i not in views]
        matrices = [_wide(leaves[i]) + owed[i] for i in numbers]
        rights = self._first_factors(
            [kept[i] for i in numbers] if kept else None, plans, steps, key
        )
        lefts = [v.left(m, q) for v, m, q in zip(plans, matrices, rights, strict=True)]
        # The exact leaves travel with the left factors.
        arrived = joined_mean(lefts + [_wide(leaves[i]) for i in exact], axis)
        means = dict(zip(exact, arrived[len(views) :], strict=True))
        lefts = orthonormal_rows(arrived[: len(views)], [view.stack for view in plans])
        rights = [v.right(m, p) for v, m, p in zip(plans, matrices, lefts, strict=True)]
        rights = joined_mean(rights, axis)
        outers = [v.outer(p, q) for v, p, q in zip(plans, lefts, rights, strict=True)]
        means.update(zip(numbers, outers, strict=True))
        rounded = _rounded([means[i] for i in range(len(leaves))], leaves)

        owed, kept = list(owed), None if kept is None else list(kept)
        for i, matrix, right in zip(numbers, matrices, rights, strict=True):
            owed[i] = _finite(matrix - _wide(rounded[i]))
            if kept is not None:
                kept[i] = _finite(right)
        return rounded, owed, kept

    def _first_factors(
        self,
        kept: list[jax.Array] | None,
        views: list[MatrixView],
        steps: jax.Array,
        key: jax.Array | None,
    ) -> list[jax.Array]:
        """The right factors that a round starts from, the same on every worker."""
        if kept is not None:
            key = jax.random.fold_in(jax.random.key(0), steps)
        assert key is not None, "all_reduce_mean asks for it"
        shapes = [view.right_shape(self.rank) for view in views]
        drawn = jax.random.normal(key, (sum(math.prod(shape) for shape in shapes),))
        factors, start = [], 0
        for view, shape in zip(views, shapes, strict=True):
            stop = start + math.prod(shape)
            factors.append(drawn[start:stop].reshape(shape) / math.sqrt(view.num_columns))
            start = stop
        if kept is None:
            return factors
        # A kept row may be zero or depend on others: on the first round, after a gradient of zeros
        # or of low rank. Nothing but what is drawn would ever bring it back.
        return [
            unit_rows(old, view.stack) + _FRESH * fresh
            for view, old, fresh in zip(views, kept, factors, strict=True)
        ]


def power_sgd(
    rank: int,
    warm_start: bool = True,
    min_ratio: float = 2.0,
    *,
    start_step: int = 0,
    stacked: Sequence[str] = ("layers",),
) -> PowerSgd:
    """Sends two thin factors of each matrix, and feeds back what they leave out.

    With ``M_k = G_k + e_k`` on worker k, one step of power iteration on the mean matrix:
    ``P = orthonormal(mean_k M_k Q)``, ``Q <- mean_k M_k^T P``, and every worker takes
    ``D = P Q^T``, the projection of ``mean_k M_k`` on the columns of P; ``e_k <- M_k - D``. So the
    residuals' mean is what the mean still owes, and a mean matrix of at most this rank is exact.

    A reducer: use it where a codec may stand, ``mean_gradients("data", power_sgd(4))``. A leaf is
    split into rows and columns after the dim that leaves fewest of them together, so a kernel of a
    convolution ``[3, 3, 64, 128]`` is a 576 × 128 matrix. Leaves with fewer dims, and those that
    ``min_ratio`` excludes, travel exactly. Factors and residuals are f32 whatever the leaf is. A
    value that is not finite makes its matrix not finite, and is not kept.

    Args:
      rank: r, the number of columns of each factor. A matrix that is compressed must have as many
        rows and columns.
      warm_start: Whether Q comes from the last round, the power iteration going on from step to
        step, with 0.1 % of a random matrix added; else a new random one each round, which needs a
        key.
      min_ratio: An n × m matrix is compressed only if ``(n + m) r min_ratio < n m``.
      start_step: Number of exact rounds before the first compressed one.
      stacked: Names of path components under which a leaf's first dim counts matrices of their own,
        as where layers are stacked for a scan (``layers/mlp/up/kernel`` ``[layers, n, m]``). Not
        where an index follows (``layers/0/kernel``).

    State kept: an f32 residual per worker and compressed leaf, and Q, the same on every worker.

    Bytes: all-reduces of ``4 r (n + m)`` per matrix and 4 per element of an exact leaf, as in
    PyTorch's communication hook; two collectives, or one more for each leaf of 2^20 elements and
    more that is exact. Over other mesh axes thin factors are summed, no leaf is gathered.

    Raises:
      ValueError: an argument is out of range; on use, ``rank`` is larger than a matrix that is to
        be compressed.

    Reference: Vogels et al., "PowerSGD: Practical Low-Rank Gradient Compression for Distributed
    Optimization", NeurIPS 2019, algorithm 1.
    """
    names = (stacked,) if isinstance(stacked, str) else tuple(stacked)
    return PowerSgd(rank, warm_start, min_ratio, start_step, names)


def _flatten(tree: PyTree) -> tuple[list[Any], Any]:
    return jax.tree.flatten(tree)


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32)


def _rounded(means: list[jax.Array], leaves: list[jax.Array]) -> list[jax.Array]:
    return [mean.astype(leaf.dtype) for mean, leaf in zip(means, leaves, strict=True)]


def _finite(x: jax.Array) -> jax.Array:
    return jnp.where(jnp.isfinite(x), x, 0)


def _is_int(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool)


def _is_name(x: Any) -> bool:
    return isinstance(x, str) and bool(x) and "/" not in x
