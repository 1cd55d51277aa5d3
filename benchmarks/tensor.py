"""Tensor parallelism on eight simulated devices beside one device that does the same work.

    python -m benchmarks.tensor

Every contender computes the loss and gradients of one transformer on one batch, in turns in one
process. The simulated devices share the machine's cores, so that what is above 1 is what the
division adds: exchanges, copies, smaller products, and what every device does alike. The exchanges
of the layers are counted in the compiled program.
"""

import dataclasses
import statistics
from typing import Any

import jax
from flax import nnx
from rich.console import Console
from rich.table import Table

from benchmarks.machine import console_of_tables, machine
from benchmarks.step import NUM_DEVICES, in_turns
from jdml.models import Transformer, TransformerConfig, next_token_loss
from jdml.sharding import (
    Rules,
    bytes_per_axis,
    collectives,
    make_mesh,
    no_mesh,
    presets,
    shard,
    specs,
    use_rules,
)

CONFIG = TransformerConfig(num_layers=4, num_heads=8, num_kv_heads=8, remat="none")
SEQUENCES, LENGTH = 16, 128
CASES: dict[str, tuple[int, Rules]] = {
    "tensor": (2, presets.tensor()),
    "tensor, all devices": (NUM_DEVICES, presets.tensor()),
    "tensor, divided norms": (NUM_DEVICES, presets.sequence_parallel(presets.tensor())),
}


def contenders(
    config: TransformerConfig, sequences: int, length: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Compiled functions of nothing by name, the one device's first; and the divided programs."""
    tokens = jax.random.randint(jax.random.key(0), (sequences, length + 1), 0, config.vocab_size)
    batch = tokens[:, :-1], tokens[:, 1:]
    weights = nnx.to_pure_dict(nnx.state(Transformer(config, rngs=nnx.Rngs(0))))

    def gradients(config: TransformerConfig) -> Any:
        model = nnx.graphdef(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))

        def loss(params: Any, inputs: jax.Array, targets: jax.Array) -> jax.Array:
            return next_token_loss(nnx.merge(model, params), inputs, targets)

        return jax.value_and_grad(loss)

    with no_mesh():
        one = jax.jit(gradients(config)).lower(weights, *batch).compile()
    runs: dict[str, Any] = {"one device": lambda: one(weights, *batch)}
    programs: dict[str, Any] = {}
    for name, (size, rules) in CASES.items():
        mesh = make_mesh({"model": size}, devices=jax.devices()[:size])
        # Where norms divide positions, tokens keep their dims apart.
        laid_out = dataclasses.replace(config, flatten_tokens="norms" not in name)
        model = nnx.eval_shape(lambda c=laid_out: Transformer(c, rngs=nnx.Rngs(0)))
        layout = nnx.to_pure_dict(specs(model, mesh, rules))
        rules = rules.replace(batch=None)
        placed = shard(weights, mesh, layout)
        with use_rules(mesh, rules):
            compiled = jax.jit(gradients(laid_out)).lower(placed, *batch).compile()
        runs[name] = lambda f=compiled, p=placed: f(p, *batch)
        programs[name] = mesh, compiled
    return runs, programs


def per_layer(compiled: Any, mesh: Any, num_layers: int) -> str:
    """Exchanges of one layer in both passes, by kind."""
    counts: dict[str, int] = {}
    for c in collectives(compiled, mesh):
        if num_layers in c.loops:
            counts[c.kind] = counts.get(c.kind, 0) + c.count // num_layers
    return ", ".join(f"{n} {kind}" for kind, n in sorted(counts.items()))


def show(
    console: Console,
    config: TransformerConfig,
    times: dict[str, list[float]],
    programs: dict[str, Any],
) -> None:
    """The table: time beside one device's, exchanges of a layer, bytes, temporaries."""
    table = Table(
        title=f"Transformer of {config.num_params:,} parameters, {SEQUENCES} × {LENGTH} tokens: "
        "loss and gradients"
    )
    columns = ("division", "devices", "time, ms", "/ one device")
    for column in (*columns, "a layer's exchanges", "MB sent", "MB of temporaries"):
        table.add_column(column, justify="left" if column == "division" else "right")
    base = next(iter(times.values()))
    for name, seconds in times.items():
        ratio = statistics.median(t / b for t, b in zip(seconds, base, strict=True))
        row = [f"{1e3 * statistics.median(seconds):.0f}", f"{ratio:.2f}"]
        if name not in programs:
            table.add_row(name, "1", *row, "", "", "")
            continue
        mesh, compiled = programs[name]
        sent = sum(bytes_per_axis(collectives(compiled, mesh)).values())
        table.add_row(
            name,
            str(mesh.size),
            *row,
            per_layer(compiled, mesh, config.num_layers),
            f"{sent / 1e6:.1f}",
            f"{compiled.memory_analysis().temp_size_in_bytes / 1e6:.1f}",
        )
    console.print(table)
    console.print(machine("jax"))


def main() -> None:
    jax.config.update("jax_num_cpu_devices", NUM_DEVICES)
    runs, programs = contenders(CONFIG, SEQUENCES, LENGTH)
    show(console_of_tables(), CONFIG, in_turns(runs, rounds=8), programs)


if __name__ == "__main__":
    main()
