"""Pipelines on eight simulated devices beside one device that does the same work.

    python -m benchmarks.pipeline

Every contender computes the loss and gradients of one transformer on one batch in the same
micro-batches, in turns in one process. The simulated devices share the machine's cores, so that a
stage that waits costs nothing: what is measured is what a pipeline adds to the work, its exchanges,
buffers and bookkeeping. What waiting costs is in the last columns, from the timetable that ran.
"""

import statistics
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from rich.console import Console
from rich.table import Table

from benchmarks.machine import console_of_tables, machine
from benchmarks.step import NUM_DEVICES, in_turns
from jdml.models import Transformer, TransformerConfig, pipeline_parts
from jdml.partition.pipeline import (
    Schedule,
    gpipe,
    interleaved,
    one_f_one_b,
    pipeline,
    simulate,
    zero_bubble,
)
from jdml.sharding import make_mesh, no_mesh, shard

CONFIG = TransformerConfig(num_layers=8, remat="none")
SEQUENCES, LENGTH, MICRO_BATCHES = 16, 128, 8
CASES: dict[str, tuple[int, Schedule, bool]] = {
    "GPipe": (8, gpipe(), False),
    "1F1B": (8, one_f_one_b(), False),
    "1F1B, remat": (8, one_f_one_b(), True),
    "interleaved, 2 chunks": (4, interleaved(2), False),
    "ZB-H1": (8, zero_bubble(), False),
}


def contenders(
    config: TransformerConfig, sequences: int, length: int, micro_batches: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Compiled functions of nothing by name, the one device's first; and the pipelines."""
    model = Transformer(config, rngs=nnx.Rngs(0))
    parts = pipeline_parts(model)
    params = nnx.to_pure_dict(nnx.state(model))
    tokens = jax.random.randint(
        jax.random.key(0), (sequences, length + 1), 0, config.vocab_size, jnp.int32
    )
    batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}
    runs: dict[str, Any] = {}
    pipes: dict[str, Any] = {}
    for name, (num_stages, schedule, remat) in CASES.items():
        mesh = make_mesh({"stage": num_stages}, devices=jax.devices()[:num_stages])
        pipe = pipeline(
            *parts,
            mesh,
            num_layers=config.num_layers,
            micro_batches=micro_batches,
            schedule=schedule,
            remat=remat,
        )
        with no_mesh():
            if not runs:
                one = jax.jit(jax.value_and_grad(pipe.reference, has_aux=True))
                compiled = one.lower(params, batch).compile()
                runs["one device"] = lambda f=compiled: f(params, batch)
            specs = pipe.specs(jax.tree.map(lambda _: P(), params))
            arranged = shard(pipe.arrange(params), mesh, specs)
            compiled = (
                jax.jit(jax.value_and_grad(pipe, has_aux=True)).lower(arranged, batch).compile()
            )
        runs[name] = lambda f=compiled, p=arranged: f(p, batch)
        pipes[name] = (pipe, compiled)
    return runs, pipes


def show(console: Console, times: dict[str, list[float]], pipes: dict[str, Any]) -> None:
    """The table: time beside one device's, temporary memory, and what the timetable says."""
    table = Table(
        title=f"Transformer of {CONFIG.num_params:,} parameters, {SEQUENCES} × {LENGTH} tokens in "
        f"{MICRO_BATCHES} micro-batches: loss and gradients"
    )
    for column in (
        "schedule",
        "stages",
        "time, ms",
        "/ one device",
        "temporaries, MB a stage",
        "ticks",
        "idle",
        "lockstep / free",
    ):
        table.add_column(column, justify="left" if column == "schedule" else "right")
    base = next(iter(times.values()))
    for name, seconds in times.items():
        ratio = statistics.median(t / b for t, b in zip(seconds, base, strict=True))
        row = [f"{1e3 * statistics.median(seconds):.0f}", f"{ratio:.2f}"]
        if name not in pipes:
            table.add_row(name, "", *row, "", "", "", "")
            continue
        pipe, compiled = pipes[name]
        num_stages = pipe.division.num_stages
        size = compiled.memory_analysis().temp_size_in_bytes
        free, locked = (
            simulate(pipe.schedule, num_stages, MICRO_BATCHES, lockstep=lockstep).span
            for lockstep in (False, True)
        )
        table.add_row(
            name,
            str(num_stages),
            *row,
            f"{size / 1e6:.1f}",
            str(pipe.timetable.ticks),
            f"{pipe.timetable.idle:.1%}",
            f"{locked / free:.2f}",
        )
    console.print(table)
    console.print(machine("jax"))


def main() -> None:
    jax.config.update("jax_num_cpu_devices", NUM_DEVICES)
    runs, pipes = contenders(CONFIG, SEQUENCES, LENGTH, MICRO_BATCHES)
    show(console_of_tables(), in_turns(runs, rounds=8), pipes)


if __name__ == "__main__":
    main()
