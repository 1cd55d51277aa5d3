"""What a configuration refuses, and that it counts its own parameters right."""

import dataclasses

import jax
import pytest
from flax import nnx

from jdml.models import Transformer, TransformerConfig


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_layers": 0}, "num_layers"),
        ({"embed_dim": -8}, "embed_dim"),
        ({"mlp_dim": 1.5}, "mlp_dim"),
        ({"vocab_size": True}, "vocab_size"),
        ({"num_heads": 6, "num_kv_heads": 4}, "num_kv_heads"),
        ({"head_dim": 7}, "even"),
        ({"dropout": 1.0}, "dropout"),
        ({"dropout": float("nan")}, "dropout"),
        ({"rope_base": 0.0}, "rope_base"),
        ({"norm_epsilon": float("inf")}, "norm_epsilon"),
        ({"dtype": "float64"}, "dtype"),
        ({"remat": "some"}, "remat"),
        ({"norm": "batch"}, "norm must be one of"),
        ({"positions": "none"}, "positions"),
        ({"mlp": "relu"}, "mlp"),
    ],
)
def test_config_refuses_what_cannot_be_built(wrong, message):
    with pytest.raises(ValueError, match=message):
        TransformerConfig(**wrong)


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize(
    "form",
    [
        {},
        {"norm": "layer", "positions": "learned", "mlp": "gelu", "bias": True},
        {"norm": "layer", "mlp": "gelu"},
        {"bias": True},
    ],
    ids=str,
)
def test_num_params_is_the_real_count(tie, form):
    config = TransformerConfig(
        vocab_size=11, num_layers=3, embed_dim=20, num_heads=6, num_kv_heads=2, head_dim=4,
        mlp_dim=14, tie_embeddings=tie, **form,
    )  # fmt: skip
    shapes = nnx.state(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))
    assert config.num_params == sum(x.size for x in jax.tree.leaves(shapes))


def test_what_is_not_causal_keeps_no_cache():
    model = nnx.eval_shape(lambda: Transformer(TransformerConfig(causal=False), rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="causal"):
        model.init_cache(1, 4)


def test_config_is_frozen_and_hashable():
    config = TransformerConfig()
    assert hash(config) == hash(dataclasses.replace(config))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.num_layers = 2
