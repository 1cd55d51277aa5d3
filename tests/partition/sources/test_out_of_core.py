"""Passes over files several times larger than the memory they may take; the peak is measured."""

import numpy as np
import pytest

from jdml.partition.sources import read_libsvm
from tests.partition.sources.memory import MEASURE, needs_proc, run

# Compiling the solver leaves 30 to 80 MB, whatever the data. So the first passes are measured
# before it, and those of solving after it.
SOLVE = (
    MEASURE
    + """
import sys
import jax
import numpy as np
jax.config.update("jax_enable_x64", True)
from jdml.models.linear import LinearProblem, l2, logistic
from jdml.optimize import lbfgs, solve
from jdml.partition.sources import NpyStream, StreamedRows

def problem_of(rows, y):
    return LinearProblem(rows, y, logistic(), l2(0.1), intercept=True)

def grown_by(work):
    before = held("Rss")
    forget_peak()
    result = jax.block_until_ready(work())
    return held("VmHWM", "status") - before, result

x, y = (sys.argv[1] + name for name in ("/x.npy", "/y.npy"))
stream = NpyStream(x, y, chunk_bytes=1 << 20)
rows = StreamedRows(stream)
w = jax.numpy.ones(stream.shape[1])
both = jax.jit(lambda w: rows.rmatvec(rows.matvec(w)))
first, _ = grown_by(lambda: both(w))

problem = problem_of(rows, stream.labels)
solve(problem, lbfgs(), 1e-6, 0, progress=False)
start = rows.num_passes
solving, solution = grown_by(lambda: solve(problem, lbfgs(), 1e-6, 40, progress=False))
assert solution.converged
passes = rows.num_passes - start

with_all, whole = grown_by(
    lambda: solve(problem_of(np.load(x), np.load(y)), lbfgs(), 1e-6, 40, progress=False)
)
print(first, solving, with_all, solution.value, whole.value, passes)
"""
)

LIBSVM = (
    MEASURE
    + """
import sys
import numpy as np
from jdml.partition.sources import LibsvmStream, StreamBatches, accumulate, read_libsvm

def least_squares(path, w):
    stream = LibsvmStream(path, num_features=w.size, zero_based=False, chunk_bytes=1 << 20)

    def sums(chunk):
        error = chunk.rows @ w - chunk.labels
        return {"value": error @ error, "gradient": chunk.rows.T @ error}

    return stream, accumulate(stream, sums, progress=False)

w = np.linspace(-1, 1, 1000)
least_squares(sys.argv[1] + "/small.svm", w)
before = held("Rss")
forget_peak()
stream, sums = least_squares(sys.argv[1] + "/large.svm", w)
grown = held("VmHWM", "status") - before
forget_peak()
batches = StreamBatches(stream, 100, shuffle_chunks=2)
rows = sum(next(batches).rows.shape[0] for _ in range(200))
shuffled = held("VmHWM", "status") - before
print(grown, shuffled, stream.shape[0], sums["value"], sums["gradient"][7])
"""
)


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """A logistic problem of 153 MB; and 0.7 MB of LIBSVM text, with a hundred times as much."""
    folder = tmp_path_factory.mktemp("large")
    random = np.random.default_rng(0)
    x = random.standard_normal((20_000, 1000))
    y = np.where(x @ random.standard_normal(1000) / 20 + random.logistic(size=20_000) > 0, 1, -1)
    np.save(folder / "x.npy", x)
    np.save(folder / "y.npy", y)
    lines = []
    for _ in range(1500):
        columns = np.sort(random.choice(1000, 40, replace=False)) + 1
        values = random.standard_normal(40)
        entries = " ".join(f"{c}:{v:.5f}" for c, v in zip(columns, values, strict=True))
        lines.append(f"{random.choice([-1, 1]):+d} {entries}\n")
    block = "".join(lines)
    (folder / "small.svm").write_text(block)
    with open(folder / "large.svm", "w") as file:
        for _ in range(100):
            file.write(block)
    return folder


@pytest.mark.slow
@needs_proc
def test_a_problem_larger_than_the_allowance_is_solved_as_in_memory(tables):
    """L-BFGS on 153 MB: its passes take an eighth of that, the first two, compiled, a third."""
    size = (tables / "x.npy").stat().st_size / 2**20
    first, solving, with_all, value, expected, passes = run(SOLVE, tables)
    assert first < size / 3
    assert solving < size / 8
    assert with_all > size  # in memory, it would not pass
    assert value == pytest.approx(expected, rel=1e-9)
    assert passes > 15


@needs_proc
def test_libsvm_passes_and_minibatches_in_bounded_memory(tables):
    size = (tables / "large.svm").stat().st_size / 2**20
    grown, shuffled, rows, value, gradient = run(LIBSVM, tables)
    assert max(grown, shuffled) < size / 3
    x, y = read_libsvm(tables / "small.svm", num_features=1000)
    error = x @ np.linspace(-1, 1, 1000) - y
    assert rows == 100 * len(y)
    assert value == pytest.approx(100 * error @ error, rel=1e-9)
    assert gradient == pytest.approx(100 * (x.T @ error)[7], rel=1e-9)
