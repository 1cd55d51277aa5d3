"""Options of the main job, and their defaults: under two minutes on two CPU cores."""

import dataclasses
from pathlib import Path
from typing import Literal

from jdml.models.transformer import TransformerConfig
from jdml.train.checkpoint import ResidualPolicy

CodecName = Literal[
    *("int8", "int4", "int2", "fp8", "e3m0", "bf16", "one_bit", "terngrad", "qsgd"),
    *("top_k", "random_k", "power_sgd", "none"),
]


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; at most one may be -1, which takes the devices that are left."""

    data: int = -1
    """Workers, each with the whole model."""
    fsdp: int = 1
    """Devices of one worker that divide its samples, and its parameters along embed."""
    model: int = 0
    """Devices that divide heads, hidden units and vocabulary; 0 takes 2, or 1 if devices are "
    "odd."""


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    """Learning rate: a linear warm-up, then a decay to a fraction of the peak."""

    peak: float = 4e-3
    warmup_steps: int = 10
    decay: Literal["cosine", "linear", "constant"] = "cosine"
    final_fraction: float = 0.0


@dataclasses.dataclass(frozen=True)
class Config:
    """Trains a decoder transformer; the same command again resumes where it stopped."""

    out: Path = Path("runs/train_lm")
    """Folder for checkpoints, metrics and the report."""
    resume: Literal["auto", "never", "must"] = "auto"
    """auto: go on from the newest checkpoint, if there is one."""
    residual: ResidualPolicy = "sum"
    """What error feedback owes, on another number of workers: keep its sum, or the mean's share;
    reset: begin with none."""

    data: Path | None = None
    """Text file, folder of text, or token file (.bin, .npy); default: Python's standard library."""
    data_dtype: str | None = None
    """Integer type of the ids in a .bin file, such as uint16."""
    vocab_size: int | None = None
    """Number of token ids; needed for a token file."""
    holdout: float = 0.05
    """Fraction of the corpus, at its end, kept for validation."""

    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    simulate: int = 8
    """Devices to simulate where there is no accelerator; 1 trains on the CPU as it is."""
    model: TransformerConfig = dataclasses.field(default_factory=TransformerConfig)
    """Shape and precision (--model.dtype) of the decoder; its vocabulary follows the data."""

    codec: CodecName = "int8"
    """What the gradients are sent as; none: exact f32."""
    block: int | None = None
    """Elements that share a scale; by default the codec's own number."""
    fraction: float = 0.01
    """Of the elements that top_k and random_k send."""
    levels: int = 7
    """Of qsgd."""
    rank: int = 4
    """Of power_sgd."""
    error_feedback: bool = True
    """Add what the codec lost in one step to the next (power_sgd does in any case; terngrad and
    qsgd, which are right on average, never)."""
    topology: Literal["two_phase", "ring", "tree", "all_gather"] | None = None
    """How the gradients travel; by default all_gather for sparse codecs, two_phase for others."""
    compare: bool = True
    """Also train with the exact mean, and compare; with codec none there is nothing to compare."""

    steps: int = 200
    """Optimiser steps of the whole run; the schedule spans them."""
    batch: int = 32
    """Sequences of one step, over all workers."""
    seq_len: int = 128
    """Tokens of a sequence."""
    accumulate: int = 1
    """Micro-batches of a step."""
    schedule: ScheduleConfig = dataclasses.field(default_factory=ScheduleConfig)
    weight_decay: float = 0.1
    """Of AdamW, on matrices."""
    clip: float = 1.0
    """Largest global norm of the mean gradient."""
    seed: int = 0
    """Of the parameters, the order of the data and the sample."""

    eval_every: int = 50
    """Steps between evaluations; 0 evaluates at the end alone."""
    eval_batches: int = 8
    """Batches of one evaluation."""
    save_every: int = 50
    """Steps between checkpoints; 0 saves at the end alone."""
    keep: int = 2
    """Checkpoints that stay."""
    sample_tokens: int = 300
    """Length of the text written at the end; 0 writes none."""
    prompt: str = "def "
    """What the text begins with, for byte-level models."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "seq_len", "accumulate", "eval_batches", "keep", "simulate"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}."
                )
        if self.seq_len > self.model.max_seq_len:
            raise ValueError(
                f"--seq-len {self.seq_len} is longer than --model.max-seq-len "
                f"{self.model.max_seq_len}; raise one or lower the other."
            )

    def identity(self, codec: str) -> dict[str, object]:
        """What a checkpoint must have been made with for a resume to make sense."""
        free = {
            "out",
            "resume",
            "residual",
            "data",
            "simulate",
            "mesh",
            "codec",
            "compare",
            "eval_every",
            "eval_batches",
            "save_every",
            "keep",
            "sample_tokens",
            "prompt",
        }
        kept = {k: v for k, v in dataclasses.asdict(self).items() if k not in free}
        return kept | {"codec": codec}
