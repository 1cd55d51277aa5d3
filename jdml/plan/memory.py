"""What a step holds on one chip, by formula.

Parameters, gradients and optimiser state are f32 shards, 4 bytes for each of P parameters held:
4 P, 4 P, and 8 P for AdamW (one copy more for each that the exchange keeps). A copy of the layers'
shards in the compute dtype stands beside them, and what the forward pass left for each layer
(*activations*). The rest (*temporaries*) is counted at the fuller of two moments: when a layer is
computed again and differentiated, with its gathered weights, its attention scores in several forms,
and some arrays of the residual stream's size or of the hidden layer's; or when the loss is, with
the head gathered and its gradient whole, or a piece of both (``tables.py``).
"""

from dataclasses import dataclass

from jdml.models import TransformerConfig
from jdml.models.experts.dropless import rows_of_round
from jdml.models.transformer.config import DIVIDED
from jdml.plan.algorithm import Algorithm
from jdml.plan.layout import Layout, divided_config
from jdml.plan.shares import shares
from jdml.plan.tables import num_chunks, num_pieces
from jdml.plan.ticks import ticks_of
from jdml.plan.topology import Topology
from jdml.plan.traffic import returns_scattered


@dataclass(frozen=True)
class Memory:
    """Bytes on one chip.

    Attributes:
      parameters: f32.
      gradients: f32.
      optimiser: Moments, and what the exchange keeps.
      activations: What the forward pass leaves for the backward pass, of all layers.
      temporaries: The rest.
    """

    parameters: int
    gradients: int
    optimiser: int
    activations: int
    temporaries: int

    @property
    def total(self) -> int:
        return (
            self.parameters + self.gradients + self.optimiser + self.activations + self.temporaries
        )


STREAM_COPIES = 6
"""Arrays [batch, seq, embed] that the same layer needs."""
HIDDEN_COPIES = 3
"""Arrays [batch, seq, mlp] that it needs; not at the same time as the scores."""
EXPERT_COPIES = 8
"""Arrays of each width that rows at their experts need: four, and their gradients."""
LARGEST_IN_SCRATCH = 64 * 2**20
"""Bytes of the largest array that is put into a TPU's scratch memory."""


def predict_memory(
    config: TransformerConfig,
    topology: Topology,
    layout: Layout,
    batch: int,
    seq: int,
    algorithm: Algorithm,
) -> Memory:
    """At the fullest moment of a step, on one chip.

    Args:
      config: The model.
      topology: Whose torus says how gradients return, and so in which form they are held.
      layout: The mesh.
      batch: Samples of a step, on all chips together.
      seq: Tokens of a sample.
      algorithm: What the workers exchange.
    """
    owned = shares(config, layout)
    held = sum(share.elements for share in owned)
    stacked = sum(share.elements for share in owned if share.stacked)
    width = config.compute_dtype.itemsize
    layers = config.num_layers // layout.stage
    # Of a micro-batch, in a pipeline.
    tokens = batch // layout.samples // layout.micro_batches * (seq // layout.seq)
    stream = width * tokens * config.embed_dim
    # Offloaded, a layer's leaves the chip while the next one runs.
    kept_layers = min(2, layers) if config.offloads else layers
    saved = kept_layers * _saved(config, layout, tokens, seq)
    between = 0
    narrow = width * stacked if width < 4 else 0
    if layout.stage > 1:
        ticks = ticks_of(layout)
        saved = saved * ticks.slots["kept"] // ticks.chunks
        between = stream * (ticks.slots["input"] + ticks.slots["gradient"])
    words = 1 if layout.stage > 1 else layout.model
    head = config.embed_dim * config.vocab_size // words
    scattered = returns_scattered(topology, layout)

    # The loss: the head in the compute dtype and its gradient, f32, of which a chip's part comes
    # back; or, all-reduced, all of it in the compute dtype. In pieces, both of a piece.
    pieces = num_pieces(config, layout, seq)
    logits = 4 * tokens // num_chunks(config, seq) * config.vocab_size // words
    summed_whole = pieces is None and (layout.seq > 1 or layout.expert > 1)  # over all their axes
    if pieces:
        logits //= pieces
        wide = 4 * tokens * config.embed_dim  # the gradient of what the head multiplies
        passing = _beyond_scratch(3 * stream + wide + logits, max(wide, logits), topology)
        loss = (width + 4) * head // pieces + 4 * head // layout.fsdp + passing
    else:
        copies = 1 + (1 / layout.fsdp if scattered else width / 4) + summed_whole
        passing = _beyond_scratch(3 * stream + logits, logits, topology)
        loss = (width + 4 * copies) * head + passing

    # A layer backward, with the layers' gradients and the head's.
    weights = width * stacked // layers * layout.fsdp
    scores = _scores(config, layout, tokens, seq)
    hidden = width * tokens * config.mlp_dim // layout.model
    working = STREAM_COPIES * stream + max(
        topology.chip.score_bytes * scores, HIDDEN_COPIES * hidden
    )
    # What a ring or a pipeline's branch works on was seen to stay in memory.
    if layout.stage == 1 and divided_config(config, layout).attention != "ring":
        working = _beyond_scratch(working, max(4 * scores, hidden), topology)
    heads_gradient = 4 * head // layout.fsdp if scattered or pieces else width * head
    if summed_whole:
        heads_gradient = 4 * head
    layer = 4 * stacked + heads_gradient + weights + working + _travelling(config, layout, tokens)
    # The update: an all-reduce among the workers leaves some gradients beside their means, from a
    # fifth to all of them.
    update = 4 * held * (1.5 if layout.data > 1 and algorithm.codec is None else 1)
    if layout.stage > 1:
        update += 4 * held  # and those of the stages beside their sums
    fullest = int(max(narrow + saved + between + max(layer, loss), update))
    return Memory(
        parameters=4 * held,
        gradients=4 * held,
        optimiser=4 * held * (2 + algorithm.kept_copies),
        activations=saved,
        temporaries=max(fullest - 4 * held - saved, 0),
    )


