"""Which collectives a step runs, and how many bytes each chip sends in them: by formula.

What the partitioner makes of ``lower_step``, learnt from compiled programs (``tests/plan`` hold the
formula to them). With b samples of s tokens on a chip and a compute dtype of w bytes:

- Weights divided over ``fsdp`` are gathered for the forward pass and once more for the backward
  pass; those of attention, whose backward pass wants them in two layouts, twice more. Embedding and
  head: ``tables.py``; with a small vocabulary they are gathered once in all.
- Gradients return by a reduce-scatter; where ``fsdp`` covers more than one dim of a two-dimensional
  torus, by an all-reduce of which each chip keeps its share: twice the bytes; of a layer, on up to
  ``LARGEST_RING`` chips, around a ring beside the product, with two turns more. Where ``model``
  divides a layer too, its reduce-scatter goes around a ring, with one turn more. On several slices
  the last kernels of attention and MLP are all-reduced over more chips than that.
- With ``model`` a layer adds up ``b s embed w`` bytes twice forward and twice backward, once more
  where the block is computed again; so does the embedding once, and the head its gradient with
  respect to what it multiplied, in f32.
- Where ``seq`` or ``expert`` divides the tokens too, the gradients of the layers are added up by a
  further all-reduce, and so are those of embedding and head, each chip's part of them; where these
  are whole, over all these axes at once.
- In a pipeline all of this is done for every micro-batch.
- ``data`` exchanges what the algorithm says, once a step (or every so often), in f32; exact
  gradients of an embedding that ``fsdp`` does not divide in the compute dtype.
"""

import math

from jdml.models import TransformerConfig
from jdml.plan.algorithm import Algorithm
from jdml.plan.exchange import Exchange, all_gathered, all_reduced
from jdml.plan.layout import Layout
from jdml.plan.shares import Share, shares
from jdml.plan.tables import head_sent, num_chunks, num_pieces, rows_sent, rows_travel
from jdml.plan.topology import Topology
from jdml.plan.travelling import experts_exchange, sequences_exchange, stages_exchange

LARGEST_RING = 16
"""Chips up to which a layer's gradients go around a ring where a reduce-scatter would not."""
INTO_STREAM = ("attention/out/kernel", "mlp/down/kernel")
"""Kernels whose gradients a program for several slices joins, and then cannot scatter."""


def predict_traffic(
    config: TransformerConfig,
    topology: Topology,
    layout: Layout,
    batch: int,
    seq: int,
    algorithm: Algorithm,
) -> tuple[Exchange, ...]:
    """Every exchange of a step that is worth a line, for one chip.

    Args:
      config: The model.
      topology: Whose torus says how gradients return.
      layout: The mesh.
      batch: Samples of a step, on all chips together.
      seq: Tokens of a sample.
      algorithm: What the workers exchange.
    """
    owned = shares(config, layout)
    found = [
        *_weights(config, topology, layout, owned, seq),
        *_tables(config, layout, owned, batch, seq),
        *_activations(config, layout, batch, seq),
        *stages_exchange(config, layout, batch, seq),
        *sequences_exchange(config, layout, batch, seq),
        *experts_exchange(config, layout, batch, seq),
    ]
    if layout.data > 1:
        sizes = [_exchanged(share, config, layout, algorithm) for share in owned]
        sent = algorithm.sent_bytes(layout.data, sizes)
        found.append(Exchange(algorithm.name, "data", sent, False, 1 / algorithm.every))
    return tuple(one for one in found if one.sent_bytes > 0)


def _weights(
    config: TransformerConfig,
    topology: Topology,
    layout: Layout,
    owned: tuple[Share, ...],
    seq: int,
) -> list[Exchange]:
    size, width = layout.fsdp, config.compute_dtype.itemsize
    if size == 1:
        return []
    scatters = returns_scattered(topology, layout)
    gathered = returned = once = 0.0
    pieces, rows = num_pieces(config, layout, seq), rows_travel(config, layout)
    for share in owned:
        if "fsdp" not in share.axes or share.path.endswith("scale"):
            continue
        if pieces if share.path.startswith("head") else rows and share.path.startswith("embed"):
            continue  # ``_tables``
        payload = width * share.elements
        if share.stacked:
            gathered += all_gathered(size, payload) * _num_gathers(share, layout)
        else:
            once += all_gathered(size, payload)
            if len(_of_tokens(layout)) > 1:
                continue  # its gradient is summed over all these axes: ``_tables``
        # The loss adds up the head's gradient in f32.
        wide = 4 if share.path.startswith("head") else width
        scattered = scatters or (share.stacked and size <= LARGEST_RING)
        if topology.num_slices > 1 and size > LARGEST_RING and share.path.endswith(INTO_STREAM):
            scattered = False
        sent = all_reduced(size, wide * share.elements * size) * (0.5 if scattered else 1)
        if share.stacked and scattered and size > 2:
            # Around a ring, beside the product, with one turn more; or around one of two dims, two.
            turns = 0 if scatters and "model" not in share.axes else 1 if scatters else 2
            sent *= (size - 1 + turns) / (size - 1)
        returned += sent
    layers, runs = config.num_layers // layout.stage, layout.micro_batches
    return [
        Exchange("weights of the layers", "fsdp", runs * gathered, True, 2 * runs * layers),
        Exchange("embedding and head", "fsdp", runs * once, False, 2 * runs),
        Exchange("gradients", "fsdp", runs * returned, True, runs * layers),
    ]


