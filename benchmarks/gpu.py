"""A training step of a decoder with a billion parameters on one GPU, beside ``torch.compile``.

    make bench-peers BENCHMARKS=gpu      (jax[cuda13] and a CUDA build of PyTorch beside each other)

In bfloat16 with float32 parameters, forward, backward and AdamW, same weights and tokens. Which
attention jdml takes is chosen by measurement: every form that runs is timed, and the fastest is
compared. Model FLOPs are ``6 · parameters in products + 12 · layers · seq · heads · head_dim`` a
token (masked scores count, what is computed again does not), the convention of Chowdhery et al.,
"PaLM", 2022, appendix B; MFU divides by the card's peak.

Without a GPU it says so and ends.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # both programs share the card

import jax
import numpy as np
import tyro
from rich.table import Table

from benchmarks.machine import console_of_tables, machine
from benchmarks.time_to_loss.problem import Shape
from benchmarks.transformer import draw_weights, jdml_step, torch_step
from jdml.models import TransformerConfig
from jdml.plan.hardware import CHIPS

BILLION = Shape(
    vocab_size=32_768, num_layers=20, embed_dim=2048, num_heads=16, num_kv_heads=8, head_dim=128,
    mlp_dim=5632,
)  # fmt: skip
FORMS: dict[str, dict[str, Any]] = {
    "full": {"attention": "full"},
    "xla": {"attention": "xla"},
    "cudnn": {"attention": "cudnn"},
    "blocks": {"attention": "ring", "flatten_tokens": False},  # a ring of one device
}


@dataclasses.dataclass(frozen=True)
class Options:
    """What is compared."""

    batch: int = 8
    """Sequences of a step."""
    seq: int = 2048
    """Tokens of a sequence."""
    forms: tuple[str, ...] = tuple(FORMS)
    """Of attention, those that jdml tries."""
    remat: str = "dots"
    """What jdml computes again; PyTorch keeps everything."""
    rounds: int = 10
    """Steps of each that are timed, after two that are not."""
    json: Path | None = None
    """File for the figures."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One program: seconds of a step (median), and the losses of its first two."""

    name: str
    seconds: float | None
    losses: tuple[float, ...] = ()
    failed: str = ""


def main(options: Options) -> None:
    """Times both on the GPU that is here."""
    device = jax.devices()[0]
    if device.platform not in ("gpu", "cuda"):
        print(f"gpu: JAX sees no GPU here ({device.platform}); nothing was measured.")
        return
    weights, tokens = draw_weights(BILLION), draw_tokens(BILLION, options.batch, options.seq)
    rows = ours(BILLION, weights, tokens, options.forms, options.rounds, remat=options.remat)
    rows.append(peer(BILLION, weights, tokens, options.rounds))
    check_losses(rows)
    report(rows, options, device.device_kind)


def draw_tokens(shape: Shape, batch: int, seq: int) -> np.ndarray:
    """Tokens at random, ``[batch, seq + 1]``."""
    return np.random.default_rng(0).integers(0, shape.vocab_size, (batch, seq + 1))


def ours(
    shape: Shape,
    weights: dict[str, np.ndarray],
    tokens: np.ndarray,
    forms: tuple[str, ...],
    rounds: int,
    **options: Any,
) -> list[Row]:
    """jdml's step with each form of attention; a form that does not run says why."""
    rows = []
    for form in forms:
        name = f"jdml, {form}"
        try:
            step = jdml_step(shape, weights, tokens, "bfloat16", **FORMS[form], **options)
            rows.append(timed(name, step, rounds))
        except (ValueError, RuntimeError, NotImplementedError) as error:
            rows.append(Row(name, None, failed=str(error).splitlines()[0]))
        step = None
        gc.collect()  # the state leaves the card before the next one comes
        jax.clear_caches()
    return rows


def peer(shape: Shape, weights: dict[str, np.ndarray], tokens: np.ndarray, rounds: int) -> Row:
    """PyTorch's step, compiled."""
    name = "PyTorch, torch.compile"
    try:
        import torch
    except ImportError:
        return Row(name, None, failed="PyTorch is not installed: make bench-peers BENCHMARKS=gpu")
    if not torch.cuda.is_available():
        return Row(name, None, failed="this build of PyTorch sees no GPU")
    torch.set_float32_matmul_precision("high")
    step = torch_step(shape, weights, tokens, "bfloat16", "cuda", compiled=True)
    return timed(name, step, rounds)


def timed(name: str, step: Callable[[], float], rounds: int) -> Row:
    """Median of ``rounds`` steps after two; a step ends when its loss is on the host."""
    losses, seconds = [step(), step()], []
    for _ in range(rounds):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return Row(name, statistics.median(seconds), tuple(losses))


def check_losses(rows: list[Row]) -> None:
    """The programs compute the same: bfloat16's rounding apart, the first losses agree."""
    for losses in zip(*(row.losses for row in rows if row.losses), strict=True):
        if max(losses) - min(losses) > 0.02 * min(losses):
            raise RuntimeError(f"the models differ: {[(r.name, r.losses) for r in rows]}")


def flops_per_token(shape: Shape, seq: int) -> float:
    """Of forward and backward pass, as MFU counts them."""
    config = TransformerConfig(**dataclasses.asdict(shape))
    norms = (2 * shape.num_layers + 1) * shape.embed_dim
    in_products = config.num_params - norms - shape.vocab_size * shape.embed_dim  # no table
    scores = shape.num_layers * seq * shape.num_heads * shape.head_dim
    return 6 * in_products + 12 * scores


def peak_flops(device_kind: str) -> float | None:
    """Of bfloat16 products a second, if the card is one that ``jdml.plan`` knows."""
    words = device_kind.lower()
    return next((chip.flops for name, chip in CHIPS.items() if name in words), None)


def report(rows: list[Row], options: Options, device_kind: str) -> None:
    """Prints the table; writes the figures."""
    tokens, peak = options.batch * options.seq, peak_flops(device_kind)
    flops = tokens * flops_per_token(BILLION, options.seq)
    table = Table(title=f"training step on one {device_kind}, {options.batch} × {options.seq}")
    for column in ("program", "seconds", "tokens/s", "MFU", "loss"):
        table.add_column(column)
    figures = []
    for row in rows:
        if row.seconds is None:
            table.add_row(row.name, "–", "–", "–", row.failed)
        else:
            mfu = None if peak is None else flops / row.seconds / peak
            table.add_row(
                row.name,
                f"{row.seconds:.4f}",
                f"{tokens / row.seconds:,.0f}",
                "–" if mfu is None else f"{mfu:.1%}",
                f"{row.losses[0]:.4f}",
            )
            figures.append({**dataclasses.asdict(row), "mfu": mfu})
    console = console_of_tables()
    console.print(table)
    ran = [row for row in rows if row.seconds is not None and row.name.startswith("jdml")]
    if ran:
        best = min(ran, key=lambda row: row.seconds or 0.0)
        console.print(f"attention chosen: {best.name.removeprefix('jdml, ')}")
    console.print(machine("jax", "torch"))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main(tyro.cli(Options))
