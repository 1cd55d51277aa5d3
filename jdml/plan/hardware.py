"""What a chip does in a second, and what it holds: published figures, with where they stand.

All of them are peaks. Gigabytes and gigabits are decimal, memory in bytes is what the compiler may
use where that is known (it keeps some for itself), else what the data sheet says.
"""

from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Chip:
    """A chip and what joins it to others.

    Attributes:
      name: As topologies spell it.
      flops: Multiply-adds of dense bfloat16 products count two; per second.
      memory: Bytes that a program may use.
      memory_bandwidth: Bytes per second between the chip and its memory.
      link_bandwidth: Bytes per second that one link of the fast network carries, each way. A GPU
        has one link, to the switch of its node.
      dims: Of the torus of a TPU's links; 0 where a switch joins the chips (GPUs).
      wraps: A dim of this many chips, or of a multiple, closes into a ring; None if none does.
      scratch: Bytes beside a TPU's cores in which the compiler keeps passing arrays.
      score_bytes: Of memory for each attention score of the layer that is being differentiated.
        Both as measured with libtpu 0.0.50. Where memory is plentiful, the compiler takes more: of
        v5p 16 and 20, for one and the same step on 1,024 and on 64 chips.
      slow_bandwidth: Bytes per second and chip on the network between slices or nodes, each way.
      group: Most chips that the fast network joins: of a node of GPUs, of a pod of TPUs.
      source: Where the figures stand.
    """

    name: str
    flops: float
    memory: int
    memory_bandwidth: float
    link_bandwidth: float
    dims: int
    wraps: int | None
    scratch: float
    score_bytes: float
    slow_bandwidth: float
    group: int
    source: str


_GOOGLE = "cloud.google.com/tpu/docs/"
_NVIDIA = "NVIDIA's data sheets of the GPU and of DGX systems"

_ALL = (
    Chip(
        "v5e",
        flops=197e12,
        memory=int(15.75 * 2**30),
        memory_bandwidth=819e9,
        link_bandwidth=50e9,  # 400 GB/s both ways over 4 links
        dims=2,
        wraps=16,
        scratch=94e6,
        score_bytes=11.5,
        slow_bandwidth=6.4e12 / 8 / 256,  # 6.4 Tbit/s for a pod of 256
        group=256,
        source=_GOOGLE + "v5e",
    ),
    Chip(
        "v5p",
        flops=459e12,
        memory=int(95.74 * 2**30),
        memory_bandwidth=2765e9,
        link_bandwidth=100e9,  # 1,200 GB/s both ways over 6 links
        dims=3,
        wraps=4,  # cubes of 4 × 4 × 4 are joined by switched optics
        scratch=70e6,
        score_bytes=18.0,
        slow_bandwidth=50e9 / 8,
        group=6144,
        source=_GOOGLE + "v5p",
    ),
    Chip(
        "v6e",
        flops=918e12,
        memory=int(31.25 * 2**30),
        memory_bandwidth=1600e9,
        link_bandwidth=100e9,  # 3,200 Gbit/s each way over 4 links
        dims=2,
        wraps=16,
        scratch=94e6,
        score_bytes=11.5,
        slow_bandwidth=25.6e12 / 8 / 256,
        group=256,
        source=_GOOGLE + "v6e",
    ),
    Chip("a100", 312e12, 80 * 10**9, 2039e9, 300e9, 0, None, 0.0, 12.0, 25e9, 8, _NVIDIA),
    Chip("h100", 989e12, 80 * 10**9, 3350e9, 450e9, 0, None, 0.0, 12.0, 50e9, 8, _NVIDIA),
    Chip("h200", 989e12, 141 * 10**9, 4800e9, 450e9, 0, None, 0.0, 12.0, 50e9, 8, _NVIDIA),
    Chip("b200", 2250e12, 180 * 10**9, 8000e9, 900e9, 0, None, 0.0, 12.0, 50e9, 8, _NVIDIA),
)
CHIPS = MappingProxyType({chip.name: chip for chip in _ALL})
"""By name: 80 GB A100, SXM H100 and H200, and B200, in nodes of eight with a network card each."""
