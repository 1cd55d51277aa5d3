"""How PowerSGD's left factors are best made orthonormal: ``python -m benchmarks.orthogonalise``.

Three ways on thin matrices ``[rank, rows]``, rank first, f32: Gram-Schmidt row by row (each row's
part in those after it is taken out, as in the paper), Householder's QR (LAPACK on CPU), and what
``power_sgd`` does, Gram-Schmidt on the Gram matrices of all leaves at once, three times. Given are
the least processor time of one call on one device; where the rows' condition number is 10^5, how
far ``P^T P`` is from a projection and how much of the rows it loses; and, where the rows are
divided over eight devices, how many collectives a call takes and what a device sends.
"""

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console
from rich.table import Table

from benchmarks.machine import machine
from jdml.communicate.codecs.orthogonalise import orthonormal_rows
from jdml.sharding import bytes_per_axis, collectives, make_mesh

NUM_DEVICES = 8
RANKS = (1, 4, 16)
ONE = [(1, 2048)]
# (matrices, rows) of a transformer's leaves: six layers, 256 wide, hidden 704.
TRANSFORMER = [(6, 256)] * 3 + [(6, 704)] * 3 + [(1, 256)] * 2

Orthogonalise = Callable[[Sequence[jax.Array]], list[jax.Array]]


def row_by_row(matrices: Sequence[jax.Array]) -> list[jax.Array]:
    """Modified Gram-Schmidt, 1e-8 added to each length as in PyTorch's hook."""

    def one(p: jax.Array) -> jax.Array:
        rows = [p[:, i] for i in range(p.shape[1])]
        for i, row in enumerate(rows):
            row = row / (jnp.linalg.norm(row, axis=-1, keepdims=True) + 1e-8)
            rows[i] = row
            for j in range(i + 1, len(rows)):
                rows[j] = rows[j] - jnp.sum(row * rows[j], axis=-1, keepdims=True) * row
        return jnp.stack(rows, axis=1)

    return [one(p) for p in matrices]


def householder(matrices: Sequence[jax.Array]) -> list[jax.Array]:
    return [jnp.linalg.qr(p.swapaxes(1, 2))[0].swapaxes(1, 2) for p in matrices]


def gram(matrices: Sequence[jax.Array]) -> list[jax.Array]:
    return orthonormal_rows(matrices, [1] * len(matrices))


WAYS: dict[str, Orthogonalise] = {
    "row by row": row_by_row,
    "Householder": householder,
    "Gram": gram,
}


class Measured(NamedTuple):
    """One way at one rank; see the module."""

    microseconds: float
    compile_s: float
    error: float
    lost: float
    num_collectives: int
    sent_bytes: int


def graded(shape: tuple[int, int], rank: int, condition: float) -> jax.Array:
    """``[matrices, rank, rows]`` of this condition number."""
    draw = np.random.default_rng(0).standard_normal
    count, num_rows = shape
    turn, base = np.linalg.qr(draw((count, rank, rank)))[0], draw((count, num_rows, rank))
    base = np.linalg.qr(base)[0].swapaxes(1, 2)
    values = np.geomspace(1, 1 / condition, rank)[:, None]
    return jnp.asarray(turn @ (values * base), jnp.float32)


def inexactness(x: jax.Array, p: jax.Array) -> tuple[float, float]:
    """``(error, lost)``: see the module; eigenvalues of ``P P^T`` should be 0 or 1."""
    given, found = np.asarray(x, np.float64), np.asarray(p, np.float64)
    values = np.linalg.eigvalsh(found @ found.swapaxes(1, 2))
    missing = given - given @ found.swapaxes(1, 2) @ found
    lost = np.linalg.norm(missing, axis=2) / np.linalg.norm(given, axis=2)
    return float(np.minimum(abs(values), abs(values - 1)).max()), float(lost.max())


def measure(
    way: Orthogonalise, shapes: list[tuple[int, int]], rank: int, mesh: Mesh, rounds: int = 50
) -> Measured:
    given = [graded(shape, rank, 10.0) for shape in shapes]
    start = time.process_time()
    compiled = jax.jit(way).lower(given).compile()
    compile_s = time.process_time() - start
    seconds = []
    for _ in range(rounds):
        start = time.process_time()
        jax.block_until_ready(compiled(given))
        seconds.append(time.process_time() - start)
    hard = [graded(shape, rank, 1e5) for shape in shapes]
    quality = [inexactness(x, p) for x, p in zip(hard, jax.jit(way)(hard), strict=True)]
    divided = NamedSharding(mesh, P(None, None, "shard"))
    program = jax.jit(way, in_shardings=([divided] * len(given),), out_shardings=divided)
    found = collectives(program.lower(given).compile(), mesh)
    return Measured(
        1e6 * min(seconds),
        compile_s,
        max(error for error, _ in quality),
        max(lost for _, lost in quality),
        sum(c.count or rank for c in found),  # a loop whose length is not told is one over rows
        sum(bytes_per_axis(found, unknown_count=rank).values()),
    )


def main() -> None:
    jax.config.update("jax_num_cpu_devices", NUM_DEVICES)
    jax.config.update("jax_enable_compilation_cache", False)
    console = Console()
    console.print(machine("jax", "jaxlib"))
    mesh = make_mesh({"shard": NUM_DEVICES})
    for title, shapes in (("One matrix of 2048 rows", ONE), ("A transformer's", TRANSFORMER)):
        table = Table(title=title)
        for column in ("rank", "way", "µs", "compile, s", "error", "lost", "collectives", "bytes"):
            table.add_column(column, justify="left" if column == "way" else "right")
        for rank in RANKS:
            for name, way in WAYS.items():
                m = measure(way, shapes, rank, mesh)
                table.add_row(
                    str(rank),
                    name,
                    f"{m.microseconds:.0f}",
                    f"{m.compile_s:.2f}",
                    f"{m.error:.0e}",
                    f"{m.lost:.0e}",
                    str(m.num_collectives),
                    f"{m.sent_bytes:,}",
                )
        console.print(table)


if __name__ == "__main__":
    main()
