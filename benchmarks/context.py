"""Attention over a divided sequence: time, bytes and memory by form, beside one device.

    python -m benchmarks.context

Eight simulated devices share the processor with which one device computes the same: what a form
costs above 1 is its exchange, its copies and what it computes in vain. Contenders take turns.
"""

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.table import Table

from benchmarks.machine import console_of_tables, machine
from jdml.models.attention import divided_attention, plain_attention
from jdml.sharding import Rules, bytes_per_axis, collectives, make_mesh, no_mesh, use_rules

RULES = Rules(batch=None, heads=None, kv_heads=None, seq="seq")
FORMS = {
    "ring, zig-zag": {"form": "ring", "order": "zigzag"},
    "ring, contiguous": {"form": "ring"},
    "gathered keys, zig-zag": {"form": "gather", "order": "zigzag"},
    "all-to-all": {"form": "ulysses"},
}
HEADS, KV_HEADS, HEAD_DIM, BLOCK = 8, 2, 64, 128
TIMED_SEQ, LONG_SEQ, ROUNDS = 2048, 16_384, 7


def mesh_of(size: int) -> Mesh:
    """The first ``size`` devices as an axis called ``seq``."""
    return make_mesh({"seq": size}, devices=jax.devices()[:size])


def shapes(seq: int) -> list[jax.ShapeDtypeStruct]:
    """Query, key, value and the output's gradient, of one sample."""
    heads = (HEADS, KV_HEADS, KV_HEADS, HEADS)
    return [jax.ShapeDtypeStruct((1, n, seq, HEAD_DIM), jnp.float32) for n in heads]


def compile_passes(attend: Callable[..., Any], seq: int, mesh: Mesh | None = None) -> Any:
    """Both passes of causal attention, compiled; divided over the mesh if there is one."""

    def run(query: Any, key: Any, value: Any, gradient: Any) -> Any:
        with no_mesh() if mesh is None else use_rules(mesh, RULES):
            output, back = jax.vjp(attend, query, key, value)
            return output, *back(gradient)

    placed = None if mesh is None else NamedSharding(mesh, P(None, None, "seq"))
    return jax.jit(run, in_shardings=placed, out_shardings=placed).lower(*shapes(seq)).compile()


def temporary(compiled: Any) -> float:
    """Megabytes of temporaries on a device."""
    return compiled.memory_analysis().temp_size_in_bytes / 1e6


def times(contenders: dict[str, tuple[Any, Mesh | None]]) -> dict[str, float]:
    """Seconds of each, the median of rounds in which they take turns."""
    values = [
        jax.random.normal(jax.random.key(i), s.shape) for i, s in enumerate(shapes(TIMED_SEQ))
    ]
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(ROUNDS + 1):
        for name, (compiled, mesh) in contenders.items():
            placed = values
            if mesh is not None:
                placed = jax.device_put(values, NamedSharding(mesh, P(None, None, "seq")))
            jax.block_until_ready(placed)
            start = time.perf_counter()
            jax.block_until_ready(compiled(*placed))
            if number:
                found[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds) for name, seconds in found.items()}


def main() -> None:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    console, whole = console_of_tables(), mesh_of(8)
    blocks = functools.partial(divided_attention, block=BLOCK)
    contenders: dict[str, tuple[Any, Mesh | None]] = {
        "one device, in blocks": (compile_passes(blocks, TIMED_SEQ), None),
        "one device, all scores at once": (compile_passes(plain_attention, TIMED_SEQ), None),
    }
    for name, options in FORMS.items():
        attend = functools.partial(divided_attention, block=BLOCK, **options)
        contenders[name] = compile_passes(attend, TIMED_SEQ, whole), whole
    seconds = times(contenders)
    base = next(iter(seconds.values()))
    table = Table(
        title=f"Both passes of causal attention, {HEADS} heads, {KV_HEADS} key heads of "
        f"{HEAD_DIM}, {TIMED_SEQ:,} positions, float32, eight simulated devices"
    )
    for column in ("form", "ms", "/ one device", "kB sent per device", "MB of temporaries"):
        table.add_column(column, justify="left" if column == "form" else "right")
    for name, (compiled, mesh) in contenders.items():
        sent = 0 if mesh is None else sum(bytes_per_axis(collectives(compiled, mesh)).values())
        table.add_row(
            name,
            f"{1e3 * seconds[name]:.0f}",
            f"{seconds[name] / base:.2f}",
            f"{sent / 1e3:,.0f}",
            f"{temporary(compiled):.1f}",
        )
    console.print(table)
    scores = 4 * HEADS * LONG_SEQ**2 / 1e6
    table = Table(
        title=f"MB of temporaries on a device, {LONG_SEQ:,} positions (all scores: {scores:,.0f})"
    )
    table.add_column("form")
    sizes = (1, 2, 4, 8)
    for size in sizes:
        table.add_column(f"K = {size}", justify="right")
    for name, options in FORMS.items():
        attend = functools.partial(divided_attention, block=BLOCK, **options)
        row = [temporary(compile_passes(attend, LONG_SEQ, mesh_of(size))) for size in sizes]
        table.add_row(name, *(f"{x:.1f}" for x in row))
    console.print(table)
    console.print(machine("jax"))


if __name__ == "__main__":
    main()
