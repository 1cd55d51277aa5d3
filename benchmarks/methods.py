"""What the benchmarks compare: a name for each codec over each topology."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from jdml.communicate import codecs, error_feedback
from jdml.communicate.collectives.all_reduce import TOPOLOGIES, Content

# What one_bit and its like lose in a round is most of it: they are used with their error fed back.
_CODECS: dict[str, Callable[[], Content]] = {
    "exact": lambda: None,
    "bf16": lambda: codecs.bf16(),
    "int8": lambda: codecs.int8(256),
    "fp8": lambda: codecs.fp8(),
    "int4": lambda: codecs.int4(),
    "e3m0": lambda: codecs.e3m0(),
    "int2": lambda: codecs.int2(),
    "qsgd": lambda: codecs.qsgd(),
    "terngrad": lambda: codecs.terngrad(),
    "one_bit": lambda: codecs.one_bit(),
    "one_bit + EF": lambda: error_feedback(codecs.one_bit()),
    "top 1 % + int8": lambda: codecs.top_k(0.01, values=codecs.int8(256)),
    "power_sgd 4": lambda: codecs.power_sgd(4),
}


@dataclass(frozen=True)
class Method:
    """A codec over a topology.

    Attributes:
      name: ``"int8"``, or ``"int8 ring"`` where the topology is not the default.
      codec: Key of the codec table.
      topology: As ``all_reduce_mean`` takes it.
    """

    name: str
    codec: str
    topology: str

    def content(self) -> Content:
        """What goes in the place of ``codec=``."""
        return _CODECS[self.codec]()


def method(name: str) -> Method:
    """The method of a name: a codec, then perhaps a topology, ``two_phase`` if none.

    Raises:
      ValueError: no such codec or topology.
    """
    codec, topology = name, "two_phase"
    if name not in _CODECS:
        codec, _, topology = name.rpartition(" ")
    if codec not in _CODECS or topology not in TOPOLOGIES:
        raise ValueError(
            f"method {name!r}: expected one of {list(_CODECS)}, perhaps followed by one of "
            f"{list(TOPOLOGIES)}."
        )
    return Method(name, codec, topology)
