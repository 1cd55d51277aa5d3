"""A graph of workers with its mixing matrix: one, or a sequence that repeats."""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from jdml.communicate.topology.check import TOLERANCE, check_mixes, check_stochastic, is_symmetric
from jdml.communicate.topology.permutations import Permutation, decompose

Matrix = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Graph:
    """Who hears whom, and how much it counts: ``x_i <- sum_j W_ij x_j`` in every round.

    A graph that changes from round to round is a sequence of matrices that repeats: its ``period``
    is over 1, ``at(step)`` is one round's matrix, and ``weights`` and ``spectral_gap`` are those of
    a whole period. Equal and hashable by its matrices.

    Args:
      matrices: Mixing matrices ``[n, n]``, one per round of the period. ``W[i, j]`` is the weight
        that worker ``i`` gives to worker ``j``'s value; columns sum to 1, so that a round loses
        nothing of what the workers hold together.
      directed: ``False`` claims symmetric matrices. A directed graph may be only column-stochastic:
        the workers then agree on the mean after push-sum's division alone.
      name: For messages and pictures.
      shape: The workers' positions, row-major: ``(n,)`` on a circle, ``(rows, columns)`` on a grid.

    Raises:
      ValueError: a matrix is not square, finite and non-negative; a column (undirected: a row) does
        not sum to 1; the workers are not connected over a period, or would swap values for ever.
        Names the entry, row, column or component.
    """

    matrices: Sequence[Matrix]
    directed: bool = False
    name: str = "graph"
    shape: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        copies = tuple(np.array(m, dtype=np.float64) for m in self.matrices)
        for number, matrix in enumerate(copies):
            label = self.name if len(copies) == 1 else f"{self.name}, round {number}"
            check_stochastic(matrix, self.directed, label)
            matrix.flags.writeable = False
        if not copies or len({m.shape for m in copies}) > 1:
            raise ValueError(
                f"{self.name}: expected one or more mixing matrices of one size, got shapes "
                f"{[m.shape for m in copies]}."
            )
        object.__setattr__(self, "matrices", copies)
        object.__setattr__(self, "shape", tuple(self.shape) or (self.num_workers,))
        if np.prod(self.shape) != self.num_workers:
            raise ValueError(
                f"{self.name}: shape={self.shape} has {np.prod(self.shape)} positions for "
                f"{self.num_workers} workers."
            )
        check_mixes(self.weights, self.directed, self.name)

    @property
    def num_workers(self) -> int:
        """Number n of workers."""
        return int(self.matrices[0].shape[0])

    @property
    def period(self) -> int:
        """Number of rounds after which the sequence of matrices repeats; 1 if it is always one."""
        return len(self.matrices)

    def at(self, step: int) -> Matrix:
        """The mixing matrix of round ``step``, f64 ``[n, n]``, read-only.

        A matrix and not a graph: one round of a sequence need not connect the workers.
        """
        return self.matrices[step % self.period]

    @functools.cached_property
    def weights(self) -> Matrix:
        """The mixing matrix, f64 ``[n, n]``, read-only; of a sequence the product of a period.

        The last round stands on the left: what ``period`` rounds from step 0 do.
        """
        product = functools.reduce(lambda done, w: w @ done, self.matrices)
        product.flags.writeable = False
        return product

    @functools.cached_property
    def spectral_gap(self) -> float:
        """``1 - |lambda_2|`` of ``weights``: 1 agrees at once, near 0 takes ``1 / gap`` rounds.

        ``lambda_2`` is the eigenvalue of second largest modulus. For symmetric and circulant
        matrices its modulus is the second singular value too, and every period brings the workers
        nearer to their mean by ``|lambda_2|`` or more; for others it is the rate in the long run.
        One worker: 1.
        """
        if self.num_workers == 1:
            return 1.0
        symmetric = is_symmetric(self.weights)
        moduli = np.abs(
            np.linalg.eigvalsh(self.weights) if symmetric else np.linalg.eigvals(self.weights)
        )
        return float(1 - np.sort(moduli)[-2])

    @property
    def symmetric(self) -> bool:
        """Whether every round's matrix is its own transpose."""
        return all(map(is_symmetric, self.matrices))

    @property
    def doubly_stochastic(self) -> bool:
        """Whether rows sum to 1 as columns do: then mixing alone leads to the mean."""
        return all(bool(np.all(np.abs(m.sum(1) - 1) <= TOLERANCE)) for m in self.matrices)

    @property
    def edges(self) -> tuple[tuple[int, int], ...]:
        """Ascending ``(i, j)`` with i < j; directed: ``(source, target)``. Of all rounds."""
        linked = np.any([m > 0 for m in self.matrices], axis=0)
        sources, targets = np.nonzero(linked.T)  # W[i, j] > 0: j sends to i
        return tuple(
            (int(i), int(j))
            for i, j in zip(sources, targets, strict=True)
            if (i != j if self.directed else i < j)
        )

    @functools.cached_property
    def permutations(self) -> tuple[tuple[Permutation, ...], ...]:
        """For every round the ``ppermute`` calls that carry it, as few as can be."""
        return tuple(decompose(matrix, self.shape) for matrix in self.matrices)

    @functools.cached_property
    def _bytes(self) -> tuple[bool, tuple[bytes, ...]]:
        return self.directed, tuple(m.tobytes() for m in self.matrices)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Graph) and self._bytes == other._bytes

    def __hash__(self) -> int:
        return hash(self._bytes)

    def __repr__(self) -> str:
        period = f", period={self.period}" if self.period > 1 else ""
        return (
            f"Graph({self.name}, num_workers={self.num_workers}{period}, "
            f"spectral_gap={self.spectral_gap:.4g})"
        )
