"""Models that know nothing of this library, sharded by rules alone, train as on one device.

Four documented examples at their published sizes: the NNX CNN of Flax's MNIST tutorial, the Linen
VAE of Flax's examples, the Linen NanoLM of Optax's gallery (two of its six layers: each is the
same, and costs a second to compile), and the annotated NNX stack of Flax's guide to scaling up.
"""

import math
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from jdml.sharding import (
    Rules,
    check,
    describe,
    infer_fsdp,
    init,
    make_mesh,
    optimizer_specs,
    shard,
    shardings,
    specs,
)
from jdml.sharding.paths import leaves_with_paths

MESHES = {"1": (1, 1, 1), "2x2": (2, 1, 2), "2x2x2": (2, 2, 2), "8": (1, 8, 1)}
NUM_STEPS = 3


def mesh_of(name):
    sizes = MESHES[name]
    axes = dict(zip(("data", "fsdp", "model"), sizes, strict=True))
    return make_mesh(axes, devices=jax.devices()[: math.prod(sizes)])


# --- the models ------------------------------------------------------------------------------


class CNN(nnx.Module):
    def __init__(self, rngs):
        self.conv1 = nnx.Conv(1, 32, kernel_size=(3, 3), rngs=rngs)
        self.conv2 = nnx.Conv(32, 64, kernel_size=(3, 3), rngs=rngs)
        self.avg_pool = partial(nnx.avg_pool, window_shape=(2, 2), strides=(2, 2))
        self.linear1 = nnx.Linear(3136, 256, rngs=rngs)
        self.linear2 = nnx.Linear(256, 10, rngs=rngs)

    def __call__(self, x):
        x = self.avg_pool(nnx.relu(self.conv1(x)))
        x = self.avg_pool(nnx.relu(self.conv2(x)))
        x = nnx.relu(self.linear1(x.reshape(x.shape[0], -1)))
        return self.linear2(x)


class Encoder(nn.Module):
    latents: int

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(500, name="fc1")(x))
        return (
            nn.Dense(self.latents, name="fc2_mean")(x),
            nn.Dense(self.latents, name="fc2_logvar")(x),
        )


class Decoder(nn.Module):
    @nn.compact
    def __call__(self, z):
        return nn.Dense(784, name="fc2")(nn.relu(nn.Dense(500, name="fc1")(z)))


class VAE(nn.Module):
    latents: int = 20

    def setup(self):
        self.encoder = Encoder(self.latents)
        self.decoder = Decoder()

    def __call__(self, x, key):
        mean, logvar = self.encoder(x)
        z = mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, logvar.shape)
        return self.decoder(z), mean, logvar


class NanoLM(nn.Module):
    vocab_size: int = 65
    num_layers: int = 6
    num_heads: int = 8
    head_size: int = 32
    dropout_rate: float = 0.2
    embed_size: int = 256
    block_size: int = 64

    @nn.compact
    def __call__(self, x, training):
        length = x.shape[1]
        positions = nn.Embed(self.block_size, self.embed_size)(jnp.arange(length))
        x = nn.Embed(self.vocab_size, self.embed_size)(x) + positions
        for _ in range(self.num_layers):
            x_norm = nn.LayerNorm()(x)
            x = x + nn.MultiHeadDotProductAttention(
                num_heads=self.num_heads,
                qkv_features=self.head_size,
                out_features=self.head_size * self.num_heads,
                dropout_rate=self.dropout_rate,
            )(x_norm, x_norm, mask=jnp.tril(jnp.ones((length, length))), deterministic=not training)
            x = x + nn.Sequential(
                [
                    nn.Dense(4 * self.embed_size),
                    nn.relu,
                    nn.Dropout(self.dropout_rate, deterministic=not training),
                    nn.Dense(self.embed_size),
                ]
            )(nn.LayerNorm()(x))
        return nn.Dense(self.vocab_size)(nn.LayerNorm()(x))


