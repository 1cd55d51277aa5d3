"""Graphs: their matrices by definition, gaps in closed form, and what is refused."""

import numpy as np
import pytest

from jdml.communicate.topology import (
    Graph,
    complete,
    exponential,
    from_edges,
    one_peer_exponential,
    random_pairs,
    random_regular,
    ring,
    star,
    torus,
)

SIZES = range(1, 10)
EACH_SIZE = {
    "ring": ring,
    "exponential": exponential,
    "one_peer_exponential": one_peer_exponential,
    "complete": complete,
    "star": star,
    "torus 2": lambda n: torus(2, n),
    "torus 3": lambda n: torus(n, 3),
    "random_regular 2": lambda n: random_regular(n, min(2, n - 1), 0),
    "random_pairs": lambda n: random_pairs(n, 6, 0),
}
SYMMETRIC = [name for name in EACH_SIZE if "exponential" not in name]
UNDIRECTED = [name for name in SYMMETRIC if name != "random_pairs"]


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("name", EACH_SIZE)
def test_every_graph_mixes_and_keeps_the_mean(name, n):
    graph = EACH_SIZE[name](n)
    assert graph.num_workers == n * {"torus 2": 2, "torus 3": 3}.get(name, 1)
    for step in range(graph.period):
        matrix = graph.at(step)
        assert matrix.dtype == np.float64
        assert (matrix >= 0).all()
        np.testing.assert_allclose(matrix.sum(0), 1, atol=1e-12)
        np.testing.assert_allclose(matrix.sum(1), 1, atol=1e-12)
        assert (np.diag(matrix) > 0).all()
    assert graph.doubly_stochastic
    assert graph.symmetric >= (name in SYMMETRIC)
    assert 0 < graph.spectral_gap <= 1 + 1e-12


@pytest.mark.parametrize("name", UNDIRECTED)
def test_undirected_weights_are_metropolis(name):
    graph = EACH_SIZE[name](7)
    degree = np.zeros(graph.num_workers, int)
    for i, j in graph.edges:
        assert i < j
        degree[[i, j]] += 1
    expected = np.zeros_like(graph.weights)
    for i, j in graph.edges:
        expected[i, j] = expected[j, i] = 1 / (1 + max(degree[i], degree[j]))
    expected += np.diag(1 - expected.sum(1))
    np.testing.assert_allclose(graph.weights, expected, atol=1e-15)


def test_weights_written_out():
    np.testing.assert_allclose(
        ring(4).weights * 3, [[1, 1, 0, 1], [1, 1, 1, 0], [0, 1, 1, 1], [1, 0, 1, 1]]
    )
    np.testing.assert_allclose(star(3).weights * 3, [[1, 1, 1], [1, 2, 0], [1, 0, 2]])
    np.testing.assert_allclose(
        exponential(4).weights * 3, [[1, 0, 1, 1], [1, 1, 0, 1], [1, 1, 1, 0], [0, 1, 1, 1]]
    )
    path = from_edges(3, [(0, 1), (1, 2)])
    np.testing.assert_allclose(path.weights * 3, [[2, 1, 0], [1, 1, 1], [0, 1, 2]])
    # 0 sends to 1 and 2 and keeps a third; 1 and 2 send to one other each and keep half.
    circle = from_edges(3, [(0, 1), (0, 2), (1, 2), (2, 0)], directed=True)
    np.testing.assert_allclose(circle.weights * 6, [[2, 0, 3], [2, 3, 0], [2, 3, 3]])
    assert not circle.doubly_stochastic
    given = from_edges(3, [(0, 1), (1, 2)], [0.5, 0.25])
    np.testing.assert_allclose(given.weights * 4, [[2, 2, 0], [2, 1, 1], [0, 1, 3]])
    assert from_edges(3, [(0, 1), (1, 2)], given.weights) == given
    pushed = from_edges(2, [(0, 1), (1, 0)], [0.75, 0.5], directed=True)
    np.testing.assert_allclose(pushed.weights, [[0.25, 0.5], [0.75, 0.5]])


