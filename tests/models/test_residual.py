"""Residual networks: published sizes, a dense form in NumPy, and batch norm's statistics."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jdml.models.residual import Moments, ResNet, ResNetConfig, resnet

pytestmark = pytest.mark.usefixtures("one_device")

BASIC = ResNetConfig(depths=(1, 1), width=4, channels=2, num_classes=3, num_groups=2)
BOTTLENECK = dataclasses.replace(BASIC, block="bottleneck", norm="batch")
# Of torchvision's networks.
PUBLISHED = {
    18: 11_689_512,
    34: 21_797_672,
    50: 25_557_032,
    101: 44_549_160,
    152: 60_192_808,
}


@pytest.mark.parametrize("depth", [18, 34, 50])
@pytest.mark.parametrize("norm", ["group", "batch"])
def test_parameters_as_published(depth, norm):
    """Of either norm: what batch norm measures is no part of the model."""
    model = nnx.eval_shape(lambda: ResNet(resnet(depth, norm=norm), rngs=nnx.Rngs(0)))
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(nnx.state(model)))
    assert count == PUBLISHED[depth]


@pytest.mark.parametrize("depth", PUBLISHED)
def test_the_number_of_parameters_is_known_beforehand(depth):
    assert resnet(depth).num_params == PUBLISHED[depth]


@pytest.fixture(scope="module", params=[BASIC, BOTTLENECK], ids=["basic", "bottleneck"])
def network(request):
    """A network whose scales and biases are drawn at random too."""
    config = request.param
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: ResNet(config, rngs=nnx.Rngs(0))))
    params = jax.jit(lambda: nnx.state(ResNet(config, rngs=nnx.Rngs(0))))()
    draws = np.random.default_rng(3)
    params = jax.tree.map(lambda x: x + jnp.float32(0.2 * draws.normal(size=x.shape)), params)
    return config, graphdef, params, jnp.float32(draws.normal(size=(3, 9, 10, 2)))


def convolve(x, kernel, stride):
    """A pixel at a time, in float64."""
    size = len(kernel)
    pad = (size - 1) // 2
    x = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    places = [range(0, n - size + 1, stride) for n in x.shape[1:3]]
    cut = [[x[:, i : i + size, j : j + size] for j in places[1]] for i in places[0]]
    return np.einsum("hwbijc,ijco->bhwo", np.array(cut), kernel)


def dense(config, params, images):
    """The same in NumPy, and the means and variances of each batch norm on the way."""
    seen = []

    def layer(x, p, stride, relu):
        x = convolve(x, p["kernel"], stride)
        if config.norm == "batch":
            seen.append((x.mean((0, 1, 2)), x.var((0, 1, 2))))
            x = (x - seen[-1][0]) / np.sqrt(seen[-1][1] + 1e-5)
        else:
            for sample in x:
                for group in np.split(np.arange(x.shape[-1]), config.num_groups):
                    part = sample[..., group]
                    sample[..., group] = (part - part.mean()) / np.sqrt(part.var() + 1e-5)
        x = x * p["norm"]["scale"] + p["norm"]["bias"]
        return np.maximum(x, 0) if relu else x

    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    x = layer(np.asarray(images, np.float64), params["stem"], 2, True)
    x = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-np.inf)
    rows, columns = ((n - 3) // 2 + 1 for n in x.shape[1:3])
    x = np.array(
        [
            [x[:, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3].max((1, 2)) for j in range(columns)]
            for i in range(rows)
        ]
    ).transpose(2, 0, 1, 3)
    for stage in range(2):
        block, y = params["blocks"][stage], x
        layers = [block["layers"][i] for i in range(len(block["layers"]))]
        for i, p in enumerate(layers):
            # The stride is in the first 3 × 3.
            stride = 1 + stage if i == len(layers) - 2 else 1
            y = layer(y, p, stride, i < len(layers) - 1)
        if "shortcut" in block:
            x = layer(x, block["shortcut"], 1 + stage, False)
        x = np.maximum(x + y, 0)
    return x.mean((1, 2)) @ params["head"]["kernel"] + params["head"]["bias"], seen


def test_equals_its_dense_form(network):
    config, graphdef, params, images = network
    got, statistics = jax.jit(lambda p, x: nnx.merge(graphdef, p).observe(x))(params, images)
    wanted, seen = dense(config, nnx.to_pure_dict(params), images)
    np.testing.assert_allclose(got, wanted, rtol=1e-3, atol=1e-3)
    assert len(statistics) == len(seen)
    for moments, (mean, variance) in zip(statistics, seen, strict=True):
        found = moments.mean_square - moments.mean**2
        np.testing.assert_allclose(moments.mean, mean, rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(found, variance, rtol=1e-3, atol=1e-3)


def test_each_image_stands_alone(network):
    """Under group norm always; under batch norm with statistics, which give what the batch gave."""
    config, graphdef, params, images = network

    @jax.jit
    def run(params, images):
        model = nnx.merge(graphdef, params)
        logits, statistics = model.observe(images)
        return logits, model(images, statistics), model(images[:1], statistics), model(images[:1])

    together, again, alone, own = run(params, images)
    np.testing.assert_allclose(again, together, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(alone, together[:1], rtol=1e-4, atol=1e-4)
    same = np.allclose(own, together[:1], rtol=1e-2, atol=1e-2)
    assert same == (config.norm == "group")


def test_statistics_of_another_network_are_refused(network):
    config, graphdef, params, images = network
    model = nnx.merge(graphdef, params)
    num_norms = 0 if config.norm == "group" else 1 + 2 * 4
    wrong = tuple(Moments(jnp.zeros(5), jnp.ones(5)) for _ in range(num_norms or 1))
    with pytest.raises(ValueError, match=f"statistics: expected those of {num_norms} batch norms"):
        model(images, wrong)


def test_a_block_begins_as_its_shortcut():
    model = ResNet(BASIC, rngs=nnx.Rngs(0))
    assert not jnp.any(model.blocks[0].layers[1].norm.scale[...])
    assert jnp.all(model.blocks[0].layers[0].norm.scale[...] == 1)


@pytest.mark.parametrize(
    "images", [jnp.zeros((2, 5, 6)), jnp.zeros((2, 6, 5, 3)), jnp.zeros((2, 5, 6, 2), jnp.uint8)]
)
def test_other_images_are_refused(images):
    model = nnx.eval_shape(lambda: ResNet(BASIC, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"expected floats \[batch, height, width, 2\]"):
        model(images)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depths": ()}, "at least one stage"),
        ({"depths": (1, 0)}, r"depths\[1\]=0"),
        ({"width": 48}, "width=48 must be a multiple of num_groups=32"),
        ({"norm": "layer"}, "norm must be one of"),
        ({"block": "wide"}, "block must be one of"),
        ({"dtype": "float16"}, "dtype"),
    ],
)
def test_bad_shapes(change, message):
    with pytest.raises(ValueError, match=message):
        ResNetConfig(**change)


def test_other_depths_are_refused():
    with pytest.raises(ValueError, match="no depth 20; expected one of"):
        resnet(20)
