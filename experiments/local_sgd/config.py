"""Options of the local SGD experiment; by default ten runs of about 100 s on two CPU cores."""

import dataclasses
from pathlib import Path

from experiments.local_sgd.methods import METHODS
from jdml.models import TransformerConfig

SMALL = TransformerConfig(
    num_layers=1,
    embed_dim=32,
    num_heads=2,
    num_kv_heads=1,
    head_dim=16,
    mlp_dim=96,
    max_seq_len=512,
    remat="none",
)
"""A byte-level decoder of 28,768 parameters."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Trains by local SGD, DiLoCo and streaming DiLoCo; the same command again resumes."""

    out: Path = Path("runs/local_sgd")
    """Folder for checkpoints, metrics and the report."""
    methods: tuple[str, ...] = tuple(METHODS)
    """Which to train; the others are reported too where the folder holds their finished runs."""
    quick: bool = False
    """A smoke test of 128 steps, in the folder's subfolder quick."""

    data: Path | None = None
    """Text file or folder of text; default: Python's standard library."""
    holdout: float = 0.05
    """Fraction of the corpus, at its end, kept for validation."""
    model: TransformerConfig = SMALL
    """Shape of the decoder; its vocabulary follows the data."""
    workers: int = 8
    """Workers, each on a (simulated) device of its own."""

    steps: int = 4800
    """Optimiser steps of a run; the schedule spans them. 4800 ends a round of 50 and one of 64."""
    batch: int = 32
    """Sequences of one step, over all workers."""
    seq_len: int = 64
    """Bytes of a sequence."""
    warmup_steps: int = 50
    """Linear warm-up of the learning rate; a cosine to nothing follows."""
    weight_decay: float = 0.1
    """Of AdamW, on matrices."""
    clip: float = 1.0
    """Largest global norm of a gradient: of the mean one, or of each worker's own."""
    seed: int = 0
    """Of the parameters and the order of the data."""

    eval_every: int = 200
    """About so many steps between evaluations: the nearest whole number of rounds."""
    eval_batches: int = 64
    """Batches of one evaluation."""
    save_every: int = 1200
    """Steps between checkpoints."""
    link_mbit: float = 100.0
    """Megabits per second of the link for which the time of the exchanges is predicted."""
    link_ms: float = 10.0
    """Its latency in milliseconds."""

    def __post_init__(self) -> None:
        for name in ("workers", "steps", "batch", "seq_len", "eval_every", "eval_batches"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}."
                )
        for name in self.methods:
            if name not in METHODS:
                raise ValueError(f"--methods {name!r} is none of {', '.join(METHODS)}.")

    def quickly(self) -> "Config":
        """The smoke test."""
        return dataclasses.replace(
            self, steps=128, warmup_steps=10, eval_every=50, eval_batches=2, out=self.out / "quick"
        )

    def identity(self) -> dict[str, object]:
        """What a finished run must have been made with to be of this experiment."""
        free = {"out", "methods", "quick", "data", "eval_every", "eval_batches", "save_every"}
        free |= {"link_mbit", "link_ms"}
        return {k: v for k, v in dataclasses.asdict(self).items() if k not in free}
