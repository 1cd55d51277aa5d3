"""What a mixing matrix is refused for: sums, signs, workers that never hear of each other."""

import math
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.float64]

TOLERANCE = 1e-9
"""Greatest difference of a sum from 1: what rounding leaves of thousands of f64 weights."""


def is_symmetric(matrix: Matrix) -> bool:
    """Up to rounding."""
    return bool(np.all(np.abs(matrix - matrix.T) <= TOLERANCE))


def check_stochastic(matrix: Matrix, directed: bool, name: str) -> None:
    """Raises unless columns sum to 1, and of an undirected graph the matrix is symmetric."""
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not matrix.size:
        raise ValueError(
            f"{name}: expected a mixing matrix [n, n] with n >= 1, got shape {matrix.shape}."
        )
    wrong = np.argwhere(~(np.isfinite(matrix) & (matrix >= 0)))
    if len(wrong):
        i, j = wrong[0]
        raise ValueError(
            f"{name}: W[{i}, {j}] = {matrix[i, j]:.6g}; expected finite weights >= 0. (A negative "
            "weight of a worker for itself means that its edges' weights sum to more than 1.)"
        )
    dims = [(0, "column", "what worker {k} gives away, itself included")]
    if not directed:
        dims.insert(0, (1, "row", "the weights by which worker {k} averages"))
    for dim, word, meaning in dims:
        sums = matrix.sum(axis=dim)
        k = int(np.argmax(np.abs(sums - 1)))
        if abs(sums[k] - 1) > TOLERANCE:
            raise ValueError(
                f"{name}: {word} {k} of the mixing matrix sums to {sums[k]:.6g}; expected 1: "
                f"{meaning.format(k=k)}. Scale it, or leave the weights out for Metropolis's."
            )
    if not directed and not is_symmetric(matrix):
        i, j = np.argwhere(np.abs(matrix - matrix.T) > TOLERANCE)[0]
        raise ValueError(
            f"{name}: W[{i}, {j}] = {matrix[i, j]} but W[{j}, {i}] = {matrix[j, i]}; an undirected "
            "graph has a symmetric matrix. Pass directed=True for one that is not."
        )


def check_mixes(matrix: Matrix, directed: bool, name: str) -> None:
    """Raises unless mixing by ``matrix`` over and over makes all workers agree."""
    num_workers = len(matrix)
    hears = [np.flatnonzero(row).tolist() for row in matrix]
    heard_by = [np.flatnonzero(column).tolist() for column in matrix.T]
    everyone = set(range(num_workers))
    if not directed:
        components = []
        while everyone:
            components.append(_reach(hears, min(everyone)).keys())
            everyone -= components[-1]
        if len(components) > 1:
            raise ValueError(
                f"{name}: the graph is not connected. It falls into {len(components)} components "
                f"that never hear of each other: {'; '.join(map(_some, components[:4]))}"
                f"{'; …' if len(components) > 4 else ''}. Add an edge between them."
            )
    else:
        for reach, said in (
            (_reach(heard_by, 0), "what worker 0 says never reaches {rest}"),
            (_reach(hears, 0), "what {rest} say never reaches worker 0"),
        ):
            rest = everyone - reach.keys()
            if rest:
                text = said.format(rest=f"workers {_some(rest)}")
                raise ValueError(
                    f"{name}: the graph is not strongly connected: {text}. Add a directed edge "
                    "(source, target) that closes the circle."
                )
    if num_workers > 1 and not np.any(np.diag(matrix)):
        distance = _reach(hears, 0)
        cycle = math.gcd(
            *(distance[i] + 1 - distance[j] for i in range(num_workers) for j in hears[i])
        )
        if cycle != 1:
            raise ValueError(
                f"{name}: no worker gives weight to itself and all ways round are multiples of "
                f"{cycle}, so that values go round for ever and never meet (spectral gap 0). Give "
                "every worker a weight for itself."
            )


def _reach(neighbours: list[list[int]], start: int) -> dict[int, int]:
    """Everyone that can be reached from ``start``, with the number of hops."""
    distance, frontier = {start: 0}, [start]
    for i in frontier:  # grows while it is read
        for j in neighbours[i]:
            if j not in distance:
                distance[j] = distance[i] + 1
                frontier.append(j)
    return distance


def _some(workers: Iterable[int], most: int = 8) -> str:
    shown = sorted(workers)
    more = f", … {len(shown)} in all" if len(shown) > most else ""
    return "{" + ", ".join(map(str, shown[:most])) + more + "}"
