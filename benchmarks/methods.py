"""What the benchmarks compare: a name for each codec over each topology."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jdml.communicate import Cost, ErrorFeedback, Link, codecs, error_feedback, predict
from jdml.communicate.codecs import PowerSgd
from jdml.communicate.collectives.all_reduce import TOPOLOGIES, Content

NUM_MATRICES = 4
"""Each worker holds the values of so many square matrices."""

# What one_bit and its like lose in a round is most of it: they are used with their error fed back.
_CODECS: dict[str, Callable[[], Content]] = {
    "exact": lambda: None,
    "identity": codecs.identity,
    "bf16": codecs.bf16,
    "int8": lambda: codecs.int8(256),
    "fp8": codecs.fp8,
    "int4": codecs.int4,
    "int4 + EF": lambda: error_feedback(codecs.int4()),
    "e3m0": codecs.e3m0,
    "e3m0_row": codecs.e3m0_row,
    "qsgd": lambda: codecs.qsgd(7),
    "int2": codecs.int2,
    "terngrad": codecs.terngrad,
    "one_bit": codecs.one_bit,
    "one_bit + EF": lambda: error_feedback(codecs.one_bit()),
    "random 1 %": lambda: codecs.random_k(0.01),
    "threshold 1 %": lambda: codecs.threshold(2.5, capacity=0.01),
    "top 1 %": lambda: codecs.top_k(0.01),
    "top 1 % + int8": lambda: codecs.top_k(0.01, values=codecs.int8(256)),
    "top 1 % + int8 + EF": lambda: error_feedback(codecs.top_k(0.01, values=codecs.int8(256))),
    "power_sgd 4": lambda: codecs.power_sgd(4),
}


PATTERNS = (*TOPOLOGIES, "reduce_scatter", "gather", "all_to_all", "broadcast")
"""The topologies of ``all_reduce_mean``, and the other collectives (``gather`` is ``all_gather``,
which as a topology is a mean)."""


@dataclass(frozen=True)
class Method:
    """A codec over a pattern of exchange.

    Attributes:
      name: ``"int8"``, or ``"int8 ring"`` where the pattern is not ``two_phase``.
      codec: Key of the codec table.
      pattern: One of ``PATTERNS``.
    """

    name: str
    codec: str
    pattern: str

    def content(self) -> Content:
        """What goes in the place of ``codec=``."""
        return _CODECS[self.codec]()


def method(name: str) -> Method:
    """The method of a name: a codec, then perhaps a pattern, ``two_phase`` if none.

    Raises:
      ValueError: no such codec or pattern.
    """
    codec, pattern = name, "two_phase"
    if name not in _CODECS:
        codec, _, pattern = name.rpartition(" ")
    if codec not in _CODECS or pattern not in PATTERNS:
        raise ValueError(
            f"method {name!r}: expected one of {list(_CODECS)}, perhaps followed by one of "
            f"{list(PATTERNS)}."
        )
    return Method(name, codec, pattern)


def sending_codecs() -> dict[str, Content]:
    """One codec of each kind of payload: error feedback sends nothing more than its codec."""
    made = {name: make() for name, make in _CODECS.items()}
    return {n: codec for n, codec in made.items() if not isinstance(codec, ErrorFeedback)}


def cost(
    this: Method,
    side: int,
    num_workers: int,
    link: Link,
    codec_rate: float | None = None,
) -> Cost:
    """What the library claims that a method costs, for ``NUM_MATRICES`` matrices side × side.

    ``hierarchical`` has two groups of workers. ``codec_rate``: see ``jdml.communicate.predict``;
    PowerSGD's products are not in it.
    """
    content, size = this.content(), NUM_MATRICES * side * side
    if isinstance(content, PowerSgd):
        # Its docstring: two all-reduces, which send 2 (K-1)/K of what they hold.
        matrices = [jax.ShapeDtypeStruct((side, side), jnp.float32)] * NUM_MATRICES
        sent = 4 * content.num_elements(matrices) * 2 * (num_workers - 1) // num_workers
        hops = 2 * 2 * (num_workers - 1)
        return Cost(hops, (sent,), hops * link.latency + sent / link.bandwidth, 0.0)
    pattern = "all_gather" if this.pattern == "gather" else this.pattern
    workers = (2, num_workers // 2) if pattern == "hierarchical" else num_workers
    return predict(pattern, workers, size, content, link, codec_rate)
