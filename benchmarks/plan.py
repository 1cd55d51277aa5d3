"""What the planner predicts beside what TPU's compiler makes, and how far one step scales.

    python -m benchmarks.plan                  # the small cases; a minute or two each
    python -m benchmarks.plan llama3-8b-64 …   # some by name
    python -m benchmarks.plan --show           # the record, without compiling

Compiled ahead of time with libtpu, without a TPU. What the compiler said is kept in
``tests/plan/compiled.json``, to which the tests hold the formulas wherever they run.
"""

import argparse
import dataclasses
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import jax
from rich.table import Table

from benchmarks.machine import console_of_tables, machine
from jdml.models import TransformerConfig
from jdml.models.transformer.presets import llama3
from jdml.partition.pipeline.timetable import BRANCHES
from jdml.plan import Case, Compiled, Layout, parse_algorithm, parse_topology
from jdml.plan.largest import largest
from jdml.plan.report import CLASSES, compiled_by_axis, compiled_traffic, sent_by_axis
from jdml.plan.ticks import ticks_of
from jdml.plan.work import Work, predict_work

RECORD = Path(__file__).resolve().parents[1] / "tests/plan/compiled.json"

_SMALL = TransformerConfig(
    vocab_size=16_384,
    num_layers=3,
    embed_dim=1024,
    num_heads=8,
    num_kv_heads=4,
    head_dim=128,
    mlp_dim=3072,
    dtype="bfloat16",
    remat="full",
)
_8B, _70B = llama3("8b", remat="full"), llama3("70b", remat="full")


def _case(
    config: TransformerConfig,
    topology: str,
    layout: Layout,
    batch: int,
    seq: int,
    algorithm: str = "exact",
) -> tuple[Case, Layout]:
    made = Case(config, parse_topology(topology), batch, seq, parse_algorithm(algorithm))
    return made, layout


SMALL = {
    "fsdp": _case(_SMALL, "v5e:4x4", Layout(4, 4, 1), 32, 512),
    "fsdp-tensor": _case(_SMALL, "v5e:4x4", Layout(2, 2, 4), 16, 1024),
    "v5p": _case(_SMALL, "v5p:2x2x4", Layout(1, 4, 4), 16, 1024),
    "v6e": _case(_SMALL, "v6e:4x4", Layout(1, 4, 4), 16, 1024),
    "fsdp-torus": _case(_SMALL, "v5e:4x4", Layout(1, 16, 1), 16, 1024),
    "slices-int8": _case(_SMALL, "2*v5e:4x4", Layout(2, 4, 4), 32, 1024, "int8"),
    "slices-exact": _case(_SMALL, "2*v5e:4x4", Layout(2, 16, 1), 32, 1024),
    "diloco": _case(_SMALL, "v6e:4x4", Layout(4, 4, 1), 32, 1024, "diloco:100"),
    "dots-tensor": _case(
        dataclasses.replace(_SMALL, remat="dots"), "v5e:4x4", Layout(4, 1, 4), 16, 1024
    ),
    "data": _case(_SMALL, "v5e:2x4", Layout(8, 1, 1), 16, 512),
}
"""Small models, divided over data × fsdp × model."""

_FOUR = dataclasses.replace(_SMALL, num_layers=4, max_seq_len=65_536)
_GATHER = dataclasses.replace(_FOUR, attention="gather", seq_order="zigzag", flatten_tokens=False)
_ULYSSES = dataclasses.replace(_FOUR, attention="ulysses", flatten_tokens=False)
_EXPERTS = dataclasses.replace(_FOUR, num_experts=8, experts_per_token=2, mlp_dim=1536)

FURTHER = {
    "stages": _case(_FOUR, "v5e:4x4", Layout(4, stage=4, micro_batches=8), 64, 1024),
    "stages-fsdp": _case(_FOUR, "v5e:4x4", Layout(fsdp=4, stage=4, micro_batches=8), 64, 1024),
    "ring": _case(_FOUR, "v5e:4x4", Layout(fsdp=4, seq=4), 8, 4096),
    "gather": _case(_GATHER, "v5e:4x4", Layout(fsdp=4, seq=4), 8, 4096),
    "ulysses": _case(_ULYSSES, "v5e:4x4", Layout(fsdp=4, seq=4), 8, 4096),
    "experts": _case(_EXPERTS, "v5e:4x4", Layout(fsdp=4, expert=4), 32, 1024),
}
"""Small models, with stages, divided sequences and experts."""

SCALE = {
    "llama3-8b-64": _case(_8B, "v5p:4x4x4", Layout(1, 16, 4), 64, 4096),
    "llama3-8b-256": _case(_8B, "v5p:4x8x8", Layout(4, 16, 4), 256, 4096),
    "llama3-8b-1024": _case(_8B, "v5p:8x8x16", Layout(16, 16, 4), 1024, 4096),
    "llama3-8b-v5e-256": _case(_8B, "v5e:16x16", Layout(1, 256, 1), 256, 4096),
    "llama3-70b-1024": _case(_70B, "v5p:8x8x16", Layout(1, 128, 8), 512, 4096),
    "llama3-70b-slices": _case(_70B, "2*v5p:8x8x8", Layout(2, 64, 8), 512, 4096),
}
"""Published shapes on pods; several minutes each. The first three keep the load of a chip and
divide the model alike, on 64, 256 and 1,024."""

CASES = {**SMALL, **FURTHER, **SCALE}


