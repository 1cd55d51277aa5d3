"""How long a step takes at least: each resource at its peak, and what cannot run side by side.

    step = (max(products, memory, hidden exchanges) + exchanges that are waited for) · bubble

Products, memory traffic and the gathering of weights run beside one another, so the slowest
counts; sums over ``model``, whose results the next product needs, and the workers' exchange
after the backward pass stand alone. These are bounds from below: nothing reaches all its peaks.
They rank meshes, and say what to change; they do not promise a time.

Reference: Williams, Waterman and Patterson, "Roofline", 2009; Austin et al., "How to Scale Your
Model", 2025.
"""

from dataclasses import dataclass

from jdml.models import TransformerConfig
from jdml.plan.algorithm import Algorithm
from jdml.plan.layout import Layout
from jdml.plan.memory import Memory, predict_memory
from jdml.plan.shares import shares
from jdml.plan.topology import HOP_SECONDS, SLOW_SECONDS, Topology
from jdml.plan.traffic import SMALL_VOCABULARY, Exchange, predict_traffic


@dataclass(frozen=True)
class Prediction:
    """Of one layout, for one chip and one step.

    Attributes:
      layout: The mesh.
      flops: Of matrix products.
      memory_bytes: Between chip and memory.
      exchanges: What is sent.
      memory: What is held.
      capacity: What may be held.
      compute_seconds, memory_seconds: Each alone, at its peak.
      hidden_seconds: Exchanges that run beside products.
      exposed_seconds: Those that are waited for, inside a slice or node.
      slow_seconds: Those between slices or nodes.
    """

    layout: Layout
    flops: float
    memory_bytes: float
    exchanges: tuple[Exchange, ...]
    memory: Memory
    capacity: int
    compute_seconds: float
    memory_seconds: float
    hidden_seconds: float
    exposed_seconds: float
    slow_seconds: float

    @property
    def seconds(self) -> float:
        """Of a step."""
        beside = max(self.compute_seconds, self.memory_seconds, self.hidden_seconds)
        return beside + self.exposed_seconds + self.slow_seconds

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.capacity

    @property
    def bound(self) -> str:
        """What takes longest."""
        times = {
            "products": self.compute_seconds,
            "memory": self.memory_seconds,
            "weights gathered": self.hidden_seconds,
            "exchanges": self.exposed_seconds,
            "slow network": self.slow_seconds,
        }
        return max(times, key=lambda name: times[name])


def predict_step(
    config: TransformerConfig,
    topology: Topology,
    layout: Layout,
    batch: int,
    seq: int,
    algorithm: Algorithm,
) -> Prediction:
    """What a layout holds, sends and computes in a step, and how long that takes at least."""
    chip = topology.chip
    exchanges = predict_traffic(config, topology, layout, batch, seq, algorithm)
    flops = predict_flops(config, layout, batch, seq)
    moved = predict_memory_bytes(config, layout, batch, seq)
    times = [_seconds(one, topology, layout) for one in exchanges]
    timed = list(zip(exchanges, times, strict=True))
    return Prediction(
        layout=layout,
        flops=flops,
        memory_bytes=moved,
        exchanges=exchanges,
        memory=predict_memory(config, topology, layout, batch, seq, algorithm),
        capacity=chip.memory,
        compute_seconds=flops / chip.flops,
        memory_seconds=moved / chip.memory_bandwidth,
        hidden_seconds=sum(fast for one, (fast, _) in timed if one.hidden),
        exposed_seconds=sum(fast for one, (fast, _) in timed if not one.hidden),
        slow_seconds=sum(slow for _, (_, slow) in timed),
    )


def predict_flops(config: TransformerConfig, layout: Layout, batch: int, seq: int) -> float:
    """Of one chip's matrix products in a step.

    Forward 2 for each weight of a product and token, and 4 for each attention score and head
    dim's entry (masked ones too); backward twice that. The backward pass computes again, with
    ``remat="full"``, the blocks but for their last product; with ``"dots"`` the attention; and the
    logits where the loss takes them in parts.
    """
    tokens = batch * seq
    whole = shares(config, Layout())
    kernels = {one.path: one.elements for one in whole if one.stacked and "kernel" in one.path}
    products = 2 * sum(kernels.values()) / config.num_layers
    scores = 4 * seq * config.num_heads * config.head_dim
    last = 2 * config.embed_dim * config.mlp_dim
    again = {"full": products + scores - last, "dots": scores, "none": 0}[config.recomputes]
    head = 2 * config.embed_dim * config.vocab_size
    again_head = head if config.vocab_size > SMALL_VOCABULARY else 0
    layers = config.num_layers * (3 * (products + scores) + again)
    return tokens * (layers + 3 * head + again_head) / layout.num_chips


def predict_memory_bytes(config: TransformerConfig, layout: Layout, batch: int, seq: int) -> float:
    """Between one chip and its memory in a step, about.

    The update reads and writes parameters and two moments and reads the gradient (28 bytes a
    parameter); a layer's gathered weights are written and read in each of three passes; the
    residual stream crosses about 40 times a layer, the hidden layer 15 times, and the scores six
    times in f32.
    """
    owned = shares(config, layout)
    width = config.compute_dtype.itemsize
    held = sum(share.elements for share in owned)
    gathered = layout.fsdp * sum(share.elements for share in owned if share.stacked)
    tokens = batch // (layout.data * layout.fsdp) * seq
    scores = tokens * seq * config.num_heads / layout.model
    hidden = tokens * config.mlp_dim / layout.model
    layer = width * (40 * tokens * config.embed_dim + 15 * hidden) + 6 * 4 * scores
    logits = 4 * tokens * config.vocab_size / layout.model
    return 28 * held + 6 * width * gathered + config.num_layers * layer + 4 * logits


def _seconds(one: Exchange, topology: Topology, layout: Layout) -> tuple[float, float]:
    """Inside slices or nodes, and between them; first inside, what is left then across."""
    inside, across = layout.spans(topology)[one.axis]
    size = layout.sizes[one.axis]
    slow = one.sent_bytes * (across - 1) / (size - 1) if across > 1 else 0.0
    fast = one.sent_bytes - slow
    speed = topology.links(layout.sizes)[one.axis]
    hops = one.times * 2 * (inside - 1) * HOP_SECONDS
    slow_hops = one.times * 2 * (across - 1) * SLOW_SECONDS
    return fast / speed + hops, slow / topology.chip.slow_bandwidth + slow_hops
