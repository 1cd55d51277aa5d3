"""A problem on the workers of a mesh, or divided over simulated ones."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jdml.models.linear.divided import cut
from jdml.models.linear.problem import LinearProblem
from jdml.models.linear.rows import Dense, Sparse

CENTRED = ("l2", "l1", "elastic_net", "l1_ball")
"""Penalties that hold the coordinate of a column of zeros at 0."""


def shard_problem(
    problem: LinearProblem, mesh: Mesh, samples: str | None = None, features: str | None = None
) -> LinearProblem:
    """The problem with its rows on a mesh, for any solver that takes whole passes.

    Dense rows are one array ``[n, d]`` with the sharding ``P(samples, features)``, and the compiler
    inserts the reductions: a product ``X w`` sends partial margins, n/S numbers along the axis of
    features (S workers on that of samples); ``Xᵀ v`` sends partial gradients, d/F along the axis of
    samples; a Hessian ``d²``. Sparse rows are packed by blocks (:class:`Divided`) and send the
    same. An all-reduce of x bytes among K workers sends ``2 (K-1)/K x`` from each.

    Where S does not divide n, rows of zeros with weight 0 fill up; where F does not divide d,
    columns of zeros follow the last, whose coordinates stay 0: the answer is ``w[:d]``.

    Methods that take samples or columns one by one (SGD, SAGA, SDCA, …) are refused: each would be
    an exchange over the mesh. Those of ``jdml.aggregate.linear`` keep to a worker's own, with
    :func:`divide`.

    Args:
      problem: Dense or sparse rows, on one device.
      mesh: With the axes that follow.
      samples: Axis of the samples.
      features: Axis of the columns; one of both at least.

    Raises:
      ValueError: an axis is not the mesh's, or the mesh has others; more workers than rows or
        columns; columns of zeros under a penalty that does not hold their coordinates at 0.
    """
    grid = tuple(1 if axis is None else _size(mesh, axis) for axis in (samples, features))
    if samples is None and features is None:
        raise ValueError(
            f"shard_problem: neither samples nor features names an axis of {mesh.axis_names}; "
            "expected one of both at least."
        )
    if samples == features:
        raise ValueError(f"shard_problem: samples and features are both {samples!r}.")
    idle = [a for a in mesh.axis_names if mesh.shape[a] > 1 and a not in (samples, features)]
    if idle:
        # L-BFGS was seen to wait for ever on 4 × 2 simulated devices, two copies of each worker.
        raise ValueError(
            f"shard_problem: the mesh's axes {idle} divide neither samples nor features; expected "
            "a mesh of those that do, such as make_mesh({'data': 4}, devices=jax.devices()[:4])."
        )
    if isinstance(problem.rows, Sparse):
        return _divided(problem, "shard_problem", grid, mesh, (samples, features), None, None)
    places, columns = _layout("shard_problem", problem, grid, None, None)
    dense: Any = problem.rows
    x = np.asarray(dense.x)
    x = np.pad(x, ((0, 0), (0, columns.size - x.shape[1])))
    order = places.ravel()
    x = np.where((order >= 0)[:, None], x[order], 0)
    rows = Dense(jax.device_put(x, NamedSharding(mesh, P(samples, features))))
    return _on(problem, rows, places, mesh, samples)


def divide(
    problem: LinearProblem,
    samples: str | int = 1,
    features: str | int = 1,
    *,
    mesh: Mesh | None = None,
    parts: Sequence[npt.ArrayLike] | None = None,
    feature_parts: Sequence[npt.ArrayLike] | None = None,
) -> LinearProblem:
    """The problem in blocks, for the methods of ``jdml.aggregate.linear``.

    Args:
      problem: Dense or sparse rows, on one device.
      samples: A mesh axis, each of whose workers has a part of the samples; or a number of
        simulated workers, on one device and without a mesh. 1: not divided by sample.
      features: The same of the columns.
      mesh: Where the axes are.
      parts: Which samples each worker has, as ``jdml.partition`` gives them; by default blocks of
        neighbours. Each is filled up to the largest with rows of zeros, of weight 0.
      feature_parts: Which columns each worker has; by default blocks of neighbours. Sparse columns
        are worth balancing by their non-zeros, ``jdml.partition.balanced_features``; parts are then
        of several sizes, and columns of zeros fill them up.

    Returns:
      The problem with :class:`Divided` rows; samples and columns in the order of the parts, those
      that were added included. ``divided.rows.in_order(w)`` are the weights of X's own columns.

    Raises:
      ValueError: as shard_problem; simulated workers on a mesh; parts that are no division.
    """
    named = [part for part in (samples, features) if isinstance(part, str)]
    if named and mesh is None:
        raise ValueError(f"divide: {named} are mesh axes; give the mesh, or numbers of workers.")
    if mesh is not None and (not named or {samples, features} - {*named, 1}):
        raise ValueError(
            f"divide(samples={samples!r}, features={features!r}): with a mesh, expected its axes "
            f"{mesh.axis_names}, or 1 for what is not divided."
        )
    if samples == features and named:
        raise ValueError(f"divide: samples and features are both {samples!r}.")
    if isinstance(samples, str) or isinstance(features, str):
        assert mesh is not None
        grid = tuple(_size(mesh, p) if isinstance(p, str) else p for p in (samples, features))
    else:
        grid = (samples, features)
    axes = tuple(part if isinstance(part, str) else None for part in (samples, features))
    return _divided(problem, "divide", grid, mesh, axes, parts, feature_parts)


def _divided(problem, caller, grid, mesh, axes, parts, feature_parts) -> LinearProblem:
    places, columns = _layout(caller, problem, grid, parts, feature_parts)
    rows: Any = problem.rows
    return _on(problem, cut(rows, places, columns, mesh, axes), places, mesh, axes[0])


def _on(
    problem: LinearProblem, rows: Any, places: np.ndarray, mesh: Mesh | None, samples: str | None
) -> LinearProblem:
    order = places.ravel()
    weight = np.asarray(problem.sample_weight)
    # Its mean over all rows, those of weight 0 included, is to be 1.
    weight = np.where(order >= 0, weight[order], 0) * (order.size / problem.num_samples)
    leaves = [np.asarray(problem.y)[order], weight.astype(weight.dtype)]
    if mesh is None:
        y, s = map(jnp.asarray, leaves)
    else:
        y, s = jax.device_put(leaves, NamedSharding(mesh, P(samples)))
    return problem.replace(rows=rows, y=y, sample_weight=s.astype(problem.dtype))


def _layout(
    caller: str,
    problem: LinearProblem,
    grid: tuple[int, ...],
    parts: Sequence[npt.ArrayLike] | None,
    feature_parts: Sequence[npt.ArrayLike] | None,
) -> tuple[np.ndarray, np.ndarray]:
    """The row at each place, ``[S, n_s]``, and the column, ``[F, d_f]``; -1 where zeros fill up."""
    if not isinstance(problem.rows, (Dense, Sparse)):
        raise ValueError(
            f"{caller}: rows of type {type(problem.rows).__name__}; expected Dense or Sparse ones, "
            "in memory and not divided yet."
        )
    n, d = problem.rows.shape
    for num, what, size in ((n, "rows", grid[0]), (d, "columns", grid[1])):
        if size < 1:
            raise ValueError(f"{caller}: {size} workers; expected at least one.")
        if size > num:
            raise ValueError(
                f"{caller}: {size} workers and {num} {what}; everybody needs at least one. Take at "
                f"most {num} workers, or divide the other way."
            )
    if parts is None:
        places = _filled_up(np.array_split(np.arange(n), grid[0]))
    else:
        places = _filled_up(_checked_parts(caller, parts, grid[0], n, "rows"))
    if feature_parts is None:
        # Only after the last, so that the answer is w[:d] whether it is asked for its order or not.
        wide = -(-d // grid[1])
        number = np.arange(wide * grid[1]).reshape(grid[1], wide)
        columns = np.where(number < d, number, -1)
    else:
        columns = _filled_up(_checked_parts(caller, feature_parts, grid[1], d, "columns"))
    if columns.size > d and problem.penalty.name not in CENTRED:
        raise ValueError(
            f"{caller}: {grid[1]} workers do not have equally many of {d} columns, and columns of "
            f"zeros may only be added with a penalty of {', '.join(CENTRED)}; this one is "
            f"{problem.penalty.name}. Take a number of workers that divides, or such a penalty."
        )
    return places, columns


def _checked_parts(
    caller: str, parts: Sequence[npt.ArrayLike], num_parts: int, size: int, what: str
) -> list[np.ndarray]:
    found = [np.asarray(part, np.int64).ravel() for part in parts]
    numbers = np.concatenate(found) if found else np.zeros(0, np.int64)
    if len(found) != num_parts or not np.array_equal(np.sort(numbers), np.arange(size)):
        raise ValueError(
            f"{caller}: {len(found)} parts; expected {num_parts}, in which each of {size} {what} "
            "is in one."
        )
    return found


def _filled_up(parts: Sequence[np.ndarray]) -> np.ndarray:
    """``[number, most]``, -1 past the end of each."""
    most = max(map(len, parts))
    return np.stack([np.pad(p, (0, most - len(p)), constant_values=-1) for p in parts])


def _size(mesh: Mesh, axis: str) -> int:
    if axis not in mesh.shape:
        raise ValueError(f"the mesh has no axis {axis!r}; its axes are {tuple(mesh.shape)}.")
    return mesh.shape[axis]
