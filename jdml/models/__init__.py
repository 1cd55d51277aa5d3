"""Flax models built on ``jdml.sharding`` alone."""

from jdml.models.convolution import ConvNet, ConvNetConfig
from jdml.models.loss import next_token_loss, token_losses
from jdml.models.multilayer import MLP, MLPConfig
from jdml.models.residual import ResNet, ResNetConfig, resnet
from jdml.models.transformer import (
    Transformer,
    TransformerConfig,
    generate,
    pipeline_parts,
    training_loss,
)
from jdml.models.vision_transformer import (
    VisionTransformer,
    VisionTransformerConfig,
    vit,
)

__all__ = [
    "MLP",
    "ConvNet",
    "ConvNetConfig",
    "MLPConfig",
    "ResNet",
    "ResNetConfig",
    "Transformer",
    "TransformerConfig",
    "VisionTransformer",
    "VisionTransformerConfig",
    "generate",
    "next_token_loss",
    "pipeline_parts",
    "resnet",
    "token_losses",
    "training_loss",
    "vit",
]
