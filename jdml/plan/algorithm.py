"""What the workers tell each other, by name: the Optax chain of it, and what it keeps and sends."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import optax

from jdml.aggregate import average_params, mean_gradients
from jdml.communicate import error_feedback
from jdml.communicate.codecs import Codec, int4, int8, one_bit
from jdml.communicate.cost import Link, predict

CODECS: dict[str, Any] = {"int8": int8, "int4": int4, "one_bit": one_bit}
NAMES = ("exact", *CODECS, "local_sgd:EVERY", "diloco:EVERY")
_NO_LINK = Link(0.0, 1.0)  # bytes alone are asked for


@dataclass(frozen=True)
class Algorithm:
    """One line of a run's Optax chain.

    Attributes:
      name: As it was written.
      every: Steps between two exchanges.
      codec: Of the exchange; None for the exact mean.
      averages: Exchanges models and not gradients.
      outer: The averages' changes go through an outer optimiser (DiLoCo).
    """

    name: str
    every: int = 1
    codec: Codec | None = None
    averages: bool = False
    outer: bool = False

    @property
    def kept_copies(self) -> int:
        """Copies of a worker's parameters, f32, that the exchange keeps from step to step."""
        feedback = self.codec is not None
        return int(feedback) + 2 * self.outer

    def chain(self, inner: optax.GradientTransformation) -> optax.GradientTransformation:
        """With the optimiser of each worker."""
        if not self.averages:
            content = None if self.codec is None else error_feedback(self.codec)
            return optax.chain(mean_gradients("data", content), inner)
        outer = optax.sgd(0.7, momentum=0.9, nesterov=True) if self.outer else None
        return optax.chain(inner, average_params("data", every=self.every, outer=outer))

    def sent_bytes(self, num_workers: int, shards: Sequence[int]) -> float:
        """What a chip sends per step on average.

        Args:
          num_workers: On the data axis.
          shards: Elements of each leaf that the chip holds.
        """
        if num_workers == 1:
            return 0.0
        cost = predict("two_phase", num_workers, sum(shards), self.codec, _NO_LINK)
        return cost.sent_bytes / self.every


def parse_algorithm(text: str) -> Algorithm:
    """``exact``, ``int8``, ``int4``, ``one_bit`` (with error feedback), ``local_sgd:16``,
    ``diloco:500``.

    Raises:
      ValueError: none of them.
    """
    match = re.fullmatch(r"(\w+?)(?::(\d+))?", text)
    name, every = (match[1], match[2]) if match else (text, None)
    if name in ("local_sgd", "diloco") and every and int(every) > 0:
        return Algorithm(text, int(every), averages=True, outer=name == "diloco")
    if name == "exact" and every is None:
        return Algorithm(text)
    if name in CODECS and every is None:
        return Algorithm(text, codec=CODECS[name]())
    raise ValueError(f"algorithm: expected one of {', '.join(NAMES)}; got {text!r}")
