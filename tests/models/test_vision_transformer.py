"""The vision transformer: published sizes, a dense form in NumPy, and what it refuses."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jdml.models.vision_transformer import VisionTransformer, VisionTransformerConfig, vit

pytestmark = pytest.mark.usefixtures("one_device")

TINY = VisionTransformerConfig(
    image_size=6, patch_size=2, channels=2, num_layers=2, embed_dim=12, num_heads=3, mlp_dim=10,
    num_classes=5,
)  # fmt: skip
# Of torchvision's ViT-B/16, B/32, L/16 and H/14, and timm's DeiT-S/16.
PUBLISHED = {
    "s16": 22_050_664,
    "b16": 86_567_656,
    "b32": 88_224_232,
    "l16": 304_326_632,
    "h14": 632_045_800,
}


@pytest.mark.parametrize("variant", PUBLISHED)
def test_parameters_as_published(variant):
    model = nnx.eval_shape(lambda: VisionTransformer(vit(variant), rngs=nnx.Rngs(0)))
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(nnx.state(model)))
    assert count == vit(variant).num_params == PUBLISHED[variant]


def dense(params, image):
    """Logits of one image in float64: patches cut out one by one, heads one by one."""

    def norm(x, p):
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6) * p[
            "scale"
        ] + p["bias"]

    def gelu(x):
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    rows = [params["token"]]
    for i in range(0, 6, 2):
        for j in range(0, 6, 2):
            cut = np.asarray(image, np.float64)[i : i + 2, j : j + 2]
            rows.append(np.einsum("ijc,ijce->e", cut, params["patch"]["kernel"]))
            rows[-1] = rows[-1] + params["patch"]["bias"]
    x = np.stack(rows) + params["positions"]["table"]
    for n in range(2):
        layer = jax.tree.map(lambda p: p[n], params["layers"])  # noqa: B023
        attention, h = layer["attention"], norm(x, layer["attention_norm"])
        x = x + attention["out"]["bias"]
        for head in range(3):
            q, k, v = (
                h @ attention[name]["kernel"][:, head] + attention[name]["bias"][head]
                for name in ("query", "key", "value")
            )
            weights = np.exp(q @ k.T / 2)
            mixed = weights / weights.sum(-1, keepdims=True) @ v
            x = x + mixed @ attention["out"]["kernel"][head]
        mlp, h = layer["mlp"], norm(x, layer["mlp_norm"])
        hidden = gelu(h @ mlp["up"]["kernel"] + mlp["up"]["bias"])
        x = x + hidden @ mlp["down"]["kernel"] + mlp["down"]["bias"]
    return norm(x[0], params["norm"]) @ params["head"]["kernel"] + params["head"]["bias"]


def test_equals_its_dense_form():
    """Biases, scales and the class token drawn at random too."""
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: VisionTransformer(TINY, rngs=nnx.Rngs(0))))
    params = jax.jit(lambda: nnx.state(VisionTransformer(TINY, rngs=nnx.Rngs(0))))()
    draws = np.random.default_rng(3)
    params = jax.tree.map(lambda x: x + jnp.float32(0.1 * draws.normal(size=x.shape)), params)
    images = jnp.float32(draws.normal(size=(3, 6, 6, 2)))
    got = jax.jit(lambda p, x: nnx.merge(graphdef, p)(x))(params, images)
    wanted = [dense(nnx.to_pure_dict(params), image) for image in images]
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)


def test_every_parameter_is_named():
    model = nnx.eval_shape(lambda: VisionTransformer(TINY, rngs=nnx.Rngs(0)))
    for path, leaf in nnx.to_flat_state(nnx.state(model)):
        names = leaf.get_metadata()["out_sharding"]
        assert len(names) == len(leaf.shape), path
        assert ("layers" in path) == (names[0] == "layers"), path


@pytest.mark.parametrize(
    "images", [jnp.zeros((2, 6, 6)), jnp.zeros((2, 8, 6, 2)), jnp.zeros((2, 6, 6, 2), jnp.uint8)]
)
def test_other_images_are_refused(images):
    model = nnx.eval_shape(lambda: VisionTransformer(TINY, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"expected floats \[batch, 6, 6, 2\]"):
        model(images)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch_size": 15}, "image_size=224 must be a multiple of patch_size=15"),
        ({"num_heads": 7}, "embed_dim=768 must be a multiple of num_heads=7"),
        ({"num_classes": 0}, "num_classes"),
        ({"mlp_dim": 1.5}, "mlp_dim"),
        ({"dtype": "float64"}, "dtype"),
    ],
)
def test_bad_shapes(change, message):
    with pytest.raises(ValueError, match=message):
        vit(**change)


def test_other_variants_are_refused():
    with pytest.raises(ValueError, match="no variant 'b8'; expected one of s16, b16"):
        vit("b8")
