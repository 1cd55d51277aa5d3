"""The methods that are compared, with the learning rates that ``search.py`` found."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import jax
import optax

from jdml.aggregate import average_params, mean_gradients, streaming_diloco
from jdml.communicate import error_feedback
from jdml.communicate.codecs import e3m0_row

if TYPE_CHECKING:
    from experiments.local_sgd.config import Config


@dataclasses.dataclass(frozen=True)
class Method:
    """What is done with the gradients and the models.

    Attributes:
      peak: Learning rate of AdamW after its warm-up.
      every: Steps H of a round; ``None`` for the exact mean gradient in every step.
      outer: Learning rate and momentum of the outer Nesterov SGD; ``None`` for a plain average.
      num_fragments: Of streaming DiLoCo; 0 exchanges the whole model at once.
      compressed: Whether e3m0 floats are exchanged, rather than f32.
      feedback: Whether what they lose is added to the next exchange.
    """

    peak: float
    every: int | None = None
    outer: tuple[float, float] | None = None
    num_fragments: int = 0
    compressed: bool = False
    feedback: bool = False

    @property
    def codec(self):
        """4 bits an element, and nothing else."""
        if not self.compressed:
            return None
        return error_feedback(e3m0_row()) if self.feedback else e3m0_row()


SYNCHRONOUS = "synchronous"
DILOCO = "DiLoCo H=50"
STREAMING = "streaming DiLoCo H=50"
E3M0 = ", e3m0"
FEEDBACK = ", error feedback"
FRAGMENTS, DELAY, MIXING = 4, 5, 0.5

METHODS = {
    SYNCHRONOUS: Method(24e-3),
    "H=1": Method(16e-3, 1),
    "H=4": Method(16e-3, 4),
    "H=16": Method(16e-3, 16),
    "H=64": Method(16e-3, 64),
    DILOCO: Method(12e-3, 50, (0.7, 0.8)),
    DILOCO + E3M0: Method(12e-3, 50, (0.7, 0.8), compressed=True),
    DILOCO + E3M0 + FEEDBACK: Method(12e-3, 50, (0.7, 0.8), compressed=True, feedback=True),
    STREAMING: Method(12e-3, 50, (0.7, 0.9), FRAGMENTS),
    STREAMING + E3M0: Method(12e-3, 50, (0.7, 0.9), FRAGMENTS, compressed=True),
}


def chain(config: Config, method: Method) -> optax.GradientTransformation:
    """Aggregate, optimise, mix: what differs is at either end."""
    peak, steps = method.peak, config.steps
    local = [
        optax.clip_by_global_norm(config.clip),
        optax.adamw(
            optax.warmup_cosine_decay_schedule(0.0, peak, config.warmup_steps, steps),
            b2=0.95,
            weight_decay=config.weight_decay,
            mask=lambda params: jax.tree.map(lambda x: x.ndim > 1, params),
        ),
    ]
    if method.every is None:
        return optax.chain(mean_gradients("data"), *local)
    outer = None
    if method.outer is not None:
        rate, momentum = method.outer
        outer = optax.sgd(rate, momentum=momentum, nesterov=True)
    if not method.num_fragments:
        mix = average_params("data", method.every, outer, method.codec)
    else:
        mix = streaming_diloco(
            "data",
            method.every,
            method.num_fragments,
            outer,
            delay=DELAY,
            mixing=MIXING,
            codec=method.codec,
        )
    return optax.chain(*local, mix)