def cos(a, n):
    return np.cos(2 * np.pi * a / n)


@pytest.mark.parametrize("n", [3, 4, 5, 8, 16, 33])
def test_spectral_gaps_in_closed_form(n):
    """Xiao & Boyd 2004 (circulant matrices); Ying et al. 2021, proposition 1 (exponential)."""
    t = (n - 1).bit_length()
    ring_2nd = max(abs(1 / 3 + 2 / 3 * cos(a, n)) for a in range(1, n))
    assert ring(n).spectral_gap == pytest.approx(1 - ring_2nd)
    if n > 3:
        assert ring(n).spectral_gap == pytest.approx(1 - (1 / 3 + 2 / 3 * cos(1, n)))
    assert complete(n).spectral_gap == pytest.approx(1)
    assert star(n).spectral_gap == pytest.approx(1 / n)
    if n % 2 == 0:
        assert exponential(n).spectral_gap == pytest.approx(2 / (1 + t))
    else:
        assert exponential(n).spectral_gap > 2 / (1 + t)
    values = [
        abs(1 + 2 * cos(a, n) + 2 * cos(b, 3)) / 5 for a in range(n) for b in range(3) if a or b
    ]
    assert torus(n, 3).spectral_gap == pytest.approx(1 - max(values))
    assert torus(3, n).spectral_gap == pytest.approx(1 - max(values))


@pytest.mark.parametrize("graph", [ring(8), star(5), exponential(8), random_regular(10, 3, 1)])
def test_disagreement_shrinks_by_the_gap(graph):
    x = np.random.default_rng(0).normal(size=graph.num_workers)
    mean, factor = x.mean(), 1 - graph.spectral_gap
    rounds = 60
    for _ in range(rounds):
        before, x = x, graph.weights @ x
        apart = np.linalg.norm(x - mean)
        assert apart <= factor * np.linalg.norm(before - mean) + 1e-12
        np.testing.assert_allclose(x.mean(), mean, atol=1e-12)
    # And no faster in the long run: the gap is the rate, not a bound on it.
    assert apart >= 0.01 * factor**rounds


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_one_peer_exponential_is_the_mean_after_a_period(k):
    graph = one_peer_exponential(2**k)
    assert graph.period == k
    np.testing.assert_allclose(graph.weights, np.full((2**k, 2**k), 2.0**-k), atol=1e-15)
    assert graph.spectral_gap == pytest.approx(1)
    # From any round on.
    product = np.eye(2**k)
    for step in range(k - 1, 2 * k - 1):
        product = graph.at(step) @ product
    np.testing.assert_allclose(product, 2.0**-k, atol=1e-15)
    for step in range(k):
        assert all(np.count_nonzero(row) == 2 for row in graph.at(step))
    assert one_peer_exponential(6).spectral_gap < 1


@pytest.mark.parametrize(("n", "degree"), [(8, 3), (10, 4), (10, 8), (7, 6), (30, 3), (20, 2)])
def test_random_regular_graphs(n, degree):
    graph = random_regular(n, degree, seed=3)
    assert {np.count_nonzero(row) for row in graph.weights} == {degree + 1}
    assert graph == random_regular(n, degree, seed=3)
    assert len(graph.edges) == n * degree // 2
    others = {random_regular(n, degree, seed) for seed in range(4)}
    assert len(others) == (1 if degree == n - 1 else 4)


def matchings(workers):
    """All ways of pairing the workers, one of them left over if they are odd."""
    if len(workers) < 2:
        return [[]]
    found = [[(workers[0], other), *rest] for other in workers[1:]
             for rest in matchings([w for w in workers[1:] if w != other])]  # fmt: skip
    if len(workers) % 2:
        found += matchings(workers[1:])
    return found


