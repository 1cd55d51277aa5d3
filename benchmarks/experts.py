"""A mixture of experts against one MLP of equal work per token; and what travels on a TPU slice.

    python -m benchmarks.experts

The MLP is as wide as the experts that a token passes through, so that both multiply alike; what is
measured is what routing, sorting and uneven groups cost. All run in turns in one process. Then a
layer is compiled ahead of time for sixteen chips of v5e, where libtpu is installed, and its
collectives are listed beside the formulas.
"""

import importlib.util
import os
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console
from rich.table import Table

from benchmarks.machine import console_of_tables, machine
from benchmarks.step import in_turns
from jdml.models import TransformerConfig
from jdml.models.experts import capacity_of
from jdml.models.experts.dropless import rows_of_round
from jdml.models.transformer.experts import Experts
from jdml.models.transformer.mlp import SwiGLU
from jdml.sharding import collectives, make_mesh, no_mesh, presets, shardings, specs, use_rules

EMBED, HIDDEN, EXPERTS, CHOICES, BATCH, SEQ = 256, 512, 8, 2, 8, 256
ROUNDS = 7
FORMS: dict[str, float | None] = {
    "capacity 1.0": 1.0,
    "capacity 1.25": 1.25,
    "capacity 2.0": 2.0,
    "dropless": None,
}
TOPOLOGY = "v5e:4x4"


def config_of(capacity_factor: float | None, **changes: Any) -> TransformerConfig:
    """One layer's shapes."""
    shape = {"embed_dim": EMBED, "mlp_dim": HIDDEN, "num_layers": 1, "num_experts": EXPERTS}
    shape |= {"experts_per_token": CHOICES, "max_seq_len": SEQ}
    return TransformerConfig(**(shape | {"capacity_factor": capacity_factor} | changes))


def step_of(make: Callable[[nnx.Rngs], nnx.Module]) -> tuple[Callable[..., Any], Any]:
    """``(params, x) → (fraction dropped, gradients)`` of a layer, and its parameters."""
    with no_mesh():
        graphdef, params = nnx.split(make(nnx.Rngs(0)))

    def loss(params: Any, x: jax.Array) -> Any:
        y = nnx.merge(graphdef, params)(x)
        y, dropped = (y[0], y[1].dropped) if isinstance(y, tuple) else (y, jnp.zeros(()))
        return jnp.sum(y * y), dropped

    @jax.jit
    def run(params: Any, x: jax.Array) -> Any:
        with no_mesh():
            (_, dropped), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(params, x)
        return dropped, gradients

    return run, params


def one_device(console: Console) -> None:
    """Time of value and gradients against the MLP's."""
    x = jax.random.normal(jax.random.key(0), (BATCH, SEQ, EMBED))
    wide = config_of(None, num_experts=None, mlp_dim=CHOICES * HIDDEN)
    steps = {"one MLP": step_of(lambda rngs: SwiGLU(wide, rngs))}
    for name, factor in FORMS.items():
        config = config_of(factor)
        steps[name] = step_of(lambda rngs, config=config: Experts(config, rngs))  # type: ignore[misc]
    times = in_turns(
        {name: lambda run=run, p=p: run(p, x) for name, (run, p) in steps.items()},  # type: ignore[misc]
        ROUNDS,
    )
    table = Table(title=f"{BATCH * SEQ:,} tokens, {EXPERTS} experts of {EMBED} × {HIDDEN}, top 2")
    for column in ("", "ms, forward and backward", "/ one MLP", "tokens/s", "dropped"):
        table.add_column(column, justify="right" if column else "left")
    base = statistics.median(times["one MLP"])
    for name, (run, params) in steps.items():
        seconds = statistics.median(times[name])
        table.add_row(
            name,
            f"{seconds * 1e3:.1f}",
            f"{seconds / base:.2f}",
            f"{BATCH * SEQ / seconds:,.0f}",
            f"{float(run(params, x)[0]):.1%}",
        )
    console.print(table)


def compiled_for_tpu(config: TransformerConfig, batch: int, seq: int) -> tuple[Any, Any]:
    """A layer's gradients on data=2 × expert=8, mapped over the workers as a step maps them."""
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(TOPOLOGY, platform="tpu").devices
    mesh = make_mesh({"data": 2, "expert": 8}, devices=devices)
    rules = presets.expert_parallel(presets.data_parallel())
    with no_mesh():
        graphdef, params = nnx.split(nnx.eval_shape(lambda: Experts(config, nnx.Rngs(0))))
    placed = shardings(specs(params, mesh, rules), mesh)
    params = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), params, placed
    )
    x = jax.ShapeDtypeStruct(
        (2, batch, seq, config.embed_dim),
        config.compute_dtype,
        sharding=NamedSharding(mesh, P("data", "expert")),
    )

    def loss(params: Any, x: jax.Array) -> jax.Array:
        y, _ = nnx.merge(graphdef, params)(x)
        return jnp.sum(y.astype(jnp.float32) ** 2)

    @jax.jit
    def run(params: Any, x: jax.Array) -> Any:
        with use_rules(mesh, rules, hide=("data",)):
            mapped = jax.vmap(jax.grad(loss, (0, 1)), (None, 0), spmd_axis_name="data")
            return mapped(params, x)

    return run.lower(params, x).compile(), mesh


def tpu(console: Console) -> None:
    """Collectives of the compiled layer beside what the docstrings say."""
    batch, seq, parts = 8, 2048, 8
    shape: dict[str, Any] = {"embed_dim": 4096, "mlp_dim": 1792, "dtype": "bfloat16"}
    table = Table(title=f"A layer compiled for {TOPOLOGY}, data=2 × expert=8, 2,048 tokens a chip")
    for column in ("", "collective", "over", "dtype", "MB", "formula", "in a branch", "times"):
        table.add_column(column)
    row = shape["embed_dim"] * 2
    room = EXPERTS * (batch // parts) * capacity_of(1.25, CHOICES, seq, EXPERTS) * row
    sent = parts * rows_of_round(batch // parts * seq, CHOICES, EXPERTS, parts)[0] * row
    for name, factor, formula in (("capacity 1.25", 1.25, room), ("dropless", None, sent)):
        compiled, mesh = compiled_for_tpu(config_of(factor, max_seq_len=seq, **shape), batch, seq)
        counted: dict[Any, int] = {}
        for c in collectives(compiled, mesh):
            key = (c.kind, c.axes, c.dtype, c.payload_bytes, c.conditional)
            counted[key] = counted.get(key, 0) + (c.count or 0)
        for (kind, axes, dtype, payload, conditional), times in sorted(counted.items(), key=str):
            is_rows = kind.endswith("all-to-all") and dtype == "bf16"
            said = f"{formula / 1e6:.3f}" if is_rows else ""
            in_branch = "yes" if conditional else ""
            row_of = (name, kind, " × ".join(axes), dtype, f"{payload / 1e6:.3f}", said, in_branch)
            table.add_row(*row_of, str(times))
    console.print(table)


def main() -> None:
    """Prints both tables."""
    for name, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }.items():
        os.environ.setdefault(name, value)
    jax.config.update("jax_platforms", "cpu")
    console = console_of_tables()
    one_device(console)
    if importlib.util.find_spec("libtpu"):
        tpu(console)
    else:
        console.print(
            "libtpu is not installed (pip install 'jdml[tpu]'): nothing compiled for a TPU"
        )
    console.print(machine("jax", "libtpu"))


if __name__ == "__main__":
    main()
