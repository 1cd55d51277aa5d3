"""How long a step takes at least: each resource at its peak, and what cannot run side by side.

    step = max(products, memory, hidden exchanges) + exchanges that are waited for + bubble + slow

Products, memory traffic, the gathering of weights and the keys of a ring run beside one another, so
the slowest counts; sums over ``model``, whose results the next product needs, rows on their way to
experts and back, what stages hand on, and the workers' exchange after the backward pass stand
alone. The bubble is how long a stage waits, for its layers' share of all that, by the schedule in
ticks. These are bounds from below: nothing reaches all its peaks. They rank meshes, and say what to
change; they do not promise a time.

Reference: Williams, Waterman and Patterson, "Roofline", 2009; Austin et al., "How to Scale Your
Model", 2025.
"""

import math
from dataclasses import dataclass

from jdml.models import TransformerConfig
from jdml.plan.algorithm import Algorithm
from jdml.plan.layout import Layout
from jdml.plan.memory import Memory, predict_memory
from jdml.plan.shares import shares
from jdml.plan.ticks import ticks_of
from jdml.plan.topology import HOP_SECONDS, SLOW_SECONDS, Topology
from jdml.plan.traffic import Exchange, predict_traffic
from jdml.plan.work import experts_met, pairs_of, predict_work


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
      bubble_seconds: In which a stage waits for others.
      slow_seconds: Exchanges between slices or nodes.
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
    bubble_seconds: float
    slow_seconds: float

    @property
    def seconds(self) -> float:
        """Of a step."""
        return self.beside_seconds + self.exposed_seconds + self.bubble_seconds + self.slow_seconds

    @property
    def beside_seconds(self) -> float:
        """The longest of what runs side by side."""
        return max(self.compute_seconds, self.memory_seconds, self.hidden_seconds)

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
            "bubble": self.bubble_seconds,
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
    work = predict_work(config, layout, batch, seq)
    flops = work.total
    moved = predict_memory_bytes(config, layout, batch, seq)
    times = [_seconds(one, topology, layout) for one in exchanges]
    timed = list(zip(exchanges, times, strict=True))
    compute, memory = flops / chip.flops, moved / chip.memory_bandwidth
    hidden = sum(fast for one, (fast, _) in timed if one.hidden)
    exposed = sum(fast for one, (fast, _) in timed if not one.hidden)
    bubble = 0.0
    if layout.stage > 1:
        # The final part's share stretches ticks of the last stage, and is no stage's waiting.
        busy = (max(compute, memory, hidden) + exposed) * (1 - work.head / flops)
        forward = work.forward / (work.forward + work.backward) * busy
        bubble = ticks_of(layout).waiting(forward, busy - forward)
    return Prediction(
        layout=layout,
        flops=flops,
        memory_bytes=moved,
        exchanges=exchanges,
        memory=predict_memory(config, topology, layout, batch, seq, algorithm),
        capacity=chip.memory,
        compute_seconds=compute,
        memory_seconds=memory,
        hidden_seconds=hidden,
        exposed_seconds=exposed,
        bubble_seconds=bubble,
        slow_seconds=sum(slow for _, (_, slow) in timed),
    )


def predict_memory_bytes(config: TransformerConfig, layout: Layout, batch: int, seq: int) -> float:
    """Between one chip and its memory in a step, about.

    The update reads and writes parameters and two moments and reads the gradient (28 bytes a
    parameter); a layer's gathered weights are written and read in each of three passes, and a
    pipeline reads and writes the sum of its gradients, f32, for every micro-batch; the residual
    stream crosses about 40 times a layer, the hidden layer 15 times (of a mixture once for each
    expert that a token meets), and the scores six times in f32.
    """
    owned = shares(config, layout)
    width = config.compute_dtype.itemsize
    held = sum(share.elements for share in owned)
    stacked = sum(share.elements for share in owned if share.stacked)
    tokens = batch // layout.samples * seq // layout.seq
    layers = config.num_layers / layout.stage
    pairs = pairs_of(config, layout, seq) * batch / layout.samples
    scores = pairs * config.num_heads / layout.model
    met = 1.0 if config.num_experts is None else experts_met(config, seq) + config.shared_experts
    hidden = tokens * config.mlp_dim * met / layout.model
    layer = width * (40 * tokens * config.embed_dim + 15 * hidden) + 6 * 4 * scores
    logits = 4 * tokens * config.vocab_size / (1 if layout.stage > 1 else layout.model)
    passes = 6 * width * layout.fsdp * stacked * layout.micro_batches
    sums = 8 * stacked * layout.micro_batches if layout.stage > 1 else 0
    return 28 * held + passes + sums + layers * layer + 4 * logits


def _seconds(one: Exchange, topology: Topology, layout: Layout) -> tuple[float, float]:
    """Inside slices or nodes, and between them; first inside, what is left then across.

    What goes to a neighbour takes one link. What every chip of a torus sends to every other crosses
    n / 4 links on average along a dim of n.
    """
    axes, chip = one.axis.split("+"), topology.chip
    spans = [layout.spans(topology)[axis] for axis in axes]
    inside, across = (math.prod(numbers) for numbers in zip(*spans, strict=True))
    size = inside * across
    share = 1.0 if one.pattern == "neighbour" else (across - 1) / (size - 1)
    slow = one.sent_bytes * share if across > 1 else 0.0
    fast = one.sent_bytes if one.pattern == "neighbour" else one.sent_bytes - slow
    links = topology.links(layout.sizes)
    # A sum over several axes runs along the links of all.
    speed = sum(links[axis] for axis in axes) if topology.is_tpu else chip.link_bandwidth
    hops = 2 * (inside - 1)
    if one.pattern == "neighbour":
        speed, hops = chip.link_bandwidth, 1
    elif one.pattern == "all-to-all" and topology.is_tpu:
        speed /= max(min(inside, max(topology.shape)) / 4, 1)
    fast_seconds = fast / speed + one.times * hops * HOP_SECONDS if inside > 1 else 0.0
    if across == 1:
        return fast_seconds, 0.0
    slow_hops = 1 if one.pattern == "neighbour" else 2 * (across - 1)
    return fast_seconds, slow / chip.slow_bandwidth + one.times * slow_hops * SLOW_SECONDS
