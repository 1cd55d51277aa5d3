"""What goes over the wire, by four accounts: ``python -m benchmarks.wire_audit``.

For every codec over every collective, the bytes that the busiest of four workers sends for 1 MB of
f32 according to

1. the formula: ``jdml.communicate.predict``, from the codec's ``payload_bytes``;
2. the program that XLA compiles for CPU, read by ``jdml.sharding.collectives``;
3. the program compiled ahead of time for a TPU v5e 2 × 2, where libtpu is installed;
4. the kernel's counters of the interfaces of four processes in network namespaces (root on Linux).

The first three are to be equal. The fourth adds what carries the payload (66 bytes of Ethernet, IP
and TCP headers for every packet of up to 64 KiB, one such header per acknowledgement, and Gloo's
own small messages): at most ``FRAMING`` of the payload and ``PER_MESSAGE`` bytes for each hop. What
the barriers around a round send is measured and taken off.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import tyro
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.exchange_jdml import exchange, workers_mesh
from benchmarks.links import crews
from benchmarks.machine import console_of_tables, machine
from benchmarks.methods import NUM_MATRICES, PATTERNS, cost, method, sending_codecs
from benchmarks.namespaces import NamespacesUnavailable, linked_workers
from jdml.communicate import Link
from jdml.communicate.codecs.reducer import Reducer
from jdml.sharding import bytes_per_axis, collectives

NUM_WORKERS = 4
FRAMING = 0.05
PER_MESSAGE = 1000
TPU = "v5e:2x2"
GLOO_MORE = {"exact reduce_scatter": 4 / 3}
"""What Gloo sends of an optimal algorithm's bytes, where that is more: its reduce-scatter among
four sends the whole vector (jax 0.10.2; the others are optimal)."""
# What LLVM makes of a program changes nothing on the wire: half the time to compile.
FAST_COMPILE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
XLA_FLAGS = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
_NO_LINK = Link(latency=0.0, bandwidth=1.0)


@dataclass(frozen=True)
class Options:
    """Options of the audit."""

    side: int = 256
    """Each worker holds four side × side matrices of f32."""
    methods: tuple[str, ...] = ()
    """A codec, perhaps followed by a pattern; all of them if none is named."""
    tpu: bool = True
    """Compile for TPU too, where libtpu is installed."""
    interfaces: bool = True
    """Count on interfaces too, where namespaces are permitted."""
    rounds: int = 3
    json: Path | None = None
    """Write the table there."""
    timeout_s: float = 300.0


@dataclass
class Row:
    """Bytes that the busiest worker sends; None where that was not asked."""

    name: str
    formula: int
    num_hops: int
    cpu: int | None = None
    tpu: int | None = None
    interface: float | None = None

    @property
    def interface_bound(self) -> float:
        """The most that the interface may count."""
        sent = self.formula * GLOO_MORE.get(self.name, 1)
        return (1 + FRAMING) * sent + PER_MESSAGE * self.num_hops

    def agrees(self) -> bool:
        """Whether the accounts that there are agree."""
        programs = all(x in (None, self.formula) for x in (self.cpu, self.tpu))
        counted = self.interface is None or self.formula <= self.interface <= self.interface_bound
        return programs and counted


def all_methods() -> list[str]:
    """Every codec over every pattern; a reducer has a pattern of its own."""
    names = []
    for codec, content in sending_codecs().items():
        patterns = ("two_phase",) if isinstance(content, Reducer) else PATTERNS
        names += [codec if p == "two_phase" else f"{codec} {p}" for p in patterns]
    return names


def formula(name: str, side: int, num_workers: int = NUM_WORKERS) -> Row:
    """What the library claims that a method sends."""
    claimed = cost(method(name), side, num_workers, _NO_LINK)
    return Row(name, claimed.sent_bytes, claimed.num_hops)


def compiled_bytes(name: str, side: int, devices: Sequence[Any]) -> int:
    """Bytes that one device sends, by the program compiled for these devices."""
    this = method(name)
    mesh = workers_mesh(this.pattern, devices)
    init, one_round = exchange(this, mesh, side)
    workers = NamedSharding(mesh, P(mesh.axis_names))
    size = NUM_MATRICES * side * side
    x = jax.ShapeDtypeStruct((len(devices), size), jnp.float32, sharding=workers)
    state = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=workers), jax.eval_shape(init, x)
    )
    seed = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh, P()))
    options = FAST_COMPILE if devices[0].platform == "cpu" else None
    compiled = jax.jit(one_round).lower(x, state, seed).compile(options)
    return sum(bytes_per_axis(collectives(compiled, mesh)).values())


def tpu_devices() -> Sequence[Any]:
    """The devices of ``TPU``, to compile for.

    Raises:
      RuntimeError: libtpu is not installed, or cannot be loaded here.
    """
    from jax.experimental import topologies

    wanted = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
    os.environ.update({k: v for k, v in wanted.items() if k not in os.environ})
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=TPU).devices
    except Exception as error:
        raise RuntimeError(f"no libtpu here: {error}") from error


def interface_bytes(
    names: Sequence[str], side: int, rounds: int, timeout_s: float, console: Console | None = None
) -> dict[str, float]:
    """Bytes that left the busiest of four real processes, what the barriers send taken off.

    Raises:
      NamespacesUnavailable: not Linux, not root, or the kernel refused.
    """
    counted: dict[str, float] = {}

    def median(answers: Sequence[Sequence[dict[str, float]]], worker: int) -> float:
        return statistics.median(answer[worker]["sent"] for answer in answers)

    with (
        linked_workers(NUM_WORKERS) as workers,
        crews(workers, side, False, timeout_s, xla_flags=XLA_FLAGS) as (us, _),
    ):
        us.ask("quiet")  # connects
        quiet = [us.ask("quiet") for _ in range(9)]
        shown = names if console is None else track(names, "on interfaces", console=console)
        for name in shown:
            us.ask("prepare", name=name)
            us.ask("round", name=name, number=0)
            told = [us.ask("round", name=name, number=i) for i in range(1, rounds + 1)]
            counted[name] = max(median(told, i) - median(quiet, i) for i in range(NUM_WORKERS))
    return counted


def audit(options: Options, console: Console) -> list[Row]:
    """All accounts that can be had here."""
    names = options.methods or tuple(all_methods())
    rows = [formula(name, options.side) for name in names]
    devices = jax.devices()[:NUM_WORKERS]
    for row in track(rows, "compiling for CPU", console=console, transient=True):
        row.cpu = compiled_bytes(row.name, options.side, devices)
    if options.tpu:
        try:
            devices = tpu_devices()
        except RuntimeError as error:
            console.print(f"TPU column left out: {error}", markup=False)
        else:
            for row in track(rows, "compiling for TPU", console=console, transient=True):
                row.tpu = compiled_bytes(row.name, options.side, devices)
    if options.interfaces:
        try:
            counted = interface_bytes(
                names, options.side, options.rounds, options.timeout_s, console
            )
        except NamespacesUnavailable as error:
            console.print(f"interface column left out: {error}", markup=False)
        else:
            for row in rows:
                row.interface = counted[row.name]
    return rows


def report(options: Options, rows: Sequence[Row]) -> Table:
    """All rows, with what is missing left empty."""
    size = NUM_MATRICES * options.side**2
    table = Table(
        title=f"Bytes that the busiest of {NUM_WORKERS} workers sends, {size:,} f32 elements each",
        caption=machine("jax", "libtpu"),
    )
    table.add_column("method", no_wrap=True)
    headings = ("bits / element", "formula", "CPU program", "TPU program", "interface", "over")
    for heading in headings:
        table.add_column(heading, justify="right")
    table.add_column("agree")

    def number(x: float | None) -> str:
        return "" if x is None else f"{x:,.0f}"

    for row in rows:
        over = None if row.interface is None else row.interface / row.formula - 1
        table.add_row(
            row.name,
            f"{8 * row.formula / size:.3f}",
            number(row.formula),
            number(row.cpu),
            number(row.tpu),
            number(row.interface),
            "" if over is None else f"{100 * over:+.1f} %",
            "yes" if row.agrees() else "NO",
        )
    return table


def main(options: Options) -> int:
    """Prints the table; status 1 if accounts differ."""
    jax.config.update("jax_platforms", "cpu")
    with contextlib.suppress(RuntimeError):  # devices are there already
        jax.config.update("jax_num_cpu_devices", NUM_WORKERS)
    console = console_of_tables()
    rows = audit(options, console)
    console.print(report(options, rows))
    if options.json is not None:
        content = {"machine": machine("jax", "libtpu"), "rows": [vars(row) for row in rows]}
        content["options"] = {k: v for k, v in dataclasses.asdict(options).items() if k != "json"}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    differ = [row.name for row in rows if not row.agrees()]
    if differ:
        console.print(f"accounts differ: {', '.join(differ)}", markup=False)
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options)))
