"""The LIBSVM reader beside scikit-learn's: ``python -m benchmarks.libsvm``.

Both read one file into CSR, in turn, from the page cache; its values are written with all digits
that f64 has, or with four. Times are medians, ratios those of one run.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse
from rich.table import Table
from sklearn.datasets import dump_svmlight_file, load_svmlight_file

from benchmarks.machine import console_of_tables, machine
from jdml.partition.sources import LibsvmStream, accumulate, read_libsvm

TARGET = 0.5  # of scikit-learn's time
TRIES = 5


def in_turn(*readers: Callable[[], Any]) -> list[float]:
    """Median seconds of each, taken in turn so that a slow moment meets all."""
    times: list[list[float]] = [[] for _ in readers]
    for _ in range(TRIES):
        for reader, taken in zip(readers, times, strict=True):
            start = time.perf_counter()
            reader()
            taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in times]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=20_000, help="of 50 non-zeros each")
    rows = parser.parse_args().rows
    random = np.random.default_rng(0)
    matrix = scipy.sparse.random_array((rows, 5000), density=0.01, rng=random).tocsr()
    labels = random.choice([-1, 1], rows)
    table = Table("file", "scikit-learn", "read_libsvm", "ratio", "one streamed pass", "target")
    with tempfile.TemporaryDirectory() as folder:
        for name, values in {
            "all digits": matrix.data,
            "four digits": np.round(matrix.data, 4),
        }.items():
            matrix.data = values
            file = Path(folder) / "data.svm"
            dump_svmlight_file(matrix, labels, str(file), zero_based=False)
            stream = LibsvmStream(file)
            theirs, ours, one_pass = in_turn(
                lambda file=file: load_svmlight_file(str(file)),
                lambda file=file: read_libsvm(file),
                lambda stream=stream: accumulate(stream, lambda c: c.rows.nnz, progress=False),
            )
            size = file.stat().st_size / 1e6
            table.add_row(
                f"{matrix.nnz / 1e6:.1f} M non-zeros, {name}, {size:.0f} MB",
                f"{theirs:.2f} s",
                f"{ours:.2f} s, {size / ours:.0f} MB/s",
                f"{ours / theirs:.2f}",
                f"{one_pass:.2f} s",
                f"{TARGET}",
            )
    console = console_of_tables()
    console.print(table)
    console.print(machine("scikit-learn", "scipy", "numpy"))


if __name__ == "__main__":
    main()
