"""Flax's Linen guide to scaling up: a scanned stack of two products with logical axis names."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

from jdml.sharding import Rules
from tests.sharding.published.example import Example

BATCH_NAMES, LAYERS, DEPTH = ("batch", "embed"), 4, 1024


class LogicalDotReluDot(nn.Module):
    depth: int

    @nn.compact
    def __call__(self, x):
        xavier = nn.initializers.xavier_normal()
        w1 = self.param(
            "W1",
            nn.with_logical_partitioning(xavier, ("embed", "hidden")),
            (x.shape[-1], self.depth),
        )
        y = jax.nn.relu(jnp.dot(x, w1))
        y = nn.with_logical_constraint(y, ("batch", "hidden"))
        w2 = self.param(
            "W2",
            nn.with_logical_partitioning(xavier, ("hidden", "embed")),
            (self.depth, x.shape[-1]),
        )
        return nn.with_logical_constraint(jnp.dot(y, w2), BATCH_NAMES), None


class LogicalMLP(nn.Module):
    num_layers: int
    depth: int

    @nn.compact
    def __call__(self, x):
        stack = nn.scan(
            LogicalDotReluDot,
            length=self.num_layers,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            metadata_params={nn.PARTITION_NAME: "layer"},
        )
        return stack(self.depth)(x)[0]


MODEL = LogicalMLP(LAYERS, DEPTH)


def loss(params, batch, key):
    # The guide's stand-in for a loss sums the outputs; the mean divides it by a constant.
    return MODEL.apply({"params": params}, batch["x"]).mean()


EXAMPLE = Example(
    make=lambda key: MODEL.init(key, jnp.ones((8, DEPTH)))["params"],
    loss=loss,
    tx=optax.adam(0.001),
    samples=lambda rng, number: {"x": rng.standard_normal((number, DEPTH), "float32")},
    rules=Rules(embed="fsdp", hidden="model", layer=None),
    num_params=LAYERS * 2 * DEPTH**2,
    layout={
        "ScanLogicalDotReluDot_0/W1": P(None, "fsdp", "model"),
        "ScanLogicalDotReluDot_0/W2": P(None, "model", "fsdp"),
    },
    second_axis="model",
    only_axis="fsdp",
)