@pytest.mark.parametrize(("n", "count"), [(2, 1), (3, 3), (4, 3), (5, 15), (6, 15), (7, 105)])
def test_random_pairs_contract_as_stated_on_average(n, count):
    """``E[W^T W]`` over all matchings by hand, and over those that were drawn."""
    every = {tuple(m): np.eye(n) for m in matchings(list(range(n)))}
    assert len(every) == count
    for pairs, w in every.items():
        for i, j in pairs:
            w[np.ix_((i, j), (i, j))] = 0.5
        np.testing.assert_array_equal(w.T @ w, w)  # a projection
    expected = sum(w.T @ w for w in every.values()) / count
    factor = (n - 2) / (2 * (n - 1)) if n % 2 == 0 else 1 / 2
    mean = np.full((n, n), 1 / n)
    np.testing.assert_allclose(expected, mean + factor * (np.eye(n) - mean), atol=1e-12)

    rounds = 200 * count
    graph = random_pairs(n, rounds, 1)
    drawn = {pairs: 0 for pairs in every}
    for w in graph.matrices:
        upper = np.argwhere(np.triu(w, 1))
        drawn[tuple((int(i), int(j)) for i, j in upper)] += 1
    # Each matching is as likely: 200 times, with a standard deviation of at most 14.2.
    assert max(abs(times - 200) for times in drawn.values()) < 5 * 14.2
    empirical = sum(w.T @ w for w in graph.matrices) / rounds
    second = np.linalg.eigvalsh(empirical)[-2]
    assert factor - 1e-12 <= second < factor + 3 / np.sqrt(rounds)


@pytest.mark.parametrize("n", [7, 16])
def test_random_pairs_take_so_many_rounds(n):
    """From round to round the squared distance shrinks by that factor, on average over rounds."""
    factor = (n - 2) / (2 * (n - 1)) if n % 2 == 0 else 1 / 2
    ratios = []
    for seed in range(40):
        graph = random_pairs(n, 5, seed)
        x = np.random.default_rng(seed).normal(size=(n, 200))
        for step in range(graph.period):
            apart = np.sum((x - x.mean(0)) ** 2)
            x = graph.at(step) @ x
            ratios.append(np.sum((x - x.mean(0)) ** 2) / apart)
    np.testing.assert_allclose(
        np.mean(ratios), factor, atol=5 * np.std(ratios) / len(ratios) ** 0.5
    )


