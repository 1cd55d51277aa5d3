"""The shape of a decoder, validated when it is written down."""

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax.numpy as jnp

from jdml.models.experts.routing import Order

Dtype = Literal["float32", "bfloat16", "float16"]
Remat = Literal["none", "dots", "full", "offload_dots", "offload_full"]
Matmul = Literal["dtype", "fp8", "fp8_emulated"]
Norm = Literal["rms", "layer"]
Positions = Literal["rotary", "learned"]
Mlp = Literal["swiglu", "gelu"]
Attention = Literal["full", "xla", "cudnn", "ring", "ulysses", "gather"]
DIVIDED = ("ring", "ulysses", "gather")
SeqOrder = Literal["contiguous", "zigzag"]

_COUNTS = (
    "vocab_size",
    "num_layers",
    "embed_dim",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "mlp_dim",
    "max_seq_len",
    "attention_block",
)


@dataclass(frozen=True)
class TransformerConfig:
    """A decoder with grouped-query attention: Llama's parts by default, GPT-2's by four words.

    ``norm="layer", positions="learned", mlp="gelu", bias=True`` is GPT-2's form. The defaults are a
    byte-level model of 0.85 million parameters; ``presets`` has published shapes.

    Args:
      vocab_size: number of token ids.
      num_layers: number of blocks.
      embed_dim: width of the residual stream.
      num_heads: query heads.
      num_kv_heads: key and value heads; ``num_heads / num_kv_heads`` queries share one.
      head_dim: width of a head; even with rotary positions, which turn pairs.
      mlp_dim: width of the MLP's hidden layer.
      max_seq_len: longest sequence accepted, in tokens; rows of the table of learned positions.
      norm: ``"rms"`` or ``"layer"``, before attention, before the MLP and before the head.
      positions: ``"rotary"``, in queries and keys; ``"learned"``, a table added to the embedding.
      mlp: ``"swiglu"``, with a gate; ``"gelu"``, without (the tanh form of GELU).
      num_experts: the MLP becomes that many, each ``mlp_dim`` wide; None for one without a router.
      experts_per_token: how many of them a token passes through.
      capacity_factor: each expert takes ``⌈capacity_factor · experts_per_token · seq /
        num_experts⌉`` tokens of a sequence and the rest is dropped; None drops none.
      shared_experts: further experts, which all tokens pass through.
      router: how logits become weights: softmax over those of the chosen experts (Mixtral), or over
        all (Switch).
      balance_weight, importance_weight, z_weight: of the routers' losses in ``training_loss``.
      bias: projections and LayerNorm have biases; the head and RMSNorm never do.
      causal: a position sees itself and those before it; without, all (an encoder).
      attention: ``"full"``, all scores at once; ``"xla"`` or ``"cudnn"``, by
        ``jax.nn.dot_product_attention``, the latter on NVIDIA GPUs alone (cuDNN's flash attention);
        or, in blocks and over a sequence that a mesh axis divides, ``"ring"``, ``"ulysses"`` or
        ``"gather"`` (``jdml.models.attention``).
      seq_order: ``"zigzag"`` where tokens and targets are in that order (``zigzag``), for equal
        work on the devices of a ring.
      attention_block: positions of a block of scores, at most, with attention in blocks.
      rope_base: the slowest pair of a head turns once in about ``2π · rope_base`` positions.
      norm_epsilon: added to the mean square in RMSNorm, to the variance in LayerNorm.
      tie_embeddings: the head multiplies by the transposed embedding, and has no kernel.
      dropout: rate after the embedding and on each residual branch, where a key is given.
      dtype: of activations and matrix products; parameters, norms, softmax and loss are float32.
        ``"float16"`` needs ``jdml.train.dynamic_loss_scale``, ``"bfloat16"`` does not.
      matmul: ``"fp8"``, attention's and the MLP's products with parameters in 8-bit floats
        (``fp8.py``), where the devices have them; ``"fp8_emulated"``, rounded likewise on any
        device. Scores, routed experts and the head keep to ``dtype``.
      remat: what the backward pass computes again: ``"none"``; ``"dots"``, all but the products
        with parameters; ``"full"``, every block from its input. On CPU ``"dots"`` is the fastest
        too, for it moves a third of the memory. ``"offload_dots"`` and ``"offload_full"`` keep
        the same in the host's memory (``remat.py``).
      unroll: write the layers out instead of scanning them; compilation grows with depth. The
        parameters are stacked in either case, so one checkpoint serves both.
      flatten_tokens: project ``[batch * seq, in]`` rather than ``[batch, seq, in]``. On CPU this
        halves the time of a block, because gradients of kernels then need no transposed copies.
        Set it to False when a mesh axis divides ``seq``: the merged dim would be gathered.
    """

    vocab_size: int = 256
    num_layers: int = 4
    embed_dim: int = 128
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 32
    mlp_dim: int = 384
    max_seq_len: int = 2048
    norm: Norm = "rms"
    positions: Positions = "rotary"
    mlp: Mlp = "swiglu"
    num_experts: int | None = None
    experts_per_token: int = 2
    capacity_factor: float | None = None
    shared_experts: int = 0
    router: Order = "top_k_then_softmax"
    balance_weight: float = 0.01
    importance_weight: float = 0.0
    z_weight: float = 0.001
    bias: bool = False
    causal: bool = True
    attention: Attention = "full"
    seq_order: SeqOrder = "contiguous"
    attention_block: int = 512
    rope_base: float = 10_000.0
    norm_epsilon: float = 1e-6
    tie_embeddings: bool = False
    dropout: float = 0.0
    dtype: Dtype = "float32"
    matmul: Matmul = "dtype"
    remat: Remat = "dots"
    unroll: bool = False
    flatten_tokens: bool = True

    def __post_init__(self) -> None:
        for name in _COUNTS:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} must be a multiple of num_kv_heads="
                f"{self.num_kv_heads}: each key head serves the same number of query heads"
            )
        if self.positions == "rotary" and self.head_dim % 2:
            raise ValueError(
                f"head_dim must be even, for rotary positions turn pairs; got {self.head_dim}"
            )
        for name in ("rope_base", "norm_epsilon"):
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be positive and finite, got {value!r}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {self.dropout!r}")
        for name, allowed in (
            ("dtype", get_args(Dtype)),
            ("matmul", get_args(Matmul)),
            ("remat", get_args(Remat)),
            ("norm", ("rms", "layer")),
            ("positions", ("rotary", "learned")),
            ("mlp", ("swiglu", "gelu")),
            ("attention", get_args(Attention)),
            ("seq_order", ("contiguous", "zigzag")),
            ("router", get_args(Order)),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
        if self.attention not in DIVIDED and self.seq_order == "zigzag":
            raise ValueError(
                "seq_order='zigzag' needs attention='ring', 'gather' or 'ulysses': "
                f"{self.attention} attention takes positions in the order of the text"
            )
        if self.attention == "cudnn" and self.dtype == "float32":
            raise ValueError(
                "attention='cudnn' takes no float32: set dtype='bfloat16' or 'float16', or "
                "attention='xla'"
            )
        if self.attention in DIVIDED and self.flatten_tokens:
            raise ValueError(
                f"attention={self.attention!r} is for a divided sequence, which flatten_tokens "
                "would gather; set flatten_tokens=False"
            )

        self._check_experts()

    def _check_experts(self) -> None:
        for name, least in (("num_experts", 1), ("experts_per_token", 1), ("shared_experts", 0)):
            value = getattr(self, name)
            if name == "num_experts" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an integer from {least} on, got {value!r}")
        for name in ("balance_weight", "importance_weight", "z_weight"):
            value = getattr(self, name)
            if not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be finite and at least 0, got {value!r}")
        factor = self.capacity_factor
        if factor is not None and not (factor > 0 and math.isfinite(factor)):
            raise ValueError(
                f"capacity_factor must be positive and finite, or None to drop no token; got "
                f"{factor!r}"
            )
        if self.num_experts is None:
            if self.shared_experts or factor is not None:
                raise ValueError(
                    f"shared_experts={self.shared_experts} and capacity_factor={factor!r} need "
                    "num_experts, which is None: set it, or leave them out"
                )
            return
        if self.experts_per_token > self.num_experts:
            raise ValueError(
                f"experts_per_token={self.experts_per_token} of num_experts={self.num_experts}: "
                f"a token's experts are different ones; take at most {self.num_experts}"
            )
        if self.bias:
            raise ValueError("experts have no biases: set bias=False, or num_experts=None")

    @property
    def compute_dtype(self) -> Any:
        """``dtype`` as JAX names it."""
        return jnp.dtype(self.dtype)

    @property
    def recomputes(self) -> str:
        """What ``remat`` computes again, wherever the rest is kept: ``"none"``, ``"dots"``, …."""
        return self.remat.removeprefix("offload_")

    @property
    def offloads(self) -> bool:
        """Whether ``remat`` keeps what it keeps in the host's memory."""
        return self.remat.startswith("offload_")

    @property
    def num_params(self) -> int:
        """Number of parameters, counted from the shapes."""
        return self._num_params(self.num_experts)

    @property
    def num_active_params(self) -> int:
        """Number of those that a token meets: of the experts the chosen and the shared ones."""
        return self._num_params(self.num_experts and self.experts_per_token)

    @property
    def num_layer_params(self) -> int:
        """Number of a block's parameters, all experts among them."""
        return self._num_layer_params(self.num_experts)

    def _num_params(self, experts: int | None) -> int:
        embed = self.embed_dim
        norm = embed * (2 if self.norm == "layer" and self.bias else 1)
        tables = (1 if self.tie_embeddings else 2) * self.vocab_size * embed
        if self.positions == "learned":
            tables += self.max_seq_len * embed
        return self.num_layers * self._num_layer_params(experts) + tables + norm

    def _num_layer_params(self, experts: int | None) -> int:
        embed, bias = self.embed_dim, int(self.bias)
        attention = 2 * embed * self.head_dim * (self.num_heads + self.num_kv_heads)
        attention += bias * (self.head_dim * (self.num_heads + 2 * self.num_kv_heads) + embed)
        hidden = 2 if self.mlp == "swiglu" else 1
        mlp = (hidden + 1) * embed * self.mlp_dim + bias * (hidden * self.mlp_dim + embed)
        if experts is not None and self.num_experts is not None:
            mlp = mlp * (experts + self.shared_experts) + embed * self.num_experts
        norm = embed * (2 if self.norm == "layer" and self.bias else 1)
        return attention + mlp + 2 * norm
