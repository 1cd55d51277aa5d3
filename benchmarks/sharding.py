"""The sharding helpers: ``python -m benchmarks.sharding``.

``specs`` + ``check`` on 2,000 leaves should take under 0.5 s. Creating a model in shards is timed
against ``jax.jit`` of the same function on one device, and that followed by ``device_put``, which
needs the whole model in one device's memory. Simulated devices share the same cores: the times
compare work done. Over a ``data`` axis every copy of a shard is computed, so ``data=2`` doubles it.
"""

import os
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from rich.console import Console
from rich.table import Table

from jdml.sharding import Rules, check, constrain, lower_init, make_mesh, shard, specs, use_rules

NUM_LEAVES = 2000
TARGET = 0.5  # seconds for specs + check
RULES = Rules(embed="fsdp", mlp="model", batch="data")


def seconds(run: Callable[[], Any], repeat: int = 5) -> float:
    """Median wall time."""
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def large_state() -> nnx.State:
    """A state of 2,000 annotated parameters, tiny, in 250 layers."""

    def param() -> nnx.Param:
        return nnx.Param(jnp.zeros((4, 4)), out_sharding=("embed", "mlp"), eager_sharding=False)

    return nnx.State(
        {
            f"layer_{layer}": {f"kernel_{number}": param() for number in range(8)}
            for layer in range(NUM_LEAVES // 8)
        }
    )


class Block(nnx.Module):
    """Two kernels of 16.8 MB."""

    def __init__(self, rngs: nnx.Rngs, width: int = 1024):
        up, down = ("embed", "mlp"), ("mlp", "embed")
        self.up = nnx.Linear(width, 4 * width, rngs=rngs, kernel_metadata={"out_sharding": up})
        self.down = nnx.Linear(4 * width, width, rngs=rngs, kernel_metadata={"out_sharding": down})


class Model(nnx.Module):
    """Four blocks, 134 MB."""

    def __init__(self, key: jax.Array):
        rngs = nnx.Rngs(key)
        self.blocks = nnx.List([Block(rngs) for _ in range(4)])


def measure_check(table: Table) -> None:
    mesh = make_mesh({"data": 2, "fsdp": 2, "model": 2})
    state = large_state()
    found = specs(state, mesh, RULES)
    placed = shard(state, mesh, found)
    resolve = seconds(lambda: specs(state, mesh, RULES) and None)
    verify = seconds(lambda: check(placed, found, mesh))
    table.add_row(f"specs, {NUM_LEAVES:,} leaves", f"{resolve * 1e3:.0f} ms", "")
    table.add_row(f"check, {NUM_LEAVES:,} leaves", f"{verify * 1e3:.0f} ms", "")
    both = resolve + verify
    table.add_row(f"both, of {TARGET * 1e3:.0f} ms", f"{both * 1e3:.0f} ms", f"{both / TARGET:.2f}")
    table.add_section()


def measure_init(table: Table) -> None:
    key = jax.random.key(0)
    with nnx.use_eager_sharding(False):
        whole = jax.jit(lambda key: nnx.state(Model(key))).lower(key).compile()
        state = whole(key)
    alone = seconds(lambda: whole(key))
    num_bytes = used(whole)
    table.add_row("134 MB made on one device", f"{alone * 1e3:.0f} ms", "1.00", _mb(num_bytes))
    mesh = make_mesh({"fsdp": 4, "model": 2})
    layout = specs(state, mesh, RULES)
    put = seconds(lambda: shard(whole(key), mesh, layout))
    table.add_row(
        "and then device_put", f"{put * 1e3:.0f} ms", f"{put / alone:.2f}", _mb(num_bytes)
    )
    for shape in ({"fsdp": 4, "model": 2}, {"data": 2, "fsdp": 2, "model": 2}):
        sharded = lower_init(Model, make_mesh(shape), RULES, key).compile()
        taken = seconds(lambda sharded=sharded: sharded(key))
        sizes = " × ".join(f"{name}={size}" for name, size in shape.items())
        ratio = f"{taken / alone:.2f}"
        table.add_row(f"init on {sizes}", f"{taken * 1e3:.0f} ms", ratio, _mb(used(sharded)))
    table.add_section()


def measure_contexts(table: Table) -> None:
    mesh = make_mesh({"data": 2, "fsdp": 2, "model": 2})

    def enter() -> None:
        for _ in range(1000):
            with use_rules(mesh, RULES):
                pass

    def trace() -> None:
        with use_rules(mesh, RULES):
            jax.make_jaxpr(lambda x: [constrain(x, "batch", "mlp") for _ in range(100)])(x)

    x = jnp.zeros((8, 8))
    table.add_row("enter and leave use_rules", f"{seconds(enter) * 1e3:.1f} µs", "")
    table.add_row("one constrain, while tracing", f"{seconds(trace) * 1e4:.0f} µs", "")


def used(compiled: jax.stages.Compiled) -> int:
    """Bytes per device of the result and of what XLA allocates beside it."""
    memory = compiled.memory_analysis()
    return memory.output_size_in_bytes + memory.temp_size_in_bytes


def _mb(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.0f} MB"


def main() -> None:
    """Prints the table."""
    jax.config.update("jax_num_cpu_devices", 8)
    device = jax.devices()[0]
    table = Table(
        title=f"jdml.sharding, {date.today()}\n{platform.machine()}, {os.cpu_count()} cores, "
        f"{jax.device_count()} × {device.device_kind}, Python {platform.python_version()}, "
        f"jax {jax.__version__}",
        title_justify="left",
    )
    table.add_column("what")
    for column in ("time", "ratio", "result + scratch"):
        table.add_column(column, justify="right")
    measure_check(table)
    measure_init(table)
    measure_contexts(table)
    Console().print(table)


if __name__ == "__main__":
    main()
