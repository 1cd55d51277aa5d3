"""An Optax chain at the server."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import optax

from jdml.communicate.pace.messages import Arrival
from jdml.communicate.pace.payload import Leaves, frozen
from jdml.communicate.pace.rules.arithmetic import total, updates
from jdml.communicate.pace.rules.base import Apply, Book


@dataclasses.dataclass(frozen=True)
class Optimise(Apply):
    """See :func:`optimise`."""

    tx: optax.GradientTransformation

    def init(self, leaves: Leaves, book: Book) -> Any:
        return jax.tree.map(np.asarray, self.tx.init(leaves))

    def __call__(
        self, leaves: Leaves, state: Any, batch: Sequence[Arrival], book: Book
    ) -> tuple[Leaves, Any]:
        mean = tuple(np.asarray(g / len(batch)) for g in total(updates(batch)))
        new, state = self._step(leaves, state, mean)
        return tuple(map(frozen, new)), jax.tree.map(np.asarray, state)

    @functools.cached_property
    def _step(self) -> Any:
        def step(leaves: Leaves, state: Any, gradients: Leaves) -> tuple[Any, Any]:
            moves, state = self.tx.update(gradients, state, leaves)
            return optax.apply_updates(leaves, moves), state

        return jax.jit(step)


def optimise(tx: optax.GradientTransformation) -> Optimise:
    """A step of ``tx`` with the mean of the gradients that make this version.

    Workers push gradients, and the server keeps the optimiser's state: a parameter server as in
    Dean et al. 2012 (there with Adagrad). In f32: JAX computes it, on the default device.

    Args:
      tx: Any Optax chain that needs the gradients and the parameters only.
    """
    if not isinstance(tx, optax.GradientTransformation):
        raise ValueError(f"optimise({tx!r}): expected an optax.GradientTransformation.")
    return Optimise(tx)
