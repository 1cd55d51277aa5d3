"""The convolutional network: against a dense form, its names, and divided over a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from jdml.models import ConvNet, ConvNetConfig
from jdml.sharding import check, init, make_mesh, presets, specs

TINY = ConvNetConfig(height=5, width=6, channels=2, widths=(4, 8), hidden=12, num_classes=3)


def weights(config):
    return nnx.to_pure_dict(nnx.state(ConvNet(config, rngs=nnx.Rngs(0))))


def dense(params, images):
    """The same in NumPy, a pixel at a time."""

    def convolve(x, layer, stride):
        kernel, bias = np.asarray(layer["kernel"], np.float64), np.asarray(layer["bias"])
        height, width = x.shape[1:3]
        out = np.zeros((len(x), -(-height // stride), -(-width // stride), kernel.shape[-1]))
        # Same padding: as much before as after, the odd one after.
        total = [
            max((n - 1) * stride + 3 - m, 0)
            for n, m in zip(out.shape[1:3], x.shape[1:3], strict=True)
        ]
        x = np.pad(x, ((0, 0), *((t // 2, t - t // 2) for t in total), (0, 0)))
        for i in range(out.shape[1]):
            for j in range(out.shape[2]):
                window = x[:, i * stride : i * stride + 3, j * stride : j * stride + 3]
                out[:, i, j] = np.einsum("bhwc,hwco->bo", window, kernel) + bias
        return np.maximum(out, 0)

    x = np.asarray(images, np.float64)
    for i in range(len(params["convolutions"])):
        x = convolve(x, params["convolutions"][i], 1 if i == 0 else 2)
    hidden = np.einsum("bhwc,hwco->bo", x, params["hidden"]["kernel"]) + params["hidden"]["bias"]
    return np.maximum(hidden, 0) @ params["head"]["kernel"] + params["head"]["bias"]


@pytest.mark.parametrize("config", [TINY, ConvNetConfig(widths=(4, 4, 4), hidden=8)])
def test_equals_its_dense_form(config):
    model = ConvNet(config, rngs=nnx.Rngs(0))
    shape = (3, config.height, config.width, config.channels)
    images = jax.random.normal(jax.random.key(1), shape)
    params = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model)))
    np.testing.assert_allclose(model(images), dense(params, images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", [TINY, ConvNetConfig(), ConvNetConfig(widths=(3,))])
def test_the_number_of_parameters_is_known_beforehand(config):
    assert sum(x.size for x in jax.tree.leaves(weights(config))) == config.num_params
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(weights(config)))


def test_logits_begin_at_about_unit_size():
    images = jax.random.uniform(jax.random.key(0), (64, 8, 8, 1))
    logits = ConvNet(ConvNetConfig(), rngs=nnx.Rngs(0))(images)
    assert 0.05 < float(jnp.std(logits)) < 3


def test_presets_divide_it():
    """Every dim of channels takes an axis once; the same logits come out."""
    mesh = make_mesh({"data": 2, "fsdp": 2, "model": 2})
    rules = presets.fsdp_tensor()

    def make():
        return ConvNet(TINY, rngs=nnx.Rngs(0))

    model = init(make, mesh, rules)
    found = specs(model, mesh, rules)
    check(model, found, mesh)
    leaves = [tuple(s) for s in jax.tree.leaves(found, is_leaf=lambda x: isinstance(x, P))]
    assert (None, None, None, "fsdp") in leaves
    assert (None, None, "fsdp", "model") in leaves
    assert (None, None, "model", "fsdp") in leaves  # the hidden layer's
    assert ("fsdp", None) in leaves  # the head's
    images = jax.random.normal(jax.random.key(1), (4, 5, 6, 2))
    graphdef, params = nnx.split(model)
    divided = jax.jit(lambda p, x: nnx.merge(graphdef, p)(x))(params, images)
    np.testing.assert_allclose(divided, make()(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "images", [jnp.zeros((2, 5, 6)), jnp.zeros((2, 6, 5, 2)), jnp.zeros((2, 5, 6, 2), jnp.uint8)]
)
def test_other_images_are_refused(images):
    with pytest.raises(ValueError, match=r"expected floats \[batch, 5, 6, 2\]"):
        ConvNet(TINY, rngs=nnx.Rngs(0))(images)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"widths": ()}, "at least one convolution"),
        ({"widths": (8, 0)}, r"widths\[1\]=0"),
        ({"num_classes": 0}, "num_classes=0"),
        ({"height": 8.0}, "height=8.0"),
    ],
)
def test_bad_shapes(change, message):
    with pytest.raises(ValueError, match=message):
        ConvNetConfig(**change)
