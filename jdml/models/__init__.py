"""Flax models built on ``jdml.sharding`` alone."""

from jdml.models.convolution import ConvNet, ConvNetConfig
from jdml.models.loss import next_token_loss, token_losses
from jdml.models.transformer import Transformer, TransformerConfig, generate

__all__ = [
    "ConvNet",
    "ConvNetConfig",
    "Transformer",
    "TransformerConfig",
    "generate",
    "next_token_loss",
    "token_losses",
]
