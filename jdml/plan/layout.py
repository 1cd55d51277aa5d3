"""Meshes, and what goes with them: how a pipeline runs, how a divided sequence is attended."""

import dataclasses
import math
import re
from dataclasses import dataclass
from functools import cache
from typing import Any

from jdml.models import TransformerConfig
from jdml.models.transformer.config import DIVIDED
from jdml.partition.pipeline import Schedule, gpipe, interleaved, one_f_one_b, zero_bubble
from jdml.plan.topology import Topology

AXES = ("data", "stage", "fsdp", "expert", "seq", "model")
"""From the axis whose messages can wait longest to that whose chips should lie closest together."""
_ALWAYS = ("data", "fsdp", "model")

SCHEDULES = ("gpipe", "1f1b", "interleaved:CHUNKS", "zero_bubble")


@dataclass(frozen=True)
class Layout:
    """Sizes of the mesh axes, and how a pipeline runs on them.

    Attributes:
      data: Workers, each with a copy of the model, who exchange what the algorithm says. The axis
        that crosses slices, unless ``stage`` does.
      fsdp: Parts of each copy and of its worker's samples; gathered layer by layer.
      model: Parts of each layer's heads, hidden units and words (tensor parallelism).
      stage: Parts of the stack of layers (a pipeline). Its tables' words are then not divided over
        ``model``.
      seq: Parts of every sequence (context parallelism).
      expert: Parts of a mixture's experts and of its worker's samples.
      micro_batches: Of a pipeline, in a step.
      schedule: Of a pipeline, one of ``SCHEDULES``.
    """

    data: int = 1
    fsdp: int = 1
    model: int = 1
    stage: int = 1
    seq: int = 1
    expert: int = 1
    micro_batches: int = 1
    schedule: str = "1f1b"

    @property
    def sizes(self) -> dict[str, int]:
        """Of the mesh's axes: ``data``, ``fsdp`` and ``model``, and the others longer than 1."""
        sizes = {name: getattr(self, name) for name in AXES}
        return {name: size for name, size in sizes.items() if size > 1 or name in _ALWAYS}

    @property
    def num_chips(self) -> int:
        return math.prod(self.sizes.values())

    @property
    def samples(self) -> int:
        """Parts of the batch."""
        return self.data * self.fsdp * self.expert

    @property
    def chunks(self) -> int:
        """Parts of the stack of layers that each stage holds."""
        return schedule_of(self.schedule).chunks

    @property
    def mesh(self) -> str:
        """The axes longer than 1, for people: ``stage=4 × fsdp=16``."""
        longer = [f"{name}={size}" for name, size in self.sizes.items() if size > 1]
        return " × ".join(longer) or "one chip"

    def __str__(self) -> str:
        if self.stage == 1:
            return self.mesh
        return f"{self.mesh} ({self.schedule}, {self.micro_batches} micro-batches)"

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
        return {axis: found[axis] for axis in self.sizes}

    def crossing(self, topology: Topology) -> dict[str, int] | None:
        """Which axis crosses slices, and how many, as ``make_mesh`` takes it."""
        if topology.num_slices == 1:
            return None
        axis = "stage" if self.data % topology.num_slices else "data"
        return {axis: topology.num_slices}


@cache
def schedule_of(name: str) -> Schedule:
    """``gpipe``, ``1f1b``, ``interleaved:2``, ``zero_bubble``.

    Raises:
      ValueError: none of them.
    """
    plain = {"gpipe": gpipe, "1f1b": one_f_one_b, "zero_bubble": zero_bubble}
    if name in plain:
        return plain[name]()
    match = re.fullmatch(r"interleaved:(\d+)", name)
    if match is None or int(match[1]) < 2:
        raise ValueError(
            f"schedule: expected one of {', '.join(SCHEDULES)} (from 2 chunks on); got {name!r}"
        )
    return interleaved(int(match[1]))


def parse_layout(text: str, schedule: str = "1f1b") -> Layout:
    """``1x64x4`` → data=1 × fsdp=64 × model=4; ``stage=4,fsdp=16,micro_batches=32`` by name.

    Args:
      text: A mesh.
      schedule: Of a pipeline.

    Raises:
      ValueError: neither; or a pipeline that does not say its micro-batches.
    """
    match = re.fullmatch(r"(\d+)x(\d+)x(\d+)", text)
    pairs = [re.fullmatch(r"(\w+)=(\d+)", part.strip()) for part in text.split(",")]
    sizes: dict[str, Any]
    if match is not None:
        sizes = dict(zip(_ALWAYS, map(int, match.groups()), strict=True))
    else:
        sizes = {pair[1]: int(pair[2]) for pair in pairs if pair is not None}
        if None in pairs or len(sizes) < len(pairs) or not sizes.keys() <= {*AXES, "micro_batches"}:
            raise ValueError(
                f"--mesh {text}: expected sizes of data, fsdp and model, as in 1x64x4, or axes by "
                f"name, {', '.join(AXES)}, as in stage=4,fsdp=16,micro_batches=32"
            )
    if min(sizes.values()) < 1:
        raise ValueError(f"--mesh {text}: expected sizes of at least 1")
    if sizes.get("stage", 1) > 1 and "micro_batches" not in sizes:
        raise ValueError(
            f"--mesh {text}: a pipeline runs micro-batches; say how many: "
            f"{text},micro_batches={4 * sizes['stage']}"
        )
    return dataclasses.replace(Layout(**sizes), schedule=schedule)


def divided_config(config: TransformerConfig, layout: Layout) -> TransformerConfig:
    """The model as a step of this layout runs it.

    Attention in rings and zig-zag order where ``seq`` divides a sequence that the configuration
    attends in full; tokens not joined where the rules divide them.
    """
    if layout.seq == 1:
        return config
    if config.attention in DIVIDED:
        return dataclasses.replace(config, flatten_tokens=False)
    return dataclasses.replace(
        config, attention="ring", seq_order="zigzag" if config.causal else "contiguous",
        flatten_tokens=False,
    )  # fmt: skip
