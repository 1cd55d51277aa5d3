"""What each aggregation adds to a step: ``python -m benchmarks.aggregate``.

For every method, on eight simulated CPU devices, in turns and in one process:

- a step in which no exchange is due, against plain local training of the same model with the same
  inner optimiser, written by hand: at most ``ALONE``;
- a step that exchanges, against the hand-written one with a bare collective of the same payload
  (``lax.pmean``, ``ppermute``, …): at most ``EXCHANGE``. What a method computes besides (an outer
  optimiser, dual variables) counts against it. Compressed methods are compared with the library's
  own ``all_reduce_mean`` of the same payload: ``benchmarks.codecs`` and ``benchmarks.links``
  measure that.

The ratio is the median over rounds of the ratio of two steps that ran one after the other, with the
bounds between which the median lies in 95 of 100 such runs. A target is missed where all between
the bounds is above it; while it lies between them, rounds go on. What ``--json`` holds already,
with the same options and versions on the same day, is not measured again. What a method does to
parameters does not grow with the batch: at half of these 1,024 tokens a worker its share is twice
as much. How often it reads and writes them is counted, without a clock, by
``benchmarks.aggregate.passes``.
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
from benchmarks.aggregate.measure import NUM_WORKERS, TARGETS, Bench, Size
from benchmarks.machine import console_of_tables, machine


@dataclass(frozen=True)
class Options:
    """Options of the benchmark."""

    size: Size = field(default_factory=Size)
    rounds: int = 9
    """How often each step is timed at least."""
    most: int = 18
    """How often at most: the rounds go on while a ratio may lie on either side of its target."""
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
    content = dataclasses.asdict(options)
    content = {name: content[name] for name in ("size", "rounds", "most")}
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
    headings = ("alone, ms", "/ local", "bounds", "CPU", "exchange, ms", "/ bare", "bounds", "CPU")
    for heading in headings:
        table.add_column(heading, justify="right")
    table.add_column("")
    for name, row in rows.items():
        cells = []
        for kind in TARGETS:
            one = row.get(kind)
            if one is None:
                cells += [""] * 4
                continue
            cells += [f"{1e3 * one['ours']:.1f}", f"{one['ratio']:.3f}"]
            cells += [f"{one['low']:.3f}–{one['high']:.3f}", f"{one['cpu_ratio']:.3f}"]
        table.add_row(name, *cells, ", ".join(f"{kind} over" for kind in over(row)))
    return table


def over(row: dict[str, Any]) -> list[str]:
    """Kinds of step that miss their target, whichever value between the bounds is the true one."""
    return [kind for kind, target in TARGETS.items() if kind in row and row[kind]["low"] > target]


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
            measured = bench.measure(name, options.rounds, options.most)
        rows[name] = {kind: times.summary() for kind, times in measured.items()}
        keep(options, rows)
    shown = {name: rows[name] for name in names}
    console.print(table_of(shown, options.size.model.num_params, options.size))
    return 1 if any(over(row) for row in shown.values()) else 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options)))
