"""A graph as a set of ``ppermute`` calls: each worker sends and receives at most once in each."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.float64]
Edge = tuple[int, int]


class Permutation(NamedTuple):
    """One ``ppermute`` of a round.

    Attributes:
      pairs: ``(source, target)``; no worker is twice a source, or twice a target.
      weights: f64 ``[n]``: by how much each worker counts what it receives; 0 where that is
        nothing.
    """

    pairs: tuple[Edge, ...]
    weights: Matrix


def decompose(matrix: Matrix, shape: tuple[int, ...]) -> tuple[Permutation, ...]:
    """As few permutations as can carry the edges of one round: the greatest in- or out-degree.

    A worker with D neighbours cannot do with fewer. Shifts (all workers send ``d`` places on, on
    the circle or grid that ``shape`` says) are taken where they are as few, because a mesh axis
    laid out on such links carries them side by side. Else the edges are coloured.

    Args:
      matrix: Mixing matrix ``[n, n]``.
      shape: The workers' positions, row-major.

    Reference: König 1916 (a bipartite graph has an edge colouring with as many colours as its
    greatest degree).
    """
    targets, sources = np.nonzero(matrix - np.diag(np.diag(matrix)))
    edges = list(zip(sources.tolist(), targets.tolist(), strict=True))
    if not edges:
        return ()
    degree = int(max(np.max(np.bincount(sources)), np.max(np.bincount(targets))))
    groups: dict[tuple[int, ...], list[Edge]] = {}
    shifts = _shifts(sources, targets, shape)
    for edge, shift in zip(edges, shifts, strict=True):
        groups.setdefault(shift, []).append(edge)
    classes = [groups[s] for s in sorted(groups)] if len(groups) <= degree else _colour(edges)
    assert len(classes) == degree
    return tuple(_permutation(sorted(pairs), matrix) for pairs in classes)


def _permutation(pairs: list[Edge], matrix: Matrix) -> Permutation:
    weights = np.zeros(len(matrix))
    for source, target in pairs:
        weights[target] = matrix[target, source]
    weights.flags.writeable = False
    return Permutation(tuple(pairs), weights)


def _shifts(
    sources: npt.NDArray[np.int64], targets: npt.NDArray[np.int64], shape: tuple[int, ...]
) -> list[tuple[int, ...]]:
    """How many places on each edge leads, in every dim of ``shape``, round the end."""
    moves = [
        ((there - here) % size).tolist()
        for here, there, size in zip(
            np.unravel_index(sources, shape), np.unravel_index(targets, shape), shape, strict=True
        )
    ]
    return list(zip(*moves, strict=True))


def _colour(edges: list[Edge]) -> list[list[Edge]]:
    """Edge colouring of sources against targets: no colour is twice at a worker on one side."""
    sends: dict[int, dict[int, int]] = {}  # source -> colour -> target
    hears: dict[int, dict[int, int]] = {}  # target -> colour -> source
    for source, target in edges:
        out, into = sends.setdefault(source, {}), hears.setdefault(target, {})
        a, b = _free(out), _free(into)
        if a != b:
            # Colour a is free at the source and b at the target. The path of colours a, b, a, …
            # from the target cannot end at the source, so swapping the two along it frees a.
            path, side, here, colour = [], hears, target, a
            while colour in side.get(here, {}):
                there = side[here][colour]
                path.append((there, here, colour) if side is hears else (here, there, colour))
                side, here = (sends if side is hears else hears), there
                colour = b if colour == a else a
            for s, t, old in path:
                del sends[s][old], hears[t][old]
            for s, t, old in path:
                new = b if old == a else a
                sends[s][new], hears[t][new] = t, s
        out[a], into[a] = target, source
    classes: dict[int, list[Edge]] = {}
    for source, colours in sends.items():
        for colour, target in colours.items():
            classes.setdefault(colour, []).append((source, target))
    return [classes[c] for c in sorted(classes)]


def _free(taken: dict[int, int]) -> int:
    """The lowest colour that is not taken."""
    return next(c for c in range(len(taken) + 1) if c not in taken)
