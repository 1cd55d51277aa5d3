"""What a TPU program computes while the workers exchange, with and without a delay of one step.

    python -m benchmarks.overlap

Compiles four steps of data-parallel training ahead of time for eight chips of v5e, with libtpu and
without a TPU, and reads the schedule. That says what the compiler lets run side by side; how long
it takes only a TPU can say.
"""

import importlib.util
import os
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console
from rich.table import Table

from benchmarks.machine import console_of_tables, machine
from jdml.aggregate import mean_gradients
from jdml.communicate.codecs import int8
from jdml.communicate.frequency import delayed
from jdml.sharding import ASYNCHRONOUS_ON_TPU, Overlap, make_mesh, overlap, program_flops
from jdml.train import make_step

TOPOLOGY, NUM_STEPS, WIDTH, NUM_LAYERS = "v5e:2x4", 4, 1024, 4
LOSS_BYTES = 4
EXCHANGES: dict[str, dict[str, Any]] = {
    "exact, all-reduce": {"codec": None},
    "int8, two-phase": {"codec": int8()},
    "int8, ring": {"codec": int8(), "topology": "ring"},
    "int8, tree": {"codec": int8(), "topology": "tree"},
}
OPTIONS: dict[str, dict[str, str] | None] = {
    "as they come": None,
    "asynchronous": ASYNCHRONOUS_ON_TPU,
}
"""Compiler options; permutes are asynchronous as they come."""


class Schedule(NamedTuple):
    """A compiled program as the table shows it, per step.

    Attributes:
      exchanges: Its collectives, but for the mean of the loss.
      flops: Of a step's matrix products, on one device.
    """

    exchanges: list[Overlap]
    flops: int

    @property
    def hidden(self) -> int:
        """Flops that stand behind one exchange or more."""
        return sum({name: n for item in self.exchanges for name, n in item.between}.values())

    @property
    def behind_products(self) -> str:
        """Megabytes of exchanges behind which some product stands, and of all of them."""
        counted = [
            (i.collective.sent_bytes * (i.collective.count or 0) / NUM_STEPS, bool(i.flops))
            for i in self.exchanges
        ]
        behind = sum(size for size, yes in counted if yes)
        return f"{behind / 1e6:.2f} of {sum(size for size, _ in counted) / 1e6:.2f}"


def tpu_mesh() -> Mesh:
    """Eight chips that need not be there."""
    from jax.experimental import topologies

    return make_mesh(
        {"data": 8}, devices=topologies.get_topology_desc(TOPOLOGY, platform="tpu").devices
    )


def compile_steps(
    mesh: Mesh,
    exchange: dict[str, Any],
    delay: int,
    options: dict[str, str] | None,
    width: int = WIDTH,
    num_layers: int = NUM_LAYERS,
) -> Schedule:
    """``NUM_STEPS`` steps of a network of dense layers in one program."""
    mean = mean_gradients("data", **exchange)

    def loss_fn(params: Any, batch: Any, key: Any) -> Any:
        hidden = batch["x"]
        for kernel in params:
            hidden = jnp.tanh(hidden @ kernel)
        return jnp.mean((hidden - batch["y"]) ** 2), {}

    init, step = make_step(
        loss_fn,
        optax.chain(delayed(mean, delay), optax.sgd(0.1)),
        mesh,
        steps_per_call=NUM_STEPS,
        compiler_options=options,
    )
    state = init.abstract([jax.ShapeDtypeStruct((width, width), jnp.float32)] * num_layers)
    sharding = NamedSharding(mesh, P(None, "data"))
    rows = jax.ShapeDtypeStruct((NUM_STEPS, 8 * width, width), jnp.float32, sharding=sharding)
    compiled = step.lower(state, {"x": rows, "y": rows}).compile()
    found = [i for i in overlap(compiled, mesh) if i.collective.payload_bytes > LOSS_BYTES]
    return Schedule(found, program_flops(compiled) // NUM_STEPS)


def show_schedule(console: Console, title: str, schedule: Schedule) -> None:
    """Start … what is computed … done, in the order in which they are issued."""
    console.print(f"\n{title}: what stands between")
    for item in schedule.exchanges:
        if item.start == item.done:
            console.print(f"  {item.start}: not split, nothing")
            continue
        products = [f"{name} ({n / 1e9:.2f} GFLOP)" for name, n in item.between if n]
        others = len(item.between) - len(products)
        work = ", ".join([*products, *([f"{others} without products"] if others else [])])
        console.print(
            f"  {item.start} … {work or 'nothing'} … {item.done}",
            highlight=False,
            soft_wrap=True,
        )


def main() -> None:
    if importlib.util.find_spec("libtpu") is None:
        print("benchmarks.overlap: skipped, libtpu is not installed: pip install 'jdml[tpu]'")
        sys.exit(0)
    for name, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }.items():
        os.environ.setdefault(name, value)
    jax.config.update("jax_platforms", "cpu")
    mesh, console = tpu_mesh(), console_of_tables()
    table = Table(
        title=f"One step of {NUM_LAYERS} dense layers of {WIDTH} × {WIDTH}, {WIDTH} samples per "
        f"worker, on {TOPOLOGY}: what is issued behind the workers' exchange"
    )
    for column in ("exchange", "compiler options"):
        table.add_column(column)
    for column in ("MB behind products", "share of the step's flops"):
        for delay in (0, 1):
            table.add_column(f"{column}, delay {delay}", justify="right")
    shown = []
    for name, exchange in EXCHANGES.items():
        for label, options in OPTIONS.items():
            if options and "topology" in exchange:
                continue  # permutes need none
            both = [compile_steps(mesh, exchange, delay, options) for delay in (0, 1)]
            table.add_row(
                name,
                label,
                *(s.behind_products for s in both),
                *(f"{s.hidden / s.flops:.0%}" for s in both),
            )
            if options:
                shown += [(f"{name}, delay {d}", s) for d, s in enumerate(both)]
    console.print(table)
    console.print(machine("jax", "libtpu"))
    for title, schedule in shown:
        show_schedule(console, title, schedule)


if __name__ == "__main__":
    main()
