"""Matrix products of one chip in a step.

Forward 2 for each weight of a product and token (of a mixture's experts those that it meets), and 4
for each attention score and entry of a head dim; backward twice that. Scores are of all pairs of
positions, masked ones too, or, with attention in blocks, of the blocks that meet, and then cost 10
backward, for they are not kept. The backward pass computes again, with ``remat="full"``, a block
but for its last product; with ``"dots"`` scores that are all taken at once; and the logits where
the loss takes them in parts.
"""

from dataclasses import dataclass

from jdml.models import TransformerConfig
from jdml.models.attention.blocks import block_size
from jdml.models.experts.capacity import capacity_of
from jdml.models.lookup import SMALL_VOCABULARY
from jdml.models.transformer.config import DIVIDED
from jdml.plan.layout import Layout, divided_config
from jdml.plan.shares import shares


@dataclass(frozen=True)
class Work:
    """FLOPs of one chip in a step.

    Attributes:
      forward: Of its layers.
      backward: Of its layers, with what is computed again.
      head: Of the logits, both passes; in a pipeline on the last stage alone.
    """

    forward: float
    backward: float
    head: float

    @property
    def total(self) -> float:
        """Of the chip that has most."""
        return self.forward + self.backward + self.head


def predict_work(config: TransformerConfig, layout: Layout, batch: int, seq: int) -> Work:
    """Of one chip's matrix products in a step, padding and elementwise work left out."""
    tokens = batch * seq / (layout.samples * layout.seq)
    layers = config.num_layers / layout.stage
    products, last = _products(config, seq)
    ran = divided_config(config, layout)
    pairs = pairs_of(config, layout, seq) * batch / layout.samples
    scores = pairs * config.num_heads * config.head_dim
    whole = ran.attention not in DIVIDED
    forward = tokens * products + 4 * scores
    again = {
        "full": tokens * (products - last) + 4 * scores,
        "dots": 4 * scores if whole else 0.0,
        "none": 0.0,
    }[config.recomputes]
    backward = 2 * tokens * products + (8 if whole else 10) * scores + again
    head = 2 * config.embed_dim * config.vocab_size * tokens
    passes = 4 if config.vocab_size > SMALL_VOCABULARY else 3
    divided = 1 if layout.stage > 1 else layout.model
    return Work(
        layers * forward / layout.model, layers * backward / layout.model, passes * head / divided
    )


def _products(config: TransformerConfig, seq: int) -> tuple[float, float]:
    """FLOPs of a layer's products with weights for a token, forward; and of the last of them."""
    whole = {
        one.path: one.elements / config.num_layers
        for one in shares(config, Layout())
        if one.stacked
    }
    plain = sum(size for path, size in whole.items() if path.endswith("kernel"))
    if config.num_experts is None:
        return 2 * plain, 2 * config.embed_dim * config.mlp_dim
    kernels = sum(whole.get(f"layers/mlp/{name}", 0.0) for name in ("gate", "up", "down"))
    met = experts_met(config, seq)
    routed = whole["layers/mlp/router"] + met * kernels / config.num_experts
    # What the experts return is weighted, so that the weights' gradient needs all of it again.
    return 2 * (plain + routed), 2 * config.embed_dim * config.mlp_dim * config.shared_experts


def experts_met(config: TransformerConfig, seq: int) -> float:
    """Rows of experts for each token: its choices, or the places where their room is stated."""
    if config.num_experts is None:
        return 0.0
    if config.capacity_factor is None:
        return config.experts_per_token
    places = capacity_of(config.capacity_factor, config.experts_per_token, seq, config.num_experts)
    return config.num_experts * places / seq


def pairs_of(config: TransformerConfig, layout: Layout, seq: int) -> float:
    """Scores of one sequence and head that a chip computes forward, on the busiest chip.

    With ``ulysses``, whose chips have some heads each, as a mean over all heads.
    """
    ran, parts = divided_config(config, layout), layout.seq
    length = seq // parts
    if ran.attention not in DIVIDED or not ran.causal:
        return length * seq
    zigzag = ran.seq_order == "zigzag" and parts > 1
    size = block_size(length // (2 if zigzag else 1), ran.attention_block)

    def triangle(positions: int) -> int:
        return positions * (positions + size) // 2

    if ran.attention == "ulysses":
        return triangle(seq) / parts
    if not zigzag:
        return triangle(length) + (parts - 1) * length**2
    chunk = length // 2
    if ran.attention == "ring":
        return triangle(length) + 2 * (parts - 1) * chunk**2
    return (2 * parts + 1) * chunk**2
