"""How often a step passes over the parameters, read off its compiled program: no clock needed.

``python -m benchmarks.aggregate.passes``: for every method, bytes that the instructions of a step
read and write, in units of the parameters' own bytes, beside the hand-written steps with which
``benchmarks.aggregate`` compares its time. The model is two matrices and one sample a worker, so
that what it computes counts little: what is left is the optimiser, the exchange, and what a method
does besides.

Of a step without exchange every conditional takes its cheapest branch; with one, the conditional
whose branches differ most takes its dearest (of 0/1 Adam that is its momentum; what it does to its
variance is left out). A fusion reads each operand once.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import tyro
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.table import Table

from benchmarks.aggregate.cases import CASES, HANDS, OPTIMIZERS
from benchmarks.aggregate.hand import hand_written
from benchmarks.machine import console_of_tables, machine
from jdml.sharding import make_mesh
from jdml.sharding.hlo import Frame, Module, arrays, calls, parse
from jdml.train import make_step

PyTree = Any
NUM_WORKERS = 8
_MOVE_NOTHING = {"parameter", "constant", "get-tuple-element", "tuple", "bitcast", "iota"}
_MOVE_INSIDE = {"conditional", "call", "while"}


@dataclass(frozen=True)
class Options:
    """Options of the count."""

    methods: tuple[str, ...] = ()
    """Those whose names contain one of these; all if none is given."""
    side: int = 512
    """Rows of the two matrices."""


@dataclass(frozen=True)
class Passes:
    """Bytes read and written over bytes of the parameters."""

    alone: float
    exchange: float


class Count:
    """Two matrices, and the programs that train them."""

    def __init__(self, side: int) -> None:
        self.mesh: Mesh = make_mesh({"data": NUM_WORKERS}, devices=jax.devices()[:NUM_WORKERS])
        # Another shape each, so that the two are not taken for one another.
        self.params = {"a": jnp.ones((side, side)), "b": jnp.ones((side, side + 1))}
        placed = NamedSharding(self.mesh, P("data"))
        self.batch = jax.device_put(jnp.ones((NUM_WORKERS, side)), placed)

    @staticmethod
    def loss_fn(params: PyTree, batch: jax.Array) -> jax.Array:
        return jnp.mean(jnp.square(jnp.tanh(batch @ params["a"]) @ params["b"]))

    def method(self, name: str) -> Passes:
        """Of a method's step."""

        def loss_fn(params: PyTree, batch: jax.Array, key: jax.Array) -> tuple[jax.Array, dict]:
            return self.loss_fn(params, batch), {}

        init, step = make_step(loss_fn, CASES[name].tx(), self.mesh)
        return self._passes(step.lower, init(self.params))

    def hand(self, phase: str, optimizer: str) -> float:
        """Of a hand-written step, which has no branches."""
        init, step = hand_written(self.loss_fn, OPTIMIZERS[optimizer](), HANDS[phase], self.mesh)
        return self._passes(step.lower, init(self.params)).exchange

    def _passes(self, lower: Callable[..., Any], state: PyTree) -> Passes:
        module = parse(lower(state, self.batch).compile().as_text())
        size = sum(x.nbytes for x in jax.tree.leaves(self.params))
        least, more = moved(module, Frame(module.computations[module.entry]))
        return Passes(least / size, (least + more) / size)


def moved(module: Module, frame: Frame) -> tuple[int, int]:
    """Bytes that a computation reads and writes if every conditional takes its cheapest branch,
    and how many more if the one that makes the greatest difference takes its dearest."""
    total, most = 0, 0
    inside: dict[str, list[tuple[int, int]]] = {}
    for this, name, role in calls(module, frame):
        if role in ("branch", "call", "body"):
            found = moved(module, Frame(module.computations[name], frame, this))
            inside.setdefault(this.name, []).append(found)
    for this in frame.computation.instructions.values():
        if this.opcode in _MOVE_NOTHING:
            continue
        if this.opcode in _MOVE_INSIDE:
            least = min(x for x, _ in inside[this.name])
            total += least
            most = max([most, *(x + more - least for x, more in inside[this.name])])
            continue
        types = [this.type, *(frame.look_up(x).type for x in this.operands)]
        total += sum(x.num_bytes for text in types for x in arrays(text))
    return total, most


def main(options: Options) -> int:
    """Prints the table."""
    jax.config.update("jax_platforms", "cpu")
    with contextlib.suppress(RuntimeError):  # devices are there already
        jax.config.update("jax_num_cpu_devices", NUM_WORKERS)
    count = Count(options.side)
    hands: dict[tuple[str, str], float] = {}
    table = Table(title="Passes over the parameters in a step", caption=machine("jax"))
    table.add_column("method", no_wrap=True)
    for heading in ("alone", "local", "exchange", "bare"):
        table.add_column(heading, justify="right")
    for name, case in CASES.items():
        if not any(part in name for part in options.methods or ("",)):
            continue
        for phase in case.phases:
            if (phase, case.optimizer) not in hands:
                hands[phase, case.optimizer] = count.hand(phase, case.optimizer)
        ours = count.method(name)
        bare = max(hands[p, case.optimizer] for p in case.phases if p != "alone")
        cells = [""] * 2
        if "alone" in case.phases:
            cells = [f"{ours.alone:.1f}", f"{hands['alone', case.optimizer]:.1f}"]
        table.add_row(name, *cells, f"{ours.exchange:.1f}", f"{bare:.1f}")
    console_of_tables().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options)))
