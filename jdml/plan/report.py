"""A plan as tables for people and as JSON for programs."""

from typing import Any

from rich.console import Console
from rich.table import Table

from jdml.models import TransformerConfig
from jdml.plan.apart import Failed
from jdml.plan.memory import Memory
from jdml.plan.planner import Found, Plan
from jdml.plan.program import Compiled, DoesNotFit
from jdml.plan.roofline import Prediction

CLASSES = ("parameters", "gradients", "optimiser", "activations", "temporaries")
_MOST_ROWS = 12


def show(plan: Plan, console: Console) -> None:
    """Prints the ranking, then for each compiled mesh what it holds and sends."""
    case = plan.case
    chip = case.topology.chip
    console.print(
        f"{_model(case.config)}, {case.config.dtype}, remat {case.config.remat}; "
        f"{case.batch} × {case.seq} = {case.batch * case.seq:,} tokens a step; "
        f"{case.algorithm.name}; {case.topology}: {case.topology.num_chips} chips of "
        f"{chip.flops / 1e12:.0f} TFLOP/s and {chip.memory / 1e9:.1f} GB ({chip.source})",
        highlight=False,
        markup=False,
    )
    console.print(_ranking(plan))
    left = len(plan.ranked) - _MOST_ROWS
    if left > 0:
        console.print(f"… and {left} more that divide.")
    if plan.note:
        console.print(plan.note, markup=False, soft_wrap=True)
    for layout, found in plan.compiled.items():
        if isinstance(found, DoesNotFit | Failed):
            what = "does not fit. " if isinstance(found, DoesNotFit) else ""
            console.print(f"\n{layout}: {what}{found}", markup=False, soft_wrap=True)
            continue
        predicted = next(one for one in plan.ranked if one.layout == layout)
        console.print(f"\n{layout}: compiled in {found.seconds:.0f} s")
        console.print(_memory(predicted, found))
        console.print(_traffic(predicted, found))


def _model(config: TransformerConfig) -> str:
    if config.num_experts is None:
        return f"{config.num_params:,} parameters"
    return f"{config.num_params:,} parameters, of which a token meets {config.num_active_params:,}"


def _ranking(plan: Plan) -> Table:
    best = plan.ranked[:_MOST_ROWS]
    pipelined = any(one.layout.stage > 1 for one in best)
    title = "Meshes by predicted time of a step (bounds from below, ms)"
    table = Table(title=f"{title}; pipelines {plan.case.schedule}" if pipelined else title)
    table.add_column("mesh", no_wrap=True)
    names = ["step", "products", "memory", "hidden", "exposed", "slow", "GB a chip"]
    if pipelined:
        names = ["micro-batches", *names[:5], "bubble", *names[5:]]
    for name in names:
        table.add_column(name, justify="right")
    table.add_column("fits")
    table.add_column("bound by")
    for one in best:
        layout = one.layout
        times = [
            one.seconds,
            one.compute_seconds,
            one.memory_seconds,
            one.hidden_seconds,
            one.exposed_seconds,
            one.slow_seconds,
        ]
        if pipelined:
            times.insert(5, one.bubble_seconds)
        row = [f"{1e3 * t:.1f}" for t in times]
        if pipelined:
            row.insert(0, str(layout.micro_batches) if layout.stage > 1 else "")
        table.add_row(
            layout.mesh,
            *row,
            f"{one.memory.total / 1e9:.2f}",
            "yes" if one.fits else "no",
            one.bound,
        )
    return table


def _memory(predicted: Prediction, found: Compiled) -> Table:
    table = Table(title=f"GB on a chip, of {predicted.capacity / 1e9:.2f} that a program may use")
    table.add_column("")
    for name in (*CLASSES, "all"):
        table.add_column(name, justify="right")
    for name, memory in (("predicted", predicted.memory), ("compiled", found.memory)):
        table.add_row(name, *(f"{size / 1e9:.3f}" for size in (*_sizes(memory), memory.total)))
    return table


def _sizes(memory: Memory) -> list[int]:
    return [getattr(memory, name) for name in CLASSES]