class DotReluDot(nnx.Module):
    def __init__(self, depth, rngs):
        init_fn = nnx.initializers.lecun_normal()
        self.dot1 = nnx.Linear(
            depth,
            depth,
            kernel_init=nnx.with_partitioning(init_fn, (None, "model")),
            use_bias=False,
            rngs=rngs,
        )
        self.w2 = nnx.Param(init_fn(rngs.params(), (depth, depth)), out_sharding=("model", None))

    def __call__(self, x):
        y = jax.nn.relu(self.dot1(x))
        y = jax.lax.with_sharding_constraint(y, P("data", "model"))
        return jnp.dot(y, self.w2[...])


class MultiDotReluDot(nnx.Module):
    def __init__(self, depth, num_layers, rngs):
        @nnx.vmap(transform_metadata={nnx.PARTITION_NAME: None})
        def create_sublayers(rngs):
            return DotReluDot(depth, rngs)

        self.layers = create_sublayers(rngs.split(num_layers))

    def __call__(self, x):
        def scan_over_layers(x, layer):
            return layer(x), None

        return jax.lax.scan(scan_over_layers, x, self.layers)[0]


# --- how each is made, divided, and trained --------------------------------------------------


class Example(NamedTuple):
    """``make`` returns what init shards; ``loss`` takes its parameters, a batch, and a key."""

    make: object
    rules: Rules
    divided: tuple[str, ...]  # leaves that must really be divided on 2x2x2
    batch: dict
    loss: object
    tx: optax.GradientTransformation


def random_batch(**shapes):
    rng = np.random.default_rng(0)
    return {
        name: rng.integers(0, shape[0], shape[1]).astype(np.int32)
        if isinstance(shape[1], tuple)
        else rng.random(shape, np.float32)
        for name, shape in shapes.items()
    }


def cnn_loss(model, batch, key):
    logits = model(batch["image"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()


def vae_loss(params, batch, key):
    recon, mean, logvar = VAE().apply({"params": params}, batch["image"], key)
    kl = -0.5 * jnp.sum(1 + logvar - mean**2 - jnp.exp(logvar), axis=-1)
    bce = optax.sigmoid_binary_cross_entropy(recon, batch["image"]).sum(-1)
    return (bce + kl).mean()


NANO = NanoLM(num_layers=2)


def lm_loss(params, batch, key):
    tokens = batch["tokens"]
    logits = NANO.apply({"params": params}, tokens, training=True, rngs={"dropout": key})
    return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:]).mean()


def dots_loss(model, batch, key):
    return jnp.mean((model(batch["x"]) - batch["y"]) ** 2)


EXAMPLES = {
    "nnx cnn": Example(
        lambda key: CNN(nnx.Rngs(key)),
        Rules(inputs="fsdp", features="model").for_paths(
            {
                "(conv.|linear1)/bias": ("features",),
                "conv./kernel": (None, None, None, "features"),
                "linear1/kernel": ("inputs", "features"),
                "linear2/kernel": ("features", None),
                ".*": None,
            }
        ),
        ("conv2/kernel", "linear1/kernel", "linear1/bias", "linear2/kernel"),
        random_batch(image=(16, 28, 28, 1), label=(10, (16,))),
        cnn_loss,
        optax.adamw(5e-3, 0.9),
    ),
    "linen vae": Example(
        lambda key: VAE().init(key, jnp.ones((1, 784)), key)["params"],
        infer_fsdp(min_size=2**12).replace(on_indivisible="replicate"),
        ("encoder/fc1/kernel", "encoder/fc2_mean/kernel", "decoder/fc2/kernel"),
        random_batch(image=(16, 784)),
        vae_loss,
        optax.adam(1e-3),
    ),
    "linen nanolm": Example(
        lambda key: NANO.init(key, jnp.ones((1, 64), jnp.int32), training=False)["params"],
        Rules(embed="fsdp", heads="model", mlp="model").for_paths(
            {
                "Embed_./embedding": (None, "embed"),
                "(query|key|value)/kernel": ("embed", "heads", None),
                "(query|key|value)/bias": ("heads", None),
                "out/kernel": ("heads", None, "embed"),
                "layers_0/kernel": ("embed", "mlp"),
                "layers_0/bias": ("mlp",),
                "layers_3/kernel": ("mlp", "embed"),
                "Dense_0/kernel": ("embed", None),
                ".*": None,
            }
        ),
        ("Embed_0/embedding", "MultiHeadDotProductAttention_1/out/kernel", "Dense_0/kernel"),
        random_batch(tokens=(65, (8, 64))),
        lm_loss,
        optax.adafactor(1e-3),
    ),
    "nnx annotated stack": Example(
        lambda key: MultiDotReluDot(1024, 4, nnx.Rngs(key)),
        Rules(),
        ("layers/dot1/kernel", "layers/w2"),
        random_batch(x=(8, 1024), y=(8, 1024)),
        dots_loss,
        optax.sgd(0.1, momentum=0.9),
    ),
}