def _tables(
    config: TransformerConfig, layout: Layout, owned: tuple[Share, ...], batch: int, seq: int
) -> list[Exchange]:
    """Pieces of the head, rows of the embedding; and, where axes beside ``fsdp`` divide the tokens,
    sums of their gradients: of what each chip stores of a divided table, else whole."""
    found = []
    pieces, travel = num_pieces(config, layout, seq), rows_travel(config, layout)
    if pieces:
        runs = layout.micro_batches
        sent = runs * head_sent(config, layout, pieces)
        found.append(Exchange("head, a piece at a time", "fsdp", sent, False, 3 * pieces * runs))
    if travel:
        tokens = batch // layout.samples * (seq // layout.seq)
        sent = rows_sent(config, layout, tokens)
        found.append(Exchange("rows of the embedding", "fsdp", sent, False, 3))
    axes = _of_tokens(layout)
    others = tuple(axis for axis in axes if axis != "fsdp")
    if not others or layout.stage > 1:
        return found
    sums = dict.fromkeys((others, axes), 0.0)
    for share in owned:
        if share.stacked:
            continue
        of_head = share.path.startswith("head")
        if pieces if of_head else travel and share.path.startswith("embed"):
            sums[others] += all_reduced(_parts(layout, others), 4 * share.elements)
            continue
        whole = share.elements * (layout.fsdp if "fsdp" in share.axes else 1)
        # The loss adds up the head's gradient in f32.
        wide = 4 if of_head else config.compute_dtype.itemsize
        sums[axes] += all_reduced(_parts(layout, axes), wide * whole)
    what = "gradients of embedding and head"
    return found + [Exchange(what, "+".join(over), sent, False, 2) for over, sent in sums.items()]


def _of_tokens(layout: Layout) -> tuple[str, ...]:
    """Axes that divide the tokens of a worker."""
    return tuple(a for a in ("fsdp", "expert", "seq") if layout.sizes.get(a, 1) > 1)


def _parts(layout: Layout, axes: tuple[str, ...]) -> int:
    return math.prod(layout.sizes[axis] for axis in axes)


def _exchanged(
    share: Share, config: TransformerConfig, layout: Layout, algorithm: Algorithm
) -> int:
    """Elements of f32 that stand for what the workers exchange of a parameter."""
    exact = algorithm.codec is None and not algorithm.averages
    if exact and layout.fsdp == layout.stage == 1 and share.path.startswith("embed"):
        # Added up where the rows were taken from, and only then made f32.
        return share.elements * config.compute_dtype.itemsize // 4
    return share.elements


def _num_gathers(share: Share, layout: Layout) -> int:
    # Of a divided sequence tokens are not joined, and the last product needs its kernel once less.
    again = "attention" in share.path and (layout.seq == 1 or "attention/out" not in share.path)
    return 3 if again else 2


def returns_scattered(topology: Topology, layout: Layout) -> bool:
    """Whether gradients are reduce-scattered over ``fsdp``, and not all-reduced and cut."""
    return topology.chip.dims != 2 or layout.fsdp <= max(topology.shape)


def _activations(config: TransformerConfig, layout: Layout, batch: int, seq: int) -> list[Exchange]:
    size = layout.model
    if size == 1:
        return []
    tokens = batch // layout.samples * (seq // layout.seq)
    stream = tokens * config.embed_dim
    width = config.compute_dtype.itemsize
    per_layer = 5 if config.recomputes == "full" else 4
    chunks = num_chunks(config, seq)
    pieces = num_pieces(config, layout, seq)
    # Forward the largest logit and the sum of exponentials of each position, and the target's
    # logit; and, where they are computed again, the largest and the sum backward.
    sums = 4 * tokens * (3 if pieces else 5)
    return [
        Exchange(
            "sums over heads and hidden units",
            "model",
            all_reduced(size, width * stream) * (per_layer * config.num_layers + 1),
            False,
            per_layer * config.num_layers + 1,
        ),
        Exchange(
            "loss",
            "model",
            all_reduced(size, 4 * stream + sums),
            False,
            chunks + 2 if pieces else 3 * chunks,
        ),
    ]