def _traffic(predicted: Prediction, found: Compiled) -> Table:
    table = Table(title="MB that a chip sends in a step")
    for name in ("axes", "collective", "on the wire", "network"):
        table.add_column(name)
    for name in ("runs", "MB compiled", "MB predicted"):
        table.add_column(name, justify="right")
    expected = sent_by_axis(predicted)
    for row in compiled_traffic(found):
        axes = row["axes"]
        table.add_row(
            ", ".join(axes),
            row["kind"] + (" in some steps" if row["conditional"] else ""),
            row["dtype"],
            "slow" if row["slow"] else "fast",
            f"{row['runs']:,}",
            f"{row['bytes'] / 1e6:,.1f}",
            "",
        )
    table.add_section()
    for axis, total in compiled_by_axis(found).items():
        ours = expected.get(axis, 0.0)
        table.add_row(axis, "all", "", "", "", f"{total / 1e6:,.1f}", f"{ours / 1e6:,.1f}")
    return table


def sent_by_axis(predicted: Prediction) -> dict[str, float]:
    """Bytes along each axis as a compiled program's text shows them, by formula.

    What a chip sends in a step, but for rows of experts, of which the text shows the room.
    """
    total: dict[str, float] = {}
    for one in predicted.exchanges:
        total[one.axis] = total.get(one.axis, 0.0) + one.room_bytes
    return total


def compiled_by_axis(found: Compiled) -> dict[str, int]:
    """The same of a compiled program, in a step in which everything is exchanged.

    What goes over several axes at once is under ``"data+fsdp"``.
    """
    total: dict[str, int] = {}
    for row in compiled_traffic(found):
        key = "+".join(row["axes"])
        total[key] = total.get(key, 0) + row["bytes"]
    return total


def compiled_traffic(found: Compiled) -> list[dict[str, Any]]:
    """Collectives summed by axes, kind, dtype and network, and the largest; most bytes first."""
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for one in found.listed:
        if not one.axes:
            continue  # nothing is exchanged
        key = (one.axes, one.kind, one.dtype, one.between_slices, one.conditional)
        row = rows.setdefault(
            key,
            {
                "axes": list(one.axes),
                "kind": one.kind,
                "dtype": one.dtype,
                "slow": one.between_slices,
                "conditional": one.conditional,
                "runs": 0,
                "bytes": 0,
                "largest": 0,
            },
        )
        row["runs"] += found.runs(one)
        row["bytes"] += one.sent_bytes * found.runs(one)
        row["largest"] = max(row["largest"], one.whole_bytes)
    for row in rows.values():
        row["runs"], row["bytes"] = round(row["runs"]), round(row["bytes"])
    return sorted(rows.values(), key=lambda row: -row["bytes"])


def to_json(plan: Plan) -> dict[str, Any]:
    """Everything that ``show`` prints, in bytes, seconds and FLOPs."""
    case = plan.case
    return {
        "parameters": case.config.num_params,
        "topology": str(case.topology),
        "chips": case.topology.num_chips,
        "batch": case.batch,
        "sequence": case.seq,
        "algorithm": case.algorithm.name,
        "note": plan.note,
        "ranked": [_prediction(one) for one in plan.ranked],
        "compiled": [
            {"mesh": layout.sizes, **_compiled(found)} for layout, found in plan.compiled.items()
        ],
    }


def _prediction(one: Prediction) -> dict[str, Any]:
    return {
        "mesh": one.layout.sizes,
        "fits": one.fits,
        "bound": one.bound,
        "pipeline": None
        if one.layout.stage == 1
        else {"schedule": one.layout.schedule, "micro_batches": one.layout.micro_batches},
        "seconds": {
            "step": one.seconds,
            "products": one.compute_seconds,
            "memory": one.memory_seconds,
            "hidden": one.hidden_seconds,
            "exposed": one.exposed_seconds,
            "bubble": one.bubble_seconds,
            "slow": one.slow_seconds,
        },
        "flops": one.flops,
        "memory_traffic_bytes": one.memory_bytes,
        "memory_bytes": _classes(one.memory),
        "capacity_bytes": one.capacity,
        "exchanges": [
            {"what": e.what, "axis": e.axis, "sent_bytes": e.sent_bytes, "hidden": e.hidden}
            for e in one.exchanges
        ],
    }


def _compiled(found: Found) -> dict[str, Any]:
    if isinstance(found, Failed):
        return {"fits": None, "message": str(found)}
    if isinstance(found, DoesNotFit):
        return {"fits": False, "missing_bytes": found.missing, "message": str(found)}
    return {
        "fits": True,
        "compile_seconds": found.seconds,
        "flops": found.flops,
        "memory_bytes": _classes(found.memory),
        "collectives": compiled_traffic(found),
    }


def _classes(memory: Memory) -> dict[str, int]:
    return {**dict(zip(CLASSES, _sizes(memory), strict=True)), "total": memory.total}
