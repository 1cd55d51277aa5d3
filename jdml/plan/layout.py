"""Mesh shapes that divide a model and a batch."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from jdml.models import TransformerConfig
from jdml.plan.topology import Topology

AXES = ("data", "fsdp", "model")


@dataclass(frozen=True)
class Layout:
    """Sizes of the mesh axes.

    Attributes:
      data: Workers, each with a copy of the model, who exchange what the algorithm says. The axis
        that crosses slices.
      fsdp: Parts of each copy and of its worker's samples; gathered layer by layer.
      model: Parts of each layer's heads, hidden units and words (tensor parallelism).
    """

    data: int = 1
    fsdp: int = 1
    model: int = 1

    @property
    def sizes(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in AXES}

    @property
    def num_chips(self) -> int:
        return self.data * self.fsdp * self.model

    def __str__(self) -> str:
        return " × ".join(f"{name}={size}" for name, size in self.sizes.items())

    def spans(self, topology: Topology) -> dict[str, tuple[int, int]]:
        """``(inside, across)`` of each axis: its chips in one slice or node, and how many of those.

        The last axis lies closest together.
        """
        room = topology.num_chips // topology.num_groups
        found = {}
        for axis, size in reversed(self.sizes.items()):
            inside = math.gcd(size, room)
            found[axis] = (inside, size // inside)
            room //= inside
        return {axis: found[axis] for axis in AXES}


def refusal(
    layout: Layout, config: TransformerConfig, topology: Topology, batch: int
) -> str | None:
    """Why the layout cannot be, or None."""
    if layout.num_chips != topology.num_chips:
        return f"{layout} is {layout.num_chips} chips, {topology} has {topology.num_chips}"
    if topology.is_tpu and layout.data % topology.num_slices:
        return f"data={layout.data} does not divide over {topology.num_slices} slices"
    if batch % (layout.data * layout.fsdp):
        return f"data × fsdp = {layout.data * layout.fsdp} does not divide the batch, {batch}"
    if config.embed_dim % layout.fsdp:
        return f"fsdp={layout.fsdp} does not divide embed_dim={config.embed_dim}"
    for name in ("num_heads", "num_kv_heads", "mlp_dim", "vocab_size"):
        if getattr(config, name) % layout.model:
            return f"model={layout.model} does not divide {name}={getattr(config, name)}"
    return None


def layouts(config: TransformerConfig, topology: Topology, batch: int) -> list[Layout]:
    """All that divide.

    Raises:
      ValueError: none does; says for each axis what stands in the way.
    """
    tried = list(_products(topology.num_chips))
    found = [one for one in tried if refusal(one, config, topology, batch) is None]
    if not found:
        reasons = [refusal(one, config, topology, batch) for one in tried]
        # The most divided model leaves the batch the fewest parts.
        nearest = [r for r in dict.fromkeys(reasons) if r is not None and "batch" in r]
        most = _most_model(config, topology.num_chips)
        parts = topology.num_chips // most
        raise ValueError(
            f"no mesh of {topology.num_chips} chips divides a batch of {batch}: "
            f"{(nearest or [r for r in reasons if r])[-1]}. The heads let model be at most {most}, "
            f"so that data × fsdp is at least {parts}; take a batch that is a multiple of {parts}"
        )
    return found


def _most_model(config: TransformerConfig, num_chips: int) -> int:
    dims = (config.num_heads, config.num_kv_heads, config.mlp_dim, config.vocab_size)
    return math.gcd(*dims, num_chips)


def _products(num_chips: int) -> Iterator[Layout]:
    divisors = [n for n in range(1, num_chips + 1) if num_chips % n == 0]
    for model in divisors:
        for fsdp in divisors:
            if num_chips % (model * fsdp) == 0:
                yield Layout(num_chips // (model * fsdp), fsdp, model)
