"""The usual graphs, and any other from its edges.

Undirected graphs have Metropolis weights, which need to know nothing but the neighbours' degrees
and make every connected graph's matrix symmetric and doubly stochastic (Xiao & Boyd, "Fast Linear
Iterations for Distributed Averaging", 2004; Xiao, Boyd & Lall 2005)::

    W_ij = 1 / (1 + max(d_i, d_j)) for neighbours,  W_ii = 1 - sum_j W_ij

Directed ones divide what a worker has equally over those that it sends to and itself,
``W_ij = 1 / (1 + outdegree(j))``, as push-sum asks for (Assran et al. 2019).

Every worker sends its payload once per neighbour (out-neighbour) and round.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from jdml.communicate.topology.graph import Graph, Matrix

Edge = tuple[int, int]


def ring(n: int) -> Graph:
    """Each worker hears the ones before and after it; 2 payloads a round.

    Weights 1/3 (n >= 3); gap ``1 - (1/3 + 2/3 cos(2 pi / n))``, about ``13 / n^2`` for large n
    (n = 3: 1, it is complete).
    """
    _check_size("ring", n)
    edges = {_ascending(i, (i + 1) % n) for i in range(n) if n > 1}
    return _metropolis(n, sorted(edges), f"ring({n})")


def torus(rows: int, cols: int) -> Graph:
    """A grid that closes on itself in both directions; 4 payloads a round.

    Worker ``i`` stands at row ``i // cols``, column ``i % cols``, as the devices of two mesh axes
    do. Weights 1/5 (rows, cols >= 3); eigenvalues ``(1 + 2 cos(2 pi a / rows) + 2 cos(2 pi b /
    cols)) / 5``.
    """
    for name, size in (("rows", rows), ("cols", cols)):
        _check_size("torus", size, name)
    edges = set()
    for i in range(rows):
        for j in range(cols):
            here = i * cols + j
            for there in ((i + 1) % rows * cols + j, i * cols + (j + 1) % cols):
                if there != here:
                    edges.add(_ascending(here, there))
    return _metropolis(rows * cols, sorted(edges), f"torus({rows}, {cols})", (rows, cols))


def exponential(n: int) -> Graph:
    """Each worker sends 1, 2, 4, 8, … places on; ``ceil(log2 n)`` payloads a round.

    Directed, but doubly stochastic: with ``t = ceil(log2 n)`` all weights are ``1 / (1 + t)``. Gap
    ``2 / (1 + t)`` for even n, more for odd n: far more than a ring's for few more neighbours.

    Reference: Assran et al., "Stochastic Gradient Push", ICML 2019; Ying et al., "Exponential Graph
    is Provably Efficient for Decentralized Deep Training", NeurIPS 2021 (the gap, proposition 1).
    """
    _check_size("exponential", n)
    hops = _powers(n)
    edges = [(i, (i + hop) % n) for hop in hops for i in range(n)]
    return _pushing(n, edges, f"exponential({n})")


def one_peer_exponential(n: int) -> Graph:
    """Round ``t`` sends ``2^(t mod ceil(log2 n))`` places on, to one worker: 1 payload a round.

    ``W(t) = (I + shift by 2^t) / 2``. For n a power of two a period of ``log2 n`` rounds is the
    exact mean (gap 1); for others it only comes near.

    Reference: Assran et al. 2019; Ying et al. 2021 (lemma 1: exact after ``log2 n`` rounds).
    """
    _check_size("one_peer_exponential", n)
    matrices = [(np.eye(n) + np.roll(np.eye(n), hop, axis=0)) / 2 for hop in _powers(n)]
    return Graph(matrices or [np.eye(n)], directed=True, name=f"one_peer_exponential({n})")


def complete(n: int) -> Graph:
    """Everyone hears everyone: one round is the mean (gap 1); n - 1 payloads a round."""
    _check_size("complete", n)
    edges = [(i, j) for i in range(n) for j in range(i + 1, n)]
    return _metropolis(n, edges, f"complete({n})")


def star(n: int) -> Graph:
    """Worker 0 hears all others, and they hear it alone; weights 1/n, gap 1/n (n >= 3).

    Worker 0 sends n - 1 payloads a round, the others one; a round takes n - 1 permutations.
    """
    _check_size("star", n)
    return _metropolis(n, [(0, i) for i in range(1, n)], f"star({n})")


def random_regular(n: int, degree: int, seed: int) -> Graph:
    """A random connected graph in which every worker has ``degree`` neighbours.

    Equal seeds give equal graphs. Weights ``1 / (1 + degree)``. From degree 3 on such graphs are
    expanders: the gap hardly shrinks as n grows.

    Raises:
      ValueError: ``n * degree`` is odd; ``degree`` is not below ``n``, or too small for the workers
        to be connected.

    Reference: Steger & Wormald, "Generating Random Regular Graphs Quickly", 1999.
    """
    _check_size("random_regular", n)
    name = f"random_regular({n}, {degree}, {seed})"
    least = 0 if n == 1 else 1 if n == 2 else 2
    if not _is_int(degree) or not least <= degree < n or n * degree % 2:
        raise ValueError(
            f"{name}: {n} workers cannot all have {degree!r} neighbours and be connected; expected "
            f"{least} <= degree <= {n - 1} with n * degree even."
        )
    _check_seed(name, seed)
    rng = np.random.Generator(np.random.Philox(key=np.array([seed, degree], np.uint64)))
    # A dense graph is drawn as the one that it lacks, which is easier.
    lacks = n - 1 - degree
    for _ in range(1000):
        edges = _pair(n, min(degree, lacks), rng)
        if lacks < degree:
            edges = {(i, j) for i in range(n) for j in range(i + 1, n)} - edges
        if _connected(n, edges):
            return _metropolis(n, sorted(edges), name)
    raise ValueError(f"{name}: 1000 draws gave no connected graph; take a greater degree.")


def random_pairs(n: int, period: int, seed: int) -> Graph:
    """Randomised gossip: in every round the workers meet in random pairs; 1 payload a round.

    ``W(t) = (I + P_t) / 2``, where ``P_t`` swaps the two of each pair: a uniform perfect matching,
    and for odd n one worker, each as likely, that rests. ``period`` rounds are drawn, and repeat:
    each is one branch of the compiled program. A draw whose pairs leave the workers in parts is
    drawn again. Equal seeds give equal graphs.

    ``W(t)`` is a projection, so that ``E[W^T W] = E[W]``, whose eigenvalues besides 1 are all
    ``lambda``. A round of fresh pairs therefore leaves, of the sum of squared differences from the
    mean, on average exactly ``lambda = (n - 2) / (2 (n - 1))`` for even n, 1/2 for odd n > 1,
    whatever the workers hold. Boyd's algorithm, in which one pair at a time wakes up, leaves
    ``1 - 1 / (n - 1)`` after one pair. (:func:`one_peer_exponential` sends as much and is the exact
    mean after ``log2 n`` rounds, for n a power of two; pairs need no order among the workers, and
    both ends of an edge send.)

    Raises:
      ValueError: ``period`` is below 1, or too short for its pairs to connect the workers: 2 rounds
        or more for n > 2.

    Reference: Boyd, Ghosh, Prabhakar & Shah, "Randomized Gossip Algorithms", IEEE Transactions on
    Information Theory 52(6), 2006 (section II: ``E[W^T W]`` rules the speed).
    """
    _check_size("random_pairs", n)
    name = f"random_pairs({n}, {period}, {seed})"
    if not _is_int(period) or period < 1:
        raise ValueError(f"{name}: expected period to be an int >= 1, a number of rounds.")
    _check_seed(name, seed)
    rng = np.random.Generator(np.random.Philox(key=np.array([seed, period], np.uint64)))
    for _ in range(1000 if n <= 2 or period > 1 else 0):
        orders = [rng.permutation(n).tolist() for _ in range(period)]
        rounds = [list(zip(order[0::2], order[1::2], strict=False)) for order in orders]
        if _connected(n, {_ascending(i, j) for pairs in rounds for i, j in pairs}):
            return Graph([_meeting(n, pairs) for pairs in rounds], name=name)
    raise ValueError(
        f"{name}: the pairs of {period} rounds do not connect {n} workers, in 1000 draws. Take a "
        "longer period."
    )


def from_edges(
    n: int,
    edges: Sequence[Edge],
    weights: Sequence[float] | npt.ArrayLike | None = None,
    directed: bool = False,
) -> Graph:
    """A graph from its edges.

    Args:
      n: Number of workers.
      edges: Pairs of workers; directed: ``(source, target)``. A worker always keeps a share of its
        own, so that pairs ``(i, i)`` are not given.
      weights: ``None`` for Metropolis's weights (directed: ``1 / (1 + outdegree)``). Or one weight
        per edge, by which its target counts its source; what is left to 1 is the worker's own. Or
        the whole mixing matrix ``[n, n]``, positive on ``edges`` and nowhere else besides the
        diagonal.
      directed: Whether an edge goes one way. The matrix is then only column-stochastic in general:
        for push-sum. ``Graph.doubly_stochastic`` tells.

    Raises:
      ValueError: an edge is not a pair of two workers, or given twice; weights that do not fit the
        edges, are negative or do not sum to 1 (names the row or column); not connected (names the
        components).
    """
    _check_size("from_edges", n)
    name = f"from_edges({n}, {len(edges)} edges)"
    pairs = _checked_edges(n, edges, directed, name)
    if weights is None:
        return _pushing(n, pairs, name) if directed else _metropolis(n, pairs, name)
    given = np.asarray(weights, dtype=np.float64)
    if given.shape == (n, n):
        _check_support(given, pairs, directed, name)
        return Graph([given], directed, name)
    if given.shape != (len(pairs),):
        raise ValueError(
            f"{name}: weights has shape {given.shape}; expected one per edge ({len(pairs)},) or "
            f"the mixing matrix ({n}, {n})."
        )
    matrix = np.zeros((n, n))
    for (source, target), weight in zip(pairs, given, strict=True):
        matrix[target, source] = weight
        if not directed:
            matrix[source, target] = weight
    return Graph([_with_own(matrix)], directed, name)


def _metropolis(n: int, edges: Sequence[Edge], name: str, shape: tuple[int, ...] = ()) -> Graph:
    degree = np.bincount(np.array(edges, int).reshape(-1), minlength=n)
    matrix = np.zeros((n, n))
    for i, j in edges:
        matrix[i, j] = matrix[j, i] = 1 / (1 + max(degree[i], degree[j]))
    return Graph([_with_own(matrix)], name=name, shape=shape)


def _pushing(n: int, edges: Sequence[Edge], name: str) -> Graph:
    """Directed, with equal shares of what each worker has."""
    matrix = np.zeros((n, n))
    for source, target in edges:
        matrix[target, source] = 1
    return Graph([_with_own(matrix / (1 + matrix.sum(axis=0)))], directed=True, name=name)


def _meeting(n: int, pairs: Sequence[Edge]) -> Matrix:
    """The two of each pair share equally; who is in none keeps what it has."""
    matrix = np.eye(n)
    for i, j in pairs:
        matrix[[i, i, j, j], [i, j, i, j]] = 1 / 2
    return matrix


def _with_own(matrix: Matrix) -> Matrix:
    """The diagonal filled up so that every column sums to 1."""
    return matrix + np.diag(1 - matrix.sum(axis=0))


def _powers(n: int) -> list[int]:
    return [2**k for k in range((n - 1).bit_length())]


def _ascending(i: int, j: int) -> Edge:
    return (i, j) if i < j else (j, i)


def _pair(n: int, degree: int, rng: np.random.Generator) -> set[Edge]:
    """Random edges, ``degree`` at each of ``n`` workers."""
    while True:
        edges: set[Edge] = set()
        stubs = np.repeat(np.arange(n), degree)
        for _ in range(100):
            rng.shuffle(stubs)
            left = []
            for i, j in stubs.reshape(-1, 2).tolist():
                if i == j or _ascending(i, j) in edges:
                    left += [i, j]
                else:
                    edges.add(_ascending(i, j))
            if not left:
                return edges
            stubs = np.array(left)


def _connected(n: int, edges: set[Edge]) -> bool:
    part = list(range(n))

    def root(i: int) -> int:
        while part[i] != i:
            part[i] = part[part[i]]
            i = part[i]
        return i

    for i, j in edges:
        part[root(i)] = root(j)
    return len({root(i) for i in range(n)}) == 1


def _is_int(x: Any) -> bool:
    return isinstance(x, (int, np.integer)) and not isinstance(x, bool)


def _check_size(factory: str, n: Any, name: str = "n") -> None:
    if not _is_int(n) or n < 1:
        raise ValueError(f"{factory}: {name}={n!r}; expected an int >= 1, a number of workers.")


def _check_seed(name: str, seed: Any) -> None:
    if not _is_int(seed) or not 0 <= seed < 2**64:
        raise ValueError(f"{name}: expected an int seed in 0 .. 2**64 - 1.")


def _checked_edges(n: int, edges: Sequence[Edge], directed: bool, name: str) -> list[Edge]:
    checked: dict[Edge, Edge] = {}
    for edge in edges:
        if len(edge) != 2 or not all(_is_int(i) and 0 <= i < n for i in edge):
            raise ValueError(f"{name}: edge {edge!r}; expected two workers in 0 .. {n - 1}.")
        i, j = map(int, edge)
        if i == j:
            raise ValueError(
                f"{name}: edge {edge!r} leads from a worker to itself; leave it out, what edges "
                "leave to 1 is the worker's own weight."
            )
        key = (i, j) if directed else _ascending(i, j)
        if key in checked:
            raise ValueError(f"{name}: edge {edge!r} is there already, as {checked[key]!r}.")
        checked[key] = (i, j)
    return list(checked.values())


def _check_support(matrix: Matrix, edges: list[Edge], directed: bool, name: str) -> None:
    linked = np.eye(len(matrix), dtype=bool)
    for source, target in edges:
        linked[target, source] = True
        linked[source, target] |= not directed
    i, j = next(iter(np.argwhere((matrix != 0) & ~linked)), (None, None))
    if i is not None:
        raise ValueError(
            f"{name}: W[{i}, {j}] = {matrix[i, j]} but there is no edge ({j}, {i}); add it, or set "
            "the weight to 0."
        )
    for source, target in edges:
        if not matrix[target, source]:
            raise ValueError(
                f"{name}: edge ({source}, {target}) has weight W[{target}, {source}] = 0; leave "
                "the edge out, or give it a weight."
            )
