"""Which chips, joined how: ``v5e:16x16``, ``2*v5e:16x16`` for two slices, ``h100:64``."""

import itertools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from jdml.plan.hardware import CHIPS, Chip

HOP_SECONDS = 1e-6
"""Of a message from a chip to its neighbour; Austin et al., "How to Scale Your Model", 2025."""
SLOW_SECONDS = 10e-6
"""Of a message through the network of a data centre, about."""


@dataclass(frozen=True)
class Topology:
    """Slices (or nodes) of one kind of chip.

    Attributes:
      chip: Which.
      shape: Chips along each dim of a slice's torus; of GPUs, how many there are in all.
      num_slices: Slices of TPUs, joined by the slow network.
    """

    chip: Chip
    shape: tuple[int, ...]
    num_slices: int = 1

    @property
    def is_tpu(self) -> bool:
        return self.chip.dims > 0

    @property
    def num_chips(self) -> int:
        return math.prod(self.shape) * self.num_slices

    @property
    def num_groups(self) -> int:
        """Groups of chips that the slow network joins: slices, or nodes of GPUs."""
        return self.num_slices if self.is_tpu else -(-self.num_chips // self.chip.group)

    @property
    def slice_name(self) -> str:
        """Of one slice, as libtpu spells it."""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    def __str__(self) -> str:
        return self.slice_name if self.num_slices == 1 else f"{self.num_slices}*{self.slice_name}"

    def links(self, sizes: Mapping[str, int]) -> dict[str, float]:
        """Bytes per second that a chip sends along each mesh axis inside a slice or node.

        The last axis, whose messages cannot wait, takes its dims of the torus first: whole ones if
        any multiply to its size, as ``jax.experimental.mesh_utils`` does it, else parts of the
        longest. A whole dim that closes into a ring gives it two links, any other one.
        """
        if not self.is_tpu:
            return dict.fromkeys(sizes, self.chip.link_bandwidth)
        free = sorted((size for size in self.shape if size > 1), reverse=True)
        found: dict[str, float] = {}
        for axis, size in reversed(list(sizes.items())):
            whole = _whole_dims(free, size)
            num_links = sum(2 if self._closes(dim) else 1 for dim in whole)
            for dim in whole:
                free.remove(dim)
            for place, dim in enumerate(() if whole else tuple(free)):
                part = math.gcd(size, dim)
                size, free[place] = size // part, dim // part
                closes = part == dim and self._closes(dim)
                num_links += 0 if part == 1 else 2 if closes else 1
            free = sorted((dim for dim in free if dim > 1), reverse=True)
            found[axis] = max(num_links, 1) * self.chip.link_bandwidth
        return found

    def _closes(self, dim: int) -> bool:
        return self.chip.wraps is not None and dim % self.chip.wraps == 0


def _whole_dims(free: list[int], size: int) -> tuple[int, ...]:
    for count in range(len(free), 0, -1):
        for dims in itertools.combinations(free, count):
            if math.prod(dims) == size:
                return dims
    return ()


def parse_topology(text: str) -> Topology:
    """``v5e:16x16``, ``v5p:8x8x16``, ``2*v5e:16x16``, ``h100:64``.

    Raises:
      ValueError: a chip that is not in the table, or a shape that it does not come in.
    """
    match = re.fullmatch(r"(?:(\d+)\*)?(\w+):(\d+(?:x\d+)*)", text.strip().lower())
    if match is None:
        raise ValueError(
            f"topology: expected CHIP:SHAPE such as v5e:16x16, 2*v5e:16x16 for two slices, or "
            f"h100:64; got {text!r}. Chips: {', '.join(CHIPS)}"
        )
    if match[2] not in CHIPS:
        raise ValueError(f"topology {text!r}: unknown chip {match[2]!r}; one of {', '.join(CHIPS)}")
    chip = CHIPS[match[2]]
    slices, shape = int(match[1] or 1), tuple(map(int, match[3].split("x")))
    topology = Topology(chip, shape, slices)
    if min(*shape, slices) < 1:
        raise ValueError(f"topology {text!r}: expected sizes of at least 1")
    if chip.dims == 0 and (len(shape) > 1 or slices > 1):
        raise ValueError(f"topology {text!r}: of GPUs give the number alone: {chip.name}:64")
    if chip.dims == 0 and shape[0] > chip.group and shape[0] % chip.group:
        raise ValueError(
            f"topology {text!r}: expected whole nodes of {chip.group}, got {shape[0]} GPUs; "
            f"{shape[0] // chip.group * chip.group} or {-(-shape[0] // chip.group) * chip.group}"
        )
    if chip.dims and len(shape) != chip.dims:
        example = {2: "16x16", 3: "4x4x4"}[chip.dims]
        raise ValueError(
            f"topology {text!r}: {chip.name} has {chip.dims} dims of links, as in "
            f"{chip.name}:{example}; got {len(shape)}"
        )
    if chip.dims and math.prod(shape) > chip.group:
        raise ValueError(
            f"topology {text!r}: a slice of {chip.name} has at most {chip.group} chips, got "
            f"{math.prod(shape)}; take several slices: 2*{chip.name}:…"
        )
    return topology
