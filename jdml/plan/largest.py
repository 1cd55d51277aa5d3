"""The largest exchange of a compiled step beside what one layer has.

A **layer's share** is what of one decoder layer is exchanged at once where layers come one by one:
of its parameters those that ``model`` leaves to a chip, whole along ``fsdp``, in the dtype of the
collective; of activations a chip's part of the residual stream, [batch, seq, embed]. Embedding and
head are layers of their own, in pieces no larger than that. Activations are what goes over
``model``, and what ``all-to-all`` carries over ``fsdp``; parameters and their gradients, all else.

A program in which no exchange is larger than that needs no room that grows with the depth of the
model or with its vocabulary, and can exchange a layer while it computes another.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from jdml.models import TransformerConfig
from jdml.plan.layout import Layout


@dataclass(frozen=True)
class Largest:
    """Of one class of exchanges.

    Attributes:
      row: Of ``compiled_traffic``; ``row["largest"]`` counts the bytes.
      share: A layer's, in the same dtype, in bytes.
    """

    row: dict[str, Any]
    share: float

    @property
    def layers(self) -> float:
        """How many layers' shares it carries at once: at most 1."""
        return self.row["largest"] / self.share


def largest(
    rows: Iterable[dict[str, Any]], config: TransformerConfig, layout: Layout, batch: int, seq: int
) -> dict[str, Largest]:
    """The largest for its share of ``"parameters"`` and of ``"activations"``, as far as any are.

    Args:
      rows: from ``compiled_traffic``.
      config: The model.
      layout: The mesh.
      batch: Samples of a step, on all chips together.
      seq: Tokens of a sample.
    """
    tokens = batch // layout.samples * (seq // layout.seq)
    elements = {
        "parameters": config.num_layer_params / layout.model,
        "activations": tokens * config.embed_dim,
    }
    found: dict[str, Largest] = {}
    for row in rows:
        passing = row["axes"] == ["model"] or (row["axes"], row["kind"]) == (["fsdp"], "all-to-all")
        name = "activations" if passing else "parameters"
        one = Largest(row, elements[name] * _width(row["dtype"]))
        if name not in found or one.layers > found[name].layers:
            found[name] = one
    return found


def _width(dtypes: str) -> int:
    """Bytes of an element, of several dtypes those of the narrowest."""
    widths = [re.search(r"\d+", dtype) for dtype in dtypes.split(",")]
    return min(max(int(width[0]) // 8, 1) if width else 1 for width in widths)
