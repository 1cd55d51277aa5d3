"""DC-ASGD: a late gradient is corrected for how far the model has moved since."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from jdml.communicate.pace.messages import Arrival
from jdml.communicate.pace.payload import Leaves
from jdml.communicate.pace.rules.arithmetic import check_rate, moved
from jdml.communicate.pace.rules.base import Apply, Book


@dataclasses.dataclass(frozen=True)
class DelayCompensated(Apply):
    """See :func:`dc_asgd` and :func:`dc_asgd_adaptive`."""

    learning_rate: float
    strength: float
    decay: float | None = None

    needs_base: ClassVar[bool] = True

    def init(self, leaves: Leaves, book: Book) -> Any:
        return () if self.decay is None else tuple(np.zeros(x.shape, _wide(x)) for x in leaves)

    def __call__(
        self, leaves: Leaves, state: Any, batch: Sequence[Arrival], book: Book
    ) -> tuple[Leaves, Any]:
        for arrival in batch:
            assert arrival.base is not None
            gradients = [g.astype(_wide(w)) for g, w in zip(arrival.leaves, leaves, strict=True)]
            strengths: list[Any] = [self.strength] * len(leaves)
            if self.decay is not None:
                decay = self.decay
                state = tuple(
                    decay * ms + (1 - decay) * g * g for ms, g in zip(state, gradients, strict=True)
                )
                strengths = [self.strength / np.sqrt(ms + 1e-7) for ms in state]
            leaves = tuple(
                moved(w, np.asarray(g + s * g * g * (w - base)), -self.learning_rate)
                for w, g, s, base in zip(leaves, gradients, strengths, arrival.base, strict=True)
            )
        return leaves, state


def dc_asgd(learning_rate: float, strength: float = 0.04) -> DelayCompensated:
    """``w <- w - lr (g + λ g ⊙ g ⊙ (w - w_base))``, ``w_base`` the model that ``g`` was taken at.

    The first-order term of ``g(w)`` about ``w_base``, with the Hessian's diagonal estimated by
    ``λ g ⊙ g``. Workers push gradients. λ = 0 is asynchronous SGD.

    Args:
      learning_rate: Of the server's step, > 0.
      strength: λ >= 0; the default is what the paper's experiments are remembered to use.

    Kept at the server: per worker, the parameters that it last read.

    Reference: Zheng et al., "Asynchronous Stochastic Gradient Descent with Delay Compensation",
    2017, equation 10.
    """
    _check("dc_asgd", learning_rate, strength)
    return DelayCompensated(learning_rate, strength)


def dc_asgd_adaptive(
    learning_rate: float, strength: float = 2.0, decay: float = 0.95
) -> DelayCompensated:
    """:func:`dc_asgd` with ``λ = λ0 / sqrt(MS + 1e-7)``, ``MS <- m MS + (1 - m) g ⊙ g``.

    Args:
      learning_rate: Of the server's step, > 0.
      strength: λ0 >= 0.
      decay: m, in [0, 1).

    Kept at the server: per worker, the parameters that it last read; one more copy for MS.
    """
    _check("dc_asgd_adaptive", learning_rate, strength)
    if not 0 <= decay < 1:
        raise ValueError(f"dc_asgd_adaptive(decay={decay!r}): expected 0 <= m < 1.")
    return DelayCompensated(learning_rate, strength, decay)


def _check(name: str, learning_rate: float, strength: float) -> None:
    check_rate(f"{name}: learning_rate", learning_rate)
    if not (math.isfinite(strength) and strength >= 0):
        raise ValueError(f"{name}(strength={strength!r}): expected a finite λ >= 0.")


def _wide(leaf: np.ndarray) -> np.dtype:
    return leaf.dtype if leaf.dtype.itemsize >= 4 else np.dtype(np.float32)