def entry_of(found: Compiled) -> dict[str, Any]:
    """What the record keeps of a program."""
    return {
        "memory": {name: getattr(found.memory, name) for name in CLASSES},
        "flops": found.flops,
        "collectives": compiled_traffic(found),
        "sent_by_axis": compiled_by_axis(found),
        "compile_seconds": round(found.seconds, 1),
        "compile_cpu_seconds": round(found.cpu_seconds, 1),
    }


def listed_flops(case: Case, layout: Layout) -> float:
    """FLOPs as a program's text shows them: of a pipeline, B with the final part in every tick."""
    work = predict_work(case.config, layout, case.batch, case.seq)
    if layout.stage == 1:
        return work.total - _in_kernels(case, layout, work)
    ticks = ticks_of(layout)
    share = ticks.number / ticks.runs(BRANCHES.index("B"))
    return share * (work.backward + work.head)


def _in_kernels(case: Case, layout: Layout, work: Work) -> float:
    """FLOPs of experts' products: a TPU's compiler makes kernels of them, which do not say."""
    if case.config.num_experts is None:
        return 0.0
    met = case.config.experts_per_token
    one_more = dataclasses.replace(case.config, experts_per_token=met + 1)
    return met * (predict_work(one_more, layout, case.batch, case.seq).total - work.total)


def read_record() -> dict[str, Any]:
    return json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.is_file() else {}


def table_of(record: dict[str, Any]) -> Table:
    """Predicted over compiled."""
    table = Table(title="A chip's share of a step: compiled, and predicted / compiled")
    for name in ("case", "chips", "mesh"):
        table.add_column(name)
    for name in ("GB", "ratio", "MB sent", "ratio", "GFLOP", "ratio", "MB, largest", "compiled, s"):
        table.add_column(name, justify="right")
    for name, (case, layout) in CASES.items():
        if name not in record:
            continue
        entry, predicted = record[name], case.predict(layout)
        held = sum(entry["memory"].values())
        sent = sum(entry["sent_by_axis"].values())
        table.add_row(
            name,
            str(case.topology),
            layout.mesh,
            f"{held / 1e9:.3f}",
            f"{predicted.memory.total / held:.3f}",
            f"{sent / 1e6:,.0f}",
            f"{sum(sent_by_axis(predicted).values()) / sent:.3f}",
            f"{entry['flops'] / 1e9:,.0f}",
            f"{listed_flops(case, layout) / entry['flops']:.3f}",
            f"{max(row.get('largest', 0) for row in entry['collectives']) / 1e6:,.1f}",
            "" if entry["compile_seconds"] is None else f"{entry['compile_seconds']:.0f}",
        )
    return table


def table_of_scale(record: dict[str, Any]) -> Table:
    """Whether published shapes fit pods, and what a chip holds and exchanges at once."""
    table = Table(title="Published shapes on pods: a chip's share, and a layer's")
    for name in ("case", "chips", "data × fsdp × model"):
        table.add_column(name)
    for name in (
        "parameters, GB",
        "/ (total / shards)",
        "GB in all",
        "of",
        "largest of parameters, MB",
        "/ a layer's",
        "of activations, MB",
        "/ a layer's",
        "compiled, s",
        "of a processor",
    ):
        table.add_column(name, justify="right")
    for name, (case, layout) in SCALE.items():
        if name not in record:
            continue
        entry = record[name]
        memory = entry["memory"]
        shards = layout.fsdp * layout.model
        rows = [row for row in entry["collectives"] if "largest" in row]
        found = largest(rows, case.config, layout, case.batch, case.seq)
        cells = [
            cell
            for kind in ("parameters", "activations")
            for cell in (
                (f"{found[kind].row['largest'] / 1e6:,.0f}", f"{found[kind].layers:.2f}")
                if kind in found
                else ("", "")
            )
        ]
        table.add_row(
            name,
            str(case.topology),
            " × ".join(map(str, layout.sizes.values())),
            f"{memory['parameters'] / 1e9:.3f}",
            f"{memory['parameters'] / (4 * case.config.num_params / shards):.4f}",
            f"{sum(memory.values()) / 1e9:.1f}",
            f"{case.topology.chip.memory / 1e9:.1f}",
            *cells,
            f"{entry['compile_seconds']:.0f}",
            f"{entry['compile_cpu_seconds']:.0f}" if "compile_cpu_seconds" in entry else "",
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plan")
    parser.add_argument("names", nargs="*", help=f"of {', '.join(CASES)}; the small ones")
    parser.add_argument("--show", action="store_true", help="the record, without compiling")
    options = parser.parse_args()
    unknown = set(options.names) - CASES.keys()
    if unknown:
        parser.error(f"{', '.join(sorted(unknown))}: expected some of {', '.join(CASES)}")
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)
    console = console_of_tables()
    if not options.show:
        if importlib.util.find_spec("libtpu") is None:
            print("benchmarks.plan: skipped, libtpu is not installed: pip install 'jdml[tpu]'")
            sys.exit(0)
        for name in options.names or SMALL:
            case, layout = CASES[name]
            entry = entry_of(case.compile(layout))
            record = {**read_record(), name: entry}
            RECORD.write_text(
                json.dumps(dict(sorted(record.items())), indent=1) + "\n", encoding="utf-8"
            )
            print(f"{name}: compiled in {entry['compile_seconds']} s", flush=True)
    console.print(table_of(read_record()))
    console.print(table_of_scale(read_record()))
    console.print(machine("jax", "libtpu"))


if __name__ == "__main__":
    main()
