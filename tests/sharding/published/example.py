"""What a test needs of a published example besides its model: rules, loss, optimiser, samples."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import optax
from jax.sharding import PartitionSpec as P

from jdml.sharding import Rules

BATCH = 16


class Example(NamedTuple):
    """One example of Flax's or Optax's documentation.

    Attributes:
      make: ``key -> `` an NNX module, or Linen parameters.
      loss: ``(module or parameters, batch, key) -> `` the mean over the batch's samples.
      tx: The example's own optimiser.
      samples: ``(rng, number) -> batch`` of the example's input shapes.
      rules: All that is said about sharding.
      num_params: As published, or counted from the published shapes.
      layout: Some leaves, and their specs on a mesh of data, fsdp and model.
      second_axis: The axis beside data in the mesh of 2 × 2.
      only_axis: The axis of the mesh of 8.
      per_worker: The loss depends on which samples share a worker (batch statistics do).
    """

    make: Callable[[Any], Any]
    loss: Callable[[Any, Any, Any], Any]
    tx: optax.GradientTransformation
    samples: Callable[[np.random.Generator, int], dict[str, np.ndarray]]
    rules: Rules
    num_params: int
    layout: Mapping[str, P]
    second_axis: str
    only_axis: str
    per_worker: bool = False
