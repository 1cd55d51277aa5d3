"""What each aggregation adds to a step: ``python -m benchmarks.aggregate``.

For every method, on eight simulated CPU devices, in turns and in one process:

- a step in which no exchange is due, against plain local training of the same model with the same
  inner optimiser, written by hand: at most ``ALONE``;
- a step that exchanges, against the hand-written one with a bare collective of the same payload
  (``lax.pmean``, ``ppermute``, …): at most ``EXCHANGE``. What a method computes besides (an outer
  optimiser, dual variables) counts against it. Compressed methods are compared with the library's
  own ``all_reduce_mean`` of the same payload: ``benchmarks.codecs`` and ``benchmarks.links``
  measure that.

The ratio is the median over rounds of the ratio of two steps that ran one after the other. What
``--json`` holds already, with the same options and versions on the same day, is not measured again.
All of it takes about ten minutes on two cores. What a method does to parameters does not grow with
the batch: at half of these 1,024 tokens a worker its share is twice as much.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import tyro
from rich.table import Table

from benchmarks.aggregate.cases import CASES
from benchmarks.aggregate.measure import NUM_WORKERS, Bench, Size
from benchmarks.machine import console_of_tables, machine

TARGETS = {"alone": 1.05, "exchange": 1.10}


@dataclass(frozen=True)
class Options:
    """Options of the benchmark."""

    size: Size = field(default_factory=Size)
    rounds: int = 11
    """How often each step is timed."""
    methods: tuple[str, ...] = ()
    """Those whose names contain one of these; all if none is given."""
    json: Path | None = None
    """Keep what is measured there, and go on from it."""


def chosen(options: Options) -> list[str]:
    """Names of the methods asked for.

    Raises:
      ValueError: none has such a name.
    """
    for part in options.methods:
        if not any(part in name for name in CASES):
            raise ValueError(f"--methods {part!r}: in none of {', '.join(CASES)}.")
    parts = options.methods or ("",)
    return [name for name in CASES if any(part in name for part in parts)]


def held(options: Options) -> dict[str, Any]:
    """Rows measured before with these options here; ``{}`` if there are none."""
    if options.json is None or not options.json.exists():
        return {}
    content = json.loads(options.json.read_text())
    same = content["machine"] == machine("jax") and content["options"] == described(options)
    return content["rows"] if same else {}


def described(options: Options) -> dict[str, Any]:
    """What figures depend on, as JSON gives it back."""
    content = {"size": dataclasses.asdict(options.size), "rounds": options.rounds}
    return json.loads(json.dumps(content, default=str))


def keep(options: Options, rows: dict[str, Any]) -> None:
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        content = {"machine": machine("jax"), "options": described(options), "rows": rows}
        options.json.write_text(json.dumps(content, indent=1) + "\n")


def table_of(rows: dict[str, Any], num_params: int, size: Size) -> Table:
    """Milliseconds of the method's steps, and their ratios."""
    table = Table(
        title=f"A step of {num_params:,} parameters, {size.samples} × {size.seq} tokens a worker, "
        "eight workers",
        caption=f"{machine('jax')}\n"
        "CPU: the ratio of processor time, which a busy machine disturbs less\n"
        f"targets: alone at most {TARGETS['alone']}, with exchange at most {TARGETS['exchange']}",
    )
    table.add_column("method", no_wrap=True)
    for heading in ("alone, ms", "/ local", "CPU", "exchange, ms", "/ bare", "CPU"):
        table.add_column(heading, justify="right")
    table.add_column("")
    for name, row in rows.items():
        cells = []
        for kind in TARGETS:
            one = row.get(kind)
            cells += [""] * 3 if one is None else [f"{1e3 * one['ours']:.1f}"]
            cells += [f"{one[k]:.3f}" for k in ("ratio", "cpu_ratio") if one is not None]
        table.add_row(name, *cells, ", ".join(f"{kind} over" for kind in over(row)))
    return table


def over(row: dict[str, Any]) -> list[str]:
    """Kinds of step that miss their target."""
    return [kind for kind, target in TARGETS.items() if kind in row and row[kind]["ratio"] > target]


def main(options: Options) -> int:
    """Prints the table; status 1 if a target is missed."""
    jax.config.update("jax_platforms", "cpu")
    with contextlib.suppress(RuntimeError):  # devices are there already
        jax.config.update("jax_num_cpu_devices", NUM_WORKERS)
    console = console_of_tables()
    names = chosen(options)
    rows = held(options)
    missing = [name for name in names if name not in rows]
    bench = Bench(options.size) if missing else None
    for name in missing:
        assert bench is not None
        with console.status(name):
            measured = bench.measure(name, options.rounds)
        rows[name] = {kind: times.summary() for kind, times in measured.items()}
        keep(options, rows)
    shown = {name: rows[name] for name in names}
    console.print(table_of(shown, options.size.model.num_params, options.size))
    return 1 if any(over(row) for row in shown.values()) else 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options)))
