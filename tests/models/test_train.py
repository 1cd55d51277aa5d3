"""Each model trained by ``make_step`` on a divided mesh: the loss of one small batch falls."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jdml.aggregate import mean_gradients
from jdml.models import Transformer, TransformerConfig, next_token_loss, token_losses
from jdml.models.multilayer import MLP, MLPConfig
from jdml.models.residual import ResNet, ResNetConfig
from jdml.models.vision_transformer import VisionTransformer, VisionTransformerConfig
from jdml.sharding import init, make_mesh, presets, specs
from jdml.train import make_step

GPT2 = TransformerConfig(
    vocab_size=16, num_layers=2, embed_dim=16, num_heads=2, num_kv_heads=2, head_dim=8,
    mlp_dim=32, max_seq_len=16, norm="layer", positions="learned", mlp="gelu", bias=True,
    tie_embeddings=True,
)  # fmt: skip
VIT = VisionTransformerConfig(
    image_size=8, patch_size=4, channels=1, num_layers=2, embed_dim=16, num_heads=2, mlp_dim=32,
    num_classes=4,
)  # fmt: skip
RESNET = ResNetConfig(depths=(1, 1), width=8, channels=1, num_classes=4, num_groups=2)
MODELS = {
    "gpt2": (Transformer, GPT2),
    "vit": (VisionTransformer, VIT),
    "resnet, group norm": (ResNet, RESNET),
    "resnet, batch norm": (ResNet, ResNetConfig(**vars(RESNET) | {"norm": "batch"})),
    "mlp": (MLP, MLPConfig(inputs=64, widths=(32, 16), num_outputs=4)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_the_loss_falls(name):
    """Labels at random: the model must learn its batch by heart."""
    kind, config = MODELS[name]
    mesh, rules = make_mesh({"data": 2, "fsdp": 2, "model": 2}), presets.fsdp_tensor()
    graphdef, params = nnx.split(init(lambda: kind(config, rngs=nnx.Rngs(0)), mesh, rules))
    draws = np.random.default_rng(0)
    if kind is Transformer:
        batch = jnp.asarray(draws.integers(0, 16, (8, 9)))
    else:
        images = draws.normal(size=(16, 8, 8, 1))
        batch = {
            "x": jnp.float32(images.reshape(16, -1) if kind is MLP else images),
            "label": jnp.asarray(draws.integers(0, 4, 16)),
        }

    def loss_fn(params, batch, key):
        model = nnx.merge(graphdef, params)
        if kind is Transformer:
            return next_token_loss(model, batch[:, :-1], batch[:, 1:]), {}
        return jnp.mean(token_losses(model(batch["x"]), batch["label"])), {}

    start, step = make_step(
        loss_fn,
        optax.chain(mean_gradients("data"), optax.adam(1e-2)),
        mesh,
        specs=specs(params, mesh, rules),
        rules=rules,
        batch_axes=("fsdp",),
    )
    state, losses = start(params, 0), []
    for _ in range(25):
        state, metrics = step(state, batch)
        losses.append(float(jax.block_until_ready(metrics["loss"])))
    assert losses[-1] < 0.5 * losses[0], losses
