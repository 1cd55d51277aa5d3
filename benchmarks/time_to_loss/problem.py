"""What is trained: one file that both programs read, and the options that decide it.

Weights, batches, learning rates and held-out text are NumPy arrays, written once: the two programs
then start from the same numbers and read the same tokens in the same order, whatever their own
random generators do.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

CLIP = 1.0
WEIGHT_DECAY = 0.1
BETAS = (0.9, 0.95)
EPSILON = 1e-8
ONE_BIT_ADAM = "1-bit Adam"
"""The one method that is a whole optimiser: one_bit + EF of the momentum, after exact steps."""


@dataclass(frozen=True)
class Shape:
    """Of the decoder: the main job's at twice its width, 3.1 million parameters."""

    vocab_size: int = 256
    num_layers: int = 4
    embed_dim: int = 256
    num_heads: int = 8
    num_kv_heads: int = 4
    head_dim: int = 32
    mlp_dim: int = 704


@dataclass(frozen=True)
class Task:
    """All on which a training run's losses depend, besides its method."""

    shape: Shape = field(default_factory=Shape)
    num_workers: int = 4
    batch: int = 4
    """Sequences of one worker in a step."""
    seq_len: int = 128
    steps: int = 400
    peak: float = 2e-3
    """Of the learning rate: ten steps of warm-up, then a cosine down to zero."""
    eval_every: int = 20
    """Steps between validations."""
    eval_batches: int = 8
    """Batches of one validation, of batch sequences per worker each."""
    seed: int = 0

    def fingerprint(self) -> str:
        """16 hex digits: results of one task are not mixed with another's."""
        text = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def write_problem(task: Task, path: Path) -> None:
    """Draws the weights as the model does, cuts the text, and writes ``path`` (.npz).

    Arrays: ``weights/LEAF PATH``; ``train`` uint8 [steps, workers · batch, seq_len + 1]; ``valid``
    uint8 [eval_batches, workers · batch, seq_len + 1]; ``rates`` f32 [steps].
    """
    import jax
    from flax import nnx

    from experiments.train_lm.config import ScheduleConfig
    from experiments.train_lm.run import learning_rate
    from jdml.models import Transformer, TransformerConfig
    from jdml.sharding import no_mesh
    from jdml.sharding.paths import leaves_with_paths
    from jdml.train.data import Batches, read_corpus

    with no_mesh():
        model = Transformer(
            TransformerConfig(**dataclasses.asdict(task.shape)), rngs=nnx.Rngs(task.seed)
        )
    weights = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    arrays = {f"weights/{name}": np.asarray(x) for name, x in leaves_with_paths(weights)}

    rows = task.num_workers * task.batch
    train, held_out = read_corpus().split()
    batches = Batches(train, rows, task.seq_len, task.seed)
    valid = Batches(held_out, rows, task.seq_len, shuffle=False)

    def tokens(batch: dict[str, np.ndarray]) -> np.ndarray:
        both = np.concatenate([batch["inputs"], batch["targets"][:, -1:]], axis=1)
        return both.astype(np.uint8)

    arrays["train"] = np.stack([tokens(batches.batch_at(i)) for i in range(task.steps)])
    arrays["valid"] = np.stack([tokens(b) for b in valid.one_epoch(task.eval_batches)])
    schedule = learning_rate(ScheduleConfig(peak=task.peak), task.steps)
    arrays["rates"] = np.asarray(jax.vmap(schedule)(np.arange(task.steps)), np.float32)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **arrays)


class Problem:
    """What :func:`write_problem` wrote, as one worker sees it."""

    def __init__(self, path: str, worker: int, num_workers: int) -> None:
        with np.load(path) as arrays:
            start = len("weights/")
            names = [name for name in arrays.files if name.startswith("weights/")]
            self.weights = {name[start:]: arrays[name] for name in names}
            self.rates = arrays["rates"]
            train, valid = arrays["train"], arrays["valid"]
        rows = train.shape[1] // num_workers
        mine = slice(worker * rows, (worker + 1) * rows)
        self.train = train[:, mine].astype(np.int32)
        self.valid = valid[:, mine].astype(np.int32)


def one_bit_warm_up(steps: int) -> int:
    """Exact steps of 1-bit Adam in a run of so many: 15 %, as in its paper."""
    return max(1, round(0.15 * steps))


def is_decayed(name: str) -> bool:
    """Whether weight decay applies to a leaf: to all but the norms' scales."""
    return not name.endswith("scale")
