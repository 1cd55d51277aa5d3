"""The network that is divided: like hidden layers between a first and a last one."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

from experiments.digits import CLASSES

PyTree = Any
PIXELS = 64


def init_params(key: jax.Array, width: int, blocks: int) -> PyTree:
    """``first`` ``[64, width]``, ``blocks`` times ``[width, width]``, ``last`` ``[width, 10]``.

    Blocks are separate leaves ``block0``, …; deviations keep the size of rectified units.
    """

    def dense(number: int, inputs: int, outputs: int) -> PyTree:
        kernel = jax.random.normal(jax.random.fold_in(key, number), (inputs, outputs))
        return {"kernel": kernel * (2 / inputs) ** 0.5, "bias": jnp.zeros((outputs,))}

    return {
        "first": dense(0, PIXELS, width),
        **{f"block{i}": dense(1 + i, width, width) for i in range(blocks)},
        "last": dense(1 + blocks, width, CLASSES),
    }


def names_of(blocks: int) -> PyTree:
    """Names of the hidden layers' dims, for ``jdml.partition.subnets``."""
    layers = [None, *(f"hidden{i}" for i in range(blocks + 1)), None]
    parts = ["first", *(f"block{i}" for i in range(blocks)), "last"]
    return {
        part: {"kernel": (before, after), "bias": (after,)}
        for part, before, after in zip(parts, layers[:-1], layers[1:], strict=True)
    }


def tensor_specs(blocks: int) -> PyTree:
    """By tensor: columns of one layer and rows of the next over ``model``, in turns."""
    parts = ["first", *(f"block{i}" for i in range(blocks)), "last"]
    columns = {"kernel": P(None, "model"), "bias": P("model")}
    rows = {"kernel": P("model", None), "bias": P()}
    return {part: rows if i % 2 else columns for i, part in enumerate(parts)}


def first_part(params: PyTree, images: jax.Array) -> jax.Array:
    """Images uint8 ``[batch, 8, 8, 1]`` → ``[batch, width]``."""
    pixels = images.reshape(images.shape[0], PIXELS).astype(jnp.float32) / 16
    return jax.nn.relu(pixels @ params["kernel"] + params["bias"])


def block(params: PyTree, x: jax.Array) -> jax.Array:
    """``[batch, width]`` → the same."""
    return jax.nn.relu(x @ params["kernel"] + params["bias"])


def last_part(params: PyTree, x: jax.Array, targets: jax.Array) -> jax.Array:
    """Mean cross-entropy; ``targets``: f32 ``[batch, 10]``."""
    logits = x @ params["kernel"] + params["bias"]
    return jnp.mean(optax.softmax_cross_entropy(logits, targets))


def hidden(params: PyTree, scales: Mapping[str, jax.Array], images: jax.Array) -> jax.Array:
    """What the last layer multiplies; ``scales`` as ``jdml.aggregate.independent_subnets`` says."""
    x = first_part(params["first"], images) * scales.get("hidden0", 1.0)
    for i in range(len(params) - 2):
        x = block(params[f"block{i}"], x) * scales.get(f"hidden{i + 1}", 1.0)
    return x


def loss(params: PyTree, scales: Mapping[str, jax.Array], batch: PyTree) -> jax.Array:
    """Mean cross-entropy of a whole network, or of a subnet with its scales."""
    return last_part(params["last"], hidden(params, scales, batch["inputs"]), batch["targets"])
