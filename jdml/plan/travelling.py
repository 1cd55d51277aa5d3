"""What travels over ``stage``, ``seq`` and ``expert``: activations, keys, rows of experts.

A chip has b samples of s positions (of a micro-batch, in a pipeline), whose keys and values take B
bytes and whose queries take Q in a compute dtype of w bytes; keys' gradients are f32: G = 4 B / w.

- ``stage``: in every tick in which some stage hands something on, all send ``b s embed w`` bytes to
  the next one, and as many back in ticks in which gradients go; at the end the gradients of the
  tables are summed over the stages, f32.
- ``seq``, with K parts, for each layer: ``ring`` and ``gather`` send (K - 1) B forward and
  (K - 1) (B + G) backward; ``ulysses`` (K - 1) / K of 2 Q + B' forward and of 2 Q + 2 B' and a f32
  for each query and head backward, B' being B with key heads repeated to a multiple of K. The keys
  of ``gather`` and ``ulysses`` go in up to 2 K pieces. With ``remat="full"`` what was sent forward
  is sent again.
- ``expert``, with n parts: rows go to their experts and come back, in each pass, and with
  ``remat="full"`` once more: k rows for each token, of which (n - 1) / n leave the chip. A program
  has room for twice the even share (``jdml/models/experts/dropless.py``), or, with a capacity, for
  its places.

Parameters that ``seq`` or ``expert`` leave whole have their gradients summed over it.
"""

import math
from collections.abc import Iterable

from jdml.models import TransformerConfig
from jdml.models.attention.divided import FORMS
from jdml.models.attention.pieces import InPieces
from jdml.models.experts.dropless import rows_of_round
from jdml.plan.exchange import Exchange, all_reduced
from jdml.plan.layout import Layout, divided_config
from jdml.plan.shares import Share, shares
from jdml.plan.ticks import ticks_of
from jdml.plan.work import experts_met


def stages_exchange(
    config: TransformerConfig, layout: Layout, batch: int, seq: int
) -> list[Exchange]:
    """Between neighbouring stages, and the tables' gradients."""
    if layout.stage == 1:
        return []
    ticks, width = ticks_of(layout), config.compute_dtype.itemsize
    tokens = batch // layout.samples // layout.micro_batches * (seq // layout.seq)
    number = ticks.forward + ticks.back
    tables = sum(one.elements for one in shares(config, layout) if not one.stacked)
    return [
        Exchange(
            "activations and their gradients",
            "stage",
            number * tokens * config.embed_dim * width,
            False,
            number,
            "neighbour",
        ),
        Exchange("tables' gradients", "stage", all_reduced(layout.stage, 4 * tables), False, 1),
    ]


def sequences_exchange(
    config: TransformerConfig, layout: Layout, batch: int, seq: int
) -> list[Exchange]:
    """Keys and values, or positions for heads; and gradients of what all parts have."""
    parts = layout.seq
    if parts == 1:
        return []
    ran, width = divided_config(config, layout), config.compute_dtype.itemsize
    layers = config.num_layers // layout.stage
    positions = batch // layout.samples * (seq // parts)
    heads, kv_heads = config.num_heads // layout.model, config.num_kv_heads // layout.model
    again = 1 if config.recomputes == "full" else 0
    pieces = pieces_of_keys(config, layout, seq)
    if ran.attention == "ulysses":
        copies = math.lcm(kv_heads, parts) // kv_heads
        pair = 2 * positions * kv_heads * copies * config.head_dim * width
        query = positions * heads * config.head_dim * width
        forward = 2 * query + pair
        sent = (1 + again) * forward + forward + pair + 4 * positions * heads
        sent *= (parts - 1) / parts
        hidden, what = False, "positions for heads"
        times = (1 + again) * (2 + pieces) + 3 + 2 * pieces
    else:
        pair = 2 * positions * kv_heads * config.head_dim * width
        sent = (parts - 1) * pair * (2 + again + 4 / width)
        hidden, what = True, "keys and values"
        times = (3 + again) * (parts - 1 if ran.attention == "ring" else pieces)
    pattern = {"ulysses": "all-to-all", "ring": "neighbour"}.get(ran.attention, "ring")
    return [
        Exchange(
            what,
            "seq",
            layers * sent,
            hidden,
            layers * layout.micro_batches * times,
            pattern,  # type: ignore[arg-type]
        ),
        _summed("seq", config, layout, shares(config, layout)),
    ]


def pieces_of_keys(config: TransformerConfig, layout: Layout, seq: int) -> int:
    """In which ``gather`` and ``ulysses`` see a chip's keys; 1 of a ring."""
    ran = divided_config(config, layout)
    form = FORMS[ran.attention]("seq", layout.seq, ran.causal, ran.seq_order, ran.attention_block)
    return form.cut(seq // layout.seq).pieces if isinstance(form, InPieces) else 1


def experts_exchange(
    config: TransformerConfig, layout: Layout, batch: int, seq: int
) -> list[Exchange]:
    """Rows to their experts and back; and gradients of what is not the experts'."""
    parts = layout.expert
    if parts == 1 or config.num_experts is None:
        return []
    layers = config.num_layers // layout.stage
    tokens = batch // layout.samples // layout.micro_batches * (seq // layout.seq)
    row = config.embed_dim * config.compute_dtype.itemsize
    passes = 3 if config.recomputes == "full" else 2
    sent = experts_met(config, seq) * tokens * row * (parts - 1) / parts
    room = 1.0
    if config.capacity_factor is None:
        size, _ = rows_of_round(tokens, config.experts_per_token, config.num_experts, parts)
        room = parts * size * row / sent
    runs = layers * layout.micro_batches * 2 * passes
    owned = [one for one in shares(config, layout) if "expert" not in one.axes]
    return [
        Exchange(
            "rows to experts and back", "expert", runs * sent, False, runs, "all-to-all", room
        ),
        _summed("expert", config, layout, owned),
    ]


def _summed(
    axis: str, config: TransformerConfig, layout: Layout, owned: Iterable[Share]
) -> Exchange:
    """Gradients of the layers' parameters that the axis leaves whole."""
    payload = config.compute_dtype.itemsize * sum(one.elements for one in owned if one.stacked)
    sent = all_reduced(layout.sizes[axis], payload)
    return Exchange("gradients of the layers", axis, sent, True, config.num_layers // layout.stage)
