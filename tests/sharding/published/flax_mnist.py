"""Flax's MNIST tutorial (NNX): two convolutions with batch norm and dropout, two dense layers."""

from functools import partial

import jax
import optax
from flax import nnx
from jax.sharding import PartitionSpec as P

from jdml.sharding import Rules
from tests.sharding.published.example import Example


class CNN(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        self.conv1 = nnx.Conv(1, 32, kernel_size=(3, 3), rngs=rngs)
        self.batch_norm1 = nnx.BatchNorm(32, rngs=rngs)
        self.dropout1 = nnx.Dropout(rate=0.025)
        self.conv2 = nnx.Conv(32, 64, kernel_size=(3, 3), rngs=rngs)
        self.batch_norm2 = nnx.BatchNorm(64, rngs=rngs)
        self.avg_pool = partial(nnx.avg_pool, window_shape=(2, 2), strides=(2, 2))
        self.linear1 = nnx.Linear(3136, 256, rngs=rngs)
        self.dropout2 = nnx.Dropout(rate=0.025)
        self.linear2 = nnx.Linear(256, 10, rngs=rngs)

    def __call__(self, x, rngs=None):
        x = self.batch_norm1(self.dropout1(self.conv1(x), rngs=rngs))
        x = self.avg_pool(nnx.relu(x))
        x = self.avg_pool(nnx.relu(self.batch_norm2(self.conv2(x))))
        x = x.reshape(x.shape[0], -1)
        x = nnx.relu(self.dropout2(self.linear1(x), rngs=rngs))
        return self.linear2(x)


def loss(model, batch, key):
    # A seed that travels with the samples: whoever computes these samples drops the same units.
    rngs = nnx.Rngs(dropout=jax.random.key(batch["seed"][0]))
    logits = model(batch["image"], rngs)
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()


def samples(rng, number):
    return {
        "image": rng.random((number, 28, 28, 1), "float32"),
        "label": rng.integers(0, 10, number, "int32"),
        "seed": rng.integers(0, 2**32, number, "uint32"),
    }


EXAMPLE = Example(
    make=lambda key: CNN(rngs=nnx.Rngs(key)),
    loss=loss,
    tx=optax.adamw(0.005, 0.9),
    samples=samples,
    rules=Rules(inputs="fsdp", features="model").for_paths(
        {
            "conv2/kernel": (None, None, "inputs", "features"),
            "linear1/kernel": ("inputs", "features"),
            "linear1/bias": ("features",),
            "linear2/kernel": ("features", None),
            ".*": None,
        }
    ),
    num_params=824_650,
    layout={
        "conv1/kernel": P(),
        "conv2/kernel": P(None, None, "fsdp", "model"),
        "linear1/kernel": P("fsdp", "model"),
        "linear1/bias": P("model"),
        "linear2/kernel": P("model", None),
    },
    second_axis="model",
    only_axis="data",
    per_worker=True,
)
