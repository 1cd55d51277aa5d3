"""The transformer of ``jdml.models`` in PyTorch, as one would write it there.

A linear layer per matrix, layers not stacked, fused attention. The weights' names and shapes differ
from jdml's, so :func:`to_torch` and :func:`to_jdml` translate.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.time_to_loss.problem import Shape

EPSILON = 1e-6
ROPE_BASE = 10_000.0

_KERNELS = {
    "attention/query": "query",
    "attention/key": "key",
    "attention/value": "value",
    "attention/out": "out",
    "mlp/gate": "gate",
    "mlp/up": "up",
    "mlp/down": "down",
}
_NORMS = {"attention_norm": "attention_norm", "mlp_norm": "mlp_norm"}


class Norm(nn.Module):
    """RMSNorm."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.scale, EPSILON)


class Block(nn.Module):
    """``x + attention(norm(x))``, then ``x + swiglu(norm(x))``."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        embed, queries = shape.embed_dim, shape.num_heads * shape.head_dim
        keys = shape.num_kv_heads * shape.head_dim
        self.attention_norm, self.mlp_norm = Norm(embed), Norm(embed)
        self.query = nn.Linear(embed, queries, bias=False)
        self.key = nn.Linear(embed, keys, bias=False)
        self.value = nn.Linear(embed, keys, bias=False)
        self.out = nn.Linear(queries, embed, bias=False)
        self.gate = nn.Linear(embed, shape.mlp_dim, bias=False)
        self.up = nn.Linear(embed, shape.mlp_dim, bias=False)
        self.down = nn.Linear(shape.mlp_dim, embed, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        rows, seq, _ = x.shape
        group = self.shape.num_heads // self.shape.num_kv_heads

        def heads(y: torch.Tensor) -> torch.Tensor:
            return y.view(rows, seq, -1, self.shape.head_dim).transpose(1, 2)

        y = self.attention_norm(x)
        query, key = rotate(heads(self.query(y)), cos, sin), rotate(heads(self.key(y)), cos, sin)
        key, value = (t.repeat_interleave(group, dim=1) for t in (key, heads(self.value(y))))
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(rows, seq, -1))
        y = self.mlp_norm(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Twin(nn.Module):
    """Tokens [rows, seq_len + 1] to the mean loss of the next token."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embed = nn.Embedding(shape.vocab_size, shape.embed_dim)
        self.layers = nn.ModuleList([Block(shape) for _ in range(shape.num_layers)])
        self.norm = Norm(shape.embed_dim)
        self.head = nn.Linear(shape.embed_dim, shape.vocab_size, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        on = {"dtype": torch.float32, "device": inputs.device}
        pairs = torch.arange(self.shape.head_dim // 2, **on)
        frequency = ROPE_BASE ** (-2.0 * pairs / self.shape.head_dim)
        angle = torch.arange(inputs.shape[1], **on)[:, None] * frequency
        cos, sin = angle.cos(), angle.sin()
        x = self.embed(inputs)
        for block in self.layers:
            x = block(x, cos, sin)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turns the pairs (i, i + head_dim / 2)."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def to_torch(weights: dict[str, np.ndarray], shape: Shape) -> dict[str, torch.Tensor]:
    """A state dict of :class:`Twin` from jdml's leaves."""
    found = {
        "embed.weight": weights["embed/embedding"],
        "norm.scale": weights["norm/scale"],
        "head.weight": weights["head/kernel"].T,
    }
    for i in range(shape.num_layers):
        for theirs, ours in _NORMS.items():
            found[f"layers.{i}.{ours}.scale"] = weights[f"layers/{theirs}/scale"][i]
        for theirs, ours in _KERNELS.items():
            kernel = weights[f"layers/{theirs}/kernel"][i]
            # The attention's output has two input dims, every other kernel has one.
            inputs = kernel.shape[0] * (kernel.shape[1] if ours == "out" else 1)
            found[f"layers.{i}.{ours}.weight"] = kernel.reshape(inputs, -1).T
    return {name: torch.from_numpy(np.ascontiguousarray(x)) for name, x in found.items()}


def to_jdml(tensors: dict[str, torch.Tensor], like: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The inverse of :func:`to_torch`; ``like`` gives jdml's shapes."""
    arrays = {name: x.detach().numpy() for name, x in tensors.items()}
    found = {
        "embed/embedding": arrays["embed.weight"],
        "norm/scale": arrays["norm.scale"],
        "head/kernel": arrays["head.weight"].T,
    }
    num_layers = len(like["layers/mlp_norm/scale"])
    for theirs, ours in _NORMS.items():
        parts = [arrays[f"layers.{i}.{ours}.scale"] for i in range(num_layers)]
        found[f"layers/{theirs}/scale"] = np.stack(parts)
    for theirs, ours in _KERNELS.items():
        parts = [arrays[f"layers.{i}.{ours}.weight"].T for i in range(num_layers)]
        found[f"layers/{theirs}/kernel"] = np.stack(parts)
    return {name: x.reshape(like[name].shape) for name, x in found.items()}
