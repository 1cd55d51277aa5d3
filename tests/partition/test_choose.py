"""The division that sends fewest bytes, against programs that were compiled."""

import jax
import numpy as np
import pytest

from jdml.models.linear import LinearProblem, l2, logistic, shard_problem
from jdml.partition import choose_partition
from jdml.sharding import bytes_per_axis, collectives, make_mesh


@pytest.mark.parametrize(
    ("n", "d", "workers", "by", "grid"),
    [
        (1_000_000, 50, 8, "sample", (8, 1)),
        (200, 50_000, 8, "feature", (1, 8)),
        (30_000, 30_000, 64, "both", (8, 8)),
        (10, 4, 1, "sample", (1, 1)),
        # More workers than rows: by feature alone is possible.
        (3, 100, 5, "feature", (1, 5)),
    ],
)
def test_the_choice(n, d, workers, by, grid):
    found = choose_partition(n, d, n * d // 10, workers)
    assert (found.by, found.grid) == (by, grid)
    assert found.best.sent_bytes == min(c.sent_bytes for c in found.candidates)
    assert str(found)


def test_no_grid_sends_less():
    n, d, workers = 1200, 720, 12
    best = choose_partition(n, d, n * d, workers).best.sent_bytes
    for s in (1, 2, 3, 4, 6, 12):
        f = workers // s
        sent = 2 * (f - 1) / f * n / s * 8 + 2 * (s - 1) / s * d / f * 8
        assert best <= np.ceil(sent) + 1


@pytest.mark.parametrize("axes", [("data", None), (None, "model"), ("data", "model")], ids=str)
def test_bytes_are_those_of_a_compiled_pass(axes):
    n, d = 48, 12
    shape = {name: 2 for name in axes if name}
    mesh = make_mesh(shape, devices=jax.devices()[: 2 ** len(shape)])
    x = np.random.default_rng(0).normal(size=(n, d)).astype(np.float32)
    y = np.sign(x[:, 0])
    problem = shard_problem(LinearProblem(x, y, logistic(), l2(0.1)), mesh, *axes)

    def one_pass(problem, w):
        margins = problem.margins(w)
        return margins, problem.pull(problem.slopes(margins))

    compiled = jax.jit(one_pass).lower(problem, problem.init()).compile()
    sent = bytes_per_axis(c for c in collectives(compiled, mesh) if c.kind == "all-reduce")
    found = choose_partition(n, d, n * d, 2 ** len(shape), dtype=np.float32)
    by = "sample" if axes[1] is None else "feature" if axes[0] is None else "both"
    division = next(c for c in found.candidates if c.by == by)
    assert sent.get(("data",), 0) == division.parameter_bytes
    assert sent.get(("model",), 0) == division.margin_bytes


@pytest.mark.parametrize("arguments", [(0, 1, 0, 1), (2, 2, 5, 1), (2, 2, 4, 0), (3, 2, 6, 7)])
def test_refusals(arguments):
    with pytest.raises(ValueError, match=r"choose_partition.*(expected|Take fewer)"):
        choose_partition(*arguments)