def _scores(config: TransformerConfig, layout: Layout, tokens: int, seq: int) -> int:
    """Attention scores that a chip has at once: all of them, or one block for each head."""
    heads = config.num_heads // layout.model
    ran = divided_config(config, layout)
    if ran.attention not in DIVIDED:
        return tokens * seq * heads
    samples = tokens * layout.seq // seq
    return samples * heads * min(ran.attention_block, seq // layout.seq) ** 2


def _travelling(config: TransformerConfig, layout: Layout, tokens: int) -> float:
    """Bytes of keys on their way, and of rows at their experts."""
    width, total = config.compute_dtype.itemsize, 0.0
    if layout.seq > 1:
        keys = 2 * tokens * config.num_kv_heads * config.head_dim // layout.model
        # On their way and at hand; gradients on their way, their sum, and the chip's own part.
        total += keys * (2 * width + 3 * 4)
    if config.num_experts is not None:
        rows, rounds = tokens * config.experts_per_token, 1
        hidden = config.mlp_dim // layout.model
        if layout.expert > 1 and config.capacity_factor is None:
            size, _ = rows_of_round(
                tokens, config.experts_per_token, config.num_experts, layout.expert
            )
            rows, rounds = layout.expert * size, 2
        # Rows as they leave, arrive, are returned and come home; gate, up, what is made of the
        # gate, and the product. Kernels' gradients of the first round and of what may follow.
        total += rows * width * EXPERT_COPIES * (config.embed_dim + hidden)
        kernels = 3 * config.num_experts // layout.expert * config.embed_dim * hidden
        total += 4 * rounds * kernels
    return total


def _beyond_scratch(total: float, largest: int, topology: Topology) -> float:
    """What of passing arrays, ``total`` bytes together, is not in the scratch memory."""
    if largest > LARGEST_IN_SCRATCH:
        return total
    return max(total - topology.chip.scratch, 0.0)


def _saved(config: TransformerConfig, layout: Layout, tokens: int, seq: int) -> int:
    """Bytes that one layer's forward pass leaves."""
    width = config.compute_dtype.itemsize
    if config.recomputes == "full":
        return width * tokens * config.embed_dim
    if config.recomputes == "dots":
        heads = config.head_dim * (config.num_heads + 2 * config.num_kv_heads)
        divided = (heads + 2 * config.mlp_dim) // layout.model
        return width * tokens * (2 * config.embed_dim + divided)
    # Many of these in f32.
    divided = (5 * seq * config.num_heads + 4 * config.mlp_dim) // layout.model
    return width * tokens * (12 * config.embed_dim + divided)
