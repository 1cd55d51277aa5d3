"""A training step of the decoder on one CPU device, beside the same model in PyTorch.

    make bench-peers BENCHMARKS=transformer

Same weights, same tokens, forward, backward and AdamW; both in one process, in turns, with as many
threads each. Before anything is timed, losses and parameters after one step are compared.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx
from rich.table import Table

from benchmarks.machine import console_of_tables, machine
from benchmarks.time_to_loss.problem import Shape
from jdml.aggregate import mean_gradients
from jdml.models import Transformer, TransformerConfig, next_token_loss
from jdml.sharding import make_mesh, no_mesh, presets
from jdml.sharding.paths import leaves_with_paths
from jdml.train import make_step

RATE = 1e-3
SHAPES = {
    "3 M": (Shape(), 16, 128),
    "25 M": (
        Shape(num_layers=8, embed_dim=512, num_heads=8, num_kv_heads=8, head_dim=64, mlp_dim=1408),
        4,
        256,
    ),
}


@dataclasses.dataclass(frozen=True)
class Options:
    """What is compared."""

    shapes: tuple[str, ...] = tuple(SHAPES)
    """Sizes of the model."""
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    """Of activations and products; parameters are float32."""
    rounds: int = 5
    """Steps of each that are timed."""
    threads: int = os.cpu_count() or 1
    """Of PyTorch; jdml takes as many as there are cores."""
    json: Path | None = None
    """File for the figures."""


def main(options: Options) -> None:
    """Compares, times, prints."""
    try:
        import torch
    except ImportError:
        sys.exit("PyTorch is not installed: make bench-peers BENCHMARKS=transformer")
    torch.set_num_threads(options.threads)
    console = console_of_tables()
    table = Table(title="training step on one CPU device")
    for column in ("model", "dtype", "layers", "PyTorch, s", "jdml, s", "tokens/s, jdml / PyTorch"):
        table.add_column(column)
    rows = []
    for name in options.shapes:
        shape, batch, seq = SHAPES[name]
        tokens = np.random.default_rng(0).integers(0, shape.vocab_size, (batch, seq + 1))
        weights = draw_weights(shape)
        for dtype in options.dtypes:
            print(f"{name}, {dtype} …", file=sys.stderr)
            peer = torch_step(shape, weights, tokens, dtype)
            ours = {
                how: jdml_step(shape, weights, tokens, dtype, unroll=how == "unrolled")
                for how in ("scanned", "unrolled")
            }
            times = in_turns({"PyTorch": peer, **ours}, options.rounds)
            for how in ours:
                row = {
                    "model": name,
                    "dtype": dtype,
                    "layers": how,
                    "torch_seconds": times["PyTorch"],
                    "jdml_seconds": times[how],
                    "ratio": times["PyTorch"] / times[how],
                }
                rows.append(row)
                table.add_row(
                    name,
                    dtype,
                    how,
                    *(f"{row[key]:.3f}" for key in ("torch_seconds", "jdml_seconds")),
                    f"{row['ratio']:.2f}",
                )
    console.print(table)
    console.print(f"{machine('jax', 'torch')}; {options.threads} threads each")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


def draw_weights(shape: Shape) -> dict[str, np.ndarray]:
    """The model's parameters by leaf path."""
    with no_mesh():
        model = Transformer(TransformerConfig(**dataclasses.asdict(shape)), rngs=nnx.Rngs(0))
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    return {path: np.asarray(x) for path, x in leaves_with_paths(params)}


def jdml_step(
    shape: Shape, weights: dict[str, np.ndarray], tokens: np.ndarray, dtype: str, **options: Any
) -> Callable[[], float]:
    """A step as a function of nothing; returns the loss. ``options`` of ``TransformerConfig``."""
    config = TransformerConfig(
        **dataclasses.asdict(shape),
        dtype=dtype,  # type: ignore[arg-type]
        **options,
    )
    mesh = make_mesh({"data": 1}, devices=jax.devices()[:1])
    with nnx.use_eager_sharding(False):
        graphdef, params = nnx.split(
            nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))), nnx.Param
        )[:2]
    params = nnx.to_pure_dict(params)
    treedef = jax.tree.structure(params)
    params = treedef.unflatten([jnp.asarray(weights[p]) for p, _ in leaves_with_paths(params)])

    def loss_fn(params: Any, batch: Any, key: Any) -> Any:
        del key
        return next_token_loss(nnx.merge(graphdef, params), batch["x"], batch["y"]), {}

    tx = optax.chain(mean_gradients("data"), optax.adamw(RATE, weight_decay=0.01))
    init, step = make_step(loss_fn, tx, mesh, rules=presets.data_parallel())
    state = [init(params, 0)]
    batch = {
        "x": jnp.asarray(tokens[:, :-1], jnp.int32),
        "y": jnp.asarray(tokens[:, 1:], jnp.int32),
    }

    def run() -> float:
        state[0], metrics = step(state[0], batch)
        return float(jax.block_until_ready((state[0], metrics))[1]["loss"])

    return run


def torch_step(
    shape: Shape,
    weights: dict[str, np.ndarray],
    tokens: np.ndarray,
    dtype: str,
    device: str = "cpu",
    *,
    compiled: bool = False,
) -> Callable[[], float]:
    """The same in PyTorch: autocast for bfloat16, the fused AdamW; ``torch.compile`` if asked."""
    import torch

    from benchmarks.time_to_loss.twin import Twin, to_torch

    model = Twin(shape)
    model.load_state_dict(to_torch(weights, shape))
    model.to(device)
    run_model: Any = torch.compile(model) if compiled else model
    adamw = torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.01, fused=True)
    batch = torch.from_numpy(tokens).to(device)

    def run() -> float:
        adamw.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = run_model(batch)
        loss.backward()
        adamw.step()
        return float(loss.detach())

    return run


def in_turns(contenders: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """Median seconds of each, one after the other; the first two steps' losses must agree."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 2):
        losses = {}
        for name, run in contenders.items():
            start = time.perf_counter()
            losses[name] = run()
            if number >= 2:
                times[name].append(time.perf_counter() - start)
        if number < 2 and max(losses.values()) - min(losses.values()) > 0.02 * min(losses.values()):
            raise RuntimeError(f"the models differ: losses {losses} in step {number}")
    return {name: statistics.median(seconds) for name, seconds in times.items()}


if __name__ == "__main__":
    main(tyro.cli(Options))