def test_random_pairs_are_drawn_by_the_seed_and_connect():
    for n in range(2, 12):
        for period in range(1 if n == 2 else 2, 5):
            graph = random_pairs(n, period, 3)
            assert graph.period == period
            assert graph == random_pairs(n, period, 3)
            for permutations in graph.permutations:  # one message, both ways
                (only,) = permutations
                assert len(only.pairs) == 2 * (n // 2)
                assert set(only.pairs) == {(j, i) for i, j in only.pairs}
    assert len({random_pairs(8, 4, seed) for seed in range(5)}) == 5
    assert random_pairs(1, 3, 0).permutations == ((), (), ())


def edges_of(permutations):
    return sorted(pair for p in permutations for pair in p.pairs)


COUNTS = {
    "ring": (ring(6), 2),
    "pair": (ring(2), 1),
    "torus": (torus(3, 4), 4),
    "torus of two rows": (torus(2, 4), 3),
    "exponential": (exponential(8), 3),
    "complete": (complete(5), 4),
    "star": (star(6), 5),
    "regular": (random_regular(12, 3, 0), 3),
    "dense": (random_regular(11, 6, 0), 6),
    "path": (from_edges(5, [(0, 1), (1, 2), (2, 3), (3, 4)]), 2),
    "directed": (from_edges(4, [(0, 1), (0, 2), (1, 3), (2, 3), (3, 0)], directed=True), 2),
}


@pytest.mark.parametrize("name", COUNTS)
def test_as_few_permutations_as_the_degree(name):
    graph, count = COUNTS[name]
    (permutations,) = graph.permutations
    assert len(permutations) == count
    targets, sources = np.nonzero(graph.weights - np.diag(np.diag(graph.weights)))
    assert edges_of(permutations) == sorted(zip(sources, targets, strict=True))
    total = np.diag(np.diag(graph.weights))
    for p in permutations:
        for side in zip(*p.pairs, strict=True):
            assert len(set(side)) == len(p.pairs)
        for source, target in p.pairs:
            total[target, source] += p.weights[target]
        assert np.count_nonzero(p.weights) == len(p.pairs)
    np.testing.assert_array_equal(total, graph.weights)


def test_random_digraphs_are_coloured_with_as_few():
    rng = np.random.default_rng(0)
    for _ in range(30):
        n = int(rng.integers(3, 12))
        arcs = {(i, (i + 1) % n) for i in range(n)}  # strongly connected
        arcs |= {(int(i), int(j)) for i, j in rng.integers(0, n, (3 * n, 2)) if i != j}
        graph = from_edges(n, sorted(arcs), directed=True)
        degree = max(np.bincount(side).max() for side in zip(*arcs, strict=True))
        (permutations,) = graph.permutations
        assert len(permutations) == degree
        assert edges_of(permutations) == sorted(arcs)


def test_shifts_are_kept_where_they_are_as_few():
    (permutations,) = torus(3, 4).permutations
    shifts = [
        {((t // 4 - s // 4) % 3, (t % 4 - s % 4) % 4) for s, t in p.pairs} for p in permutations
    ]
    assert shifts == [{(0, 1)}, {(0, 3)}, {(1, 0)}, {(2, 0)}]


def test_graphs_are_values():
    assert ring(5) == ring(5)
    assert hash(ring(5)) == hash(ring(5))
    assert ring(5) != complete(5)
    assert ring(3) == complete(3)  # the same matrix
    assert ring(5) != "ring"
    assert len({ring(4), ring(4), star(4), one_peer_exponential(4)}) == 3
    with pytest.raises(AttributeError):
        ring(3).directed = True
    for matrix in (ring(3).weights, ring(3).at(0), one_peer_exponential(4).weights):
        with pytest.raises(ValueError, match="read-only"):
            matrix[0, 0] = 1
    mine = np.full((2, 2), 0.5)
    graph = Graph([mine])
    mine[:] = 0
    assert graph.weights[0, 0] == 0.5
    assert "spectral_gap=0.1953" in repr(ring(8))
    assert ring(4).edges == ((0, 1), (0, 3), (1, 2), (2, 3))
    assert one_peer_exponential(4).edges == tuple(
        sorted((i, (i + hop) % 4) for i in range(4) for hop in (1, 2))
    )


SWAP = np.array([[0.0, 1.0], [1.0, 0.0]])
PULL = np.array([[0.5, 0.5, 0.0], [0.0, 0.5, 0.5], [1.0, 0.0, 0.0]])  # rows sum to 1


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: ring(0), r"ring: n=0; expected an int >= 1"),
        (lambda: complete(2.0), r"complete: n=2.0"),
        (lambda: star(True), r"star: n=True"),
        (lambda: torus(3, 0), r"torus: cols=0"),
        (lambda: exponential(-1), "exponential: n=-1"),
        (lambda: one_peer_exponential("8"), "n='8'"),
        (lambda: random_regular(5, 3, 0), r"n \* degree even"),
        (lambda: random_regular(4, 4, 0), r"2 <= degree <= 3"),
        (lambda: random_regular(6, 1, 0), r"2 <= degree"),
        (lambda: random_regular(6, 2, -1), "seed in 0"),
        (lambda: random_pairs(0, 2, 0), "random_pairs: n=0"),
        (lambda: random_pairs(4, 0, 0), r"random_pairs\(4, 0, 0\): .*period to be an int >= 1"),
        (lambda: random_pairs(4, 1, 0), "1 rounds do not connect 4 workers.*longer period"),
        (lambda: random_pairs(4, 2, -1), "seed in 0"),
        (lambda: from_edges(4, [(0, 1), (2, 3)]), r"2 components .*\{0, 1\}; \{2, 3\}"),
        (lambda: from_edges(3, []), r"3 components .*\{0\}; \{1\}; \{2\}"),
        (
            lambda: from_edges(3, [(0, 1), (1, 2), (2, 1)], directed=True),
            r"not strongly connected: what workers \{1, 2\} say never reaches worker 0",
        ),
        (
            lambda: from_edges(3, [(1, 0), (2, 0)], directed=True),
            r"what worker 0 says never reaches workers \{1, 2\}",
        ),
        (lambda: from_edges(3, [(0, 3)]), r"edge \(0, 3\); expected two workers in 0 .. 2"),
        (lambda: from_edges(3, [(0, 1, 2)]), r"expected two workers"),
        (lambda: from_edges(3, [(1, 1)]), r"from a worker to itself"),
        (lambda: from_edges(2, [(0, 1), (1, 0)]), r"\(1, 0\) is there already, as \(0, 1\)"),
        (lambda: from_edges(3, [(0, 1), (1, 2)], [0.5]), r"one per edge \(2,\) or"),
        (lambda: from_edges(3, [(0, 1), (1, 2)], [0.6, 0.6]), r"W\[1, 1\] = -0.2.*more than 1"),
        (lambda: from_edges(2, [(0, 1)], [np.nan]), r"W\[0, 0\] = nan"),
        (lambda: from_edges(2, [(0, 1)], [[0.5, 0.5], [0.5, 0.6]]), "row 1 .* sums to 1.1"),
        (
            lambda: from_edges(2, [(0, 1), (1, 0)], [[0.5, 0.5], [0.4, 0.5]], directed=True),
            "column 0 .* sums to 0.9",
        ),
        (lambda: from_edges(3, [(0, 1)], np.full((3, 3), 1 / 3)), r"no edge \(2, 0\)"),
        (lambda: from_edges(2, [(0, 1)], np.eye(2)), r"edge \(0, 1\) has weight W\[1, 0\] = 0"),
        (lambda: Graph([PULL.T]), r"row 0 .* sums to 1.5"),
        (lambda: Graph([PULL], directed=True), r"column 0 .* sums to 1.5"),
        (lambda: Graph([np.roll(np.eye(3), 1, 0)]), r"undirected graph has a symmetric matrix"),
        (lambda: Graph([np.ones((2, 3))]), r"shape \(2, 3\)"),
        (lambda: Graph([]), "one or more mixing matrices"),
        (lambda: Graph([np.ones((1, 1)), np.full((2, 2), 0.5)]), "of one size"),
        (lambda: Graph([SWAP]), "multiples of 2.*spectral gap 0"),
        (lambda: Graph([np.roll(np.eye(3), 1, 0)], directed=True), "multiples of 3"),
        (lambda: Graph([np.full((2, 2), 0.5)], shape=(3,)), "3 positions for 2 workers"),
        (lambda: Graph([np.full((2, 2), 0.5), SWAP * 0.9], name="two"), "two, round 1: row 0"),
    ],
)
def test_refused_with_what_and_where(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_a_round_need_not_connect_but_a_period_must():
    left, right = np.eye(3), np.eye(3)
    left[:2, :2] = right[1:, 1:] = 0.5
    graph = Graph([left, right])
    assert (graph.period, graph.edges) == (2, ((0, 1), (1, 2)))
    # The later round stands on the left, and the product is no longer symmetric.
    np.testing.assert_array_equal(graph.weights, right @ left)
    assert graph.symmetric
    assert [graph.at(step)[0, 0] for step in range(4)] == [0.5, 1, 0.5, 1]
    with pytest.raises(ValueError, match=r"\{0, 1\}; \{2\}"):
        Graph([left, left])
