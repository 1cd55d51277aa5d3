"""What the workers compute: digits through one hidden layer."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.digits import CLASSES, read_digits
from jdml.communicate.pace import OptaxTask
from jdml.partition.samples import permutation

Params = dict[str, jax.Array | np.ndarray]


def loss_fn(params: Params, batch: Any, key: Any = None) -> Any:
    """Cross-entropy, nats per image, of images f32 ``[n, 64]``."""
    del key
    hidden = jax.nn.relu(batch["inputs"] @ params["in"] + params["in bias"])
    logits = hidden @ params["out"] + params["out bias"]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
    return jnp.mean(losses), {}


class Digits(NamedTuple):
    """One run's problem.

    Attributes:
      params: Where all begin.
      make_task: From an Optax chain to what the workers compute; compiled once for each.
      loss: Of all images, at some parameters.
    """

    params: Params
    make_task: Callable[[optax.GradientTransformation], OptaxTask]
    loss: Callable[[Params], float]


def digits(num_workers: int, batch: int, hidden: int, seed: int) -> Digits:
    """All images, each worker's drawn from the whole: no worker's data are its alone.

    Args:
      num_workers: How many draw.
      batch: Images of a worker's step.
      hidden: Units.
      seed: Of the initial weights and the draws.
    """
    images, labels = read_digits()
    inputs = images.reshape(len(images), -1).astype(np.float32) / 16
    each = len(inputs) // batch

    def batches(worker: int, index: int) -> Any:
        # Every worker goes through all images, in an order of its own.
        epoch, place = divmod(index, each)
        key = (seed * num_workers + worker, epoch)
        if key not in orders:
            orders[key] = permutation(len(inputs), *key)
        rows = orders[key][place * batch : (place + 1) * batch]
        return {"inputs": inputs[rows], "targets": labels[rows]}

    orders: dict[tuple[int, int], np.ndarray] = {}
    draws = np.random.default_rng(seed)
    sizes = {"in": (inputs.shape[1], hidden), "out": (hidden, CLASSES)}
    params: Params = {}
    for name, (n, m) in sizes.items():
        params[name] = (draws.standard_normal((n, m)) * np.sqrt(2 / n)).astype(np.float32)
        params[f"{name} bias"] = np.zeros(m, np.float32)
    everything = {"inputs": jnp.asarray(inputs), "targets": jnp.asarray(labels)}
    whole = jax.jit(lambda p: loss_fn(p, everything)[0])
    return Digits(
        params,
        functools.cache(lambda tx: OptaxTask(loss_fn, tx, batches, seed)),
        lambda p: float(whole(p)),
    )