def train(example, mesh):
    """Losses of a few steps, and the parameters after them with their specs."""
    model = init(example.make, mesh, example.rules, jax.random.key(0))
    if isinstance(model, nnx.Module):
        graphdef, params = nnx.split(model)

        def loss_fn(params, *args):
            return example.loss(nnx.merge(graphdef, params, copy=True), *args)
    else:
        params, loss_fn = model, example.loss
    param_specs = specs(params, mesh, example.rules)

    def state_specs(opt_state):
        return optimizer_specs(opt_state, params, param_specs)

    opt_state = init(example.tx.init, mesh, state_specs, params)
    out = (param_specs, state_specs(opt_state), P())

    @partial(jax.jit, out_shardings=shardings(out, mesh), donate_argnums=(0, 1))
    def step(params, opt_state, batch, key):
        loss, grads = jax.value_and_grad(loss_fn)(params, batch, key)
        updates, opt_state = example.tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    losses = []
    with jax.set_mesh(mesh), nnx.use_eager_sharding(False):
        batch = shard(example.batch, mesh, P(("data", "fsdp")))
        for number in range(NUM_STEPS):
            key = jax.random.fold_in(jax.random.key(1), number)
            params, opt_state, loss = step(params, opt_state, batch, key)
            losses.append(float(loss))
    check((params, opt_state), out[:2], mesh)
    return losses, params


@pytest.fixture(scope="module")
def alone():
    """Losses on one device, once for each example."""
    found = {}

    def losses(name):
        if name not in found:
            found[name] = train(EXAMPLES[name], mesh_of("1"))[0]
        return found[name]

    return losses


@pytest.mark.parametrize("mesh_name", ["2x2", "2x2x2", "8"])
@pytest.mark.parametrize("name", EXAMPLES)
def test_trains_as_on_one_device(name, mesh_name, alone):
    losses, params = train(EXAMPLES[name], mesh_of(mesh_name))
    assert np.isfinite(losses).all()
    assert losses[-1] != losses[0]
    # Sums in another order, then steps of an adaptive optimiser, which divides by small moments.
    np.testing.assert_allclose(losses, alone(name), rtol=2e-4)
    if mesh_name == "2x2x2":
        table = {row.path: row for row in describe(params).rows}
        for path in EXAMPLES[name].divided:
            assert not table[path].replicated, path


def test_every_leaf_of_nanolm_is_named_by_a_pattern():
    shapes = jax.eval_shape(EXAMPLES["linen nanolm"].make, jax.random.key(0))
    found = dict(leaves_with_paths(specs(shapes, mesh_of("2x2x2"), EXAMPLES["linen nanolm"].rules)))
    attention = "MultiHeadDotProductAttention_0"
    assert found[f"{attention}/query/kernel"] == P("fsdp", "model", None)
    assert found[f"{attention}/out/kernel"] == P("model", None, "fsdp")
    assert found[f"{attention}/out/bias"] == P()
    assert found["Dense_0/kernel"] == P("fsdp", None)
