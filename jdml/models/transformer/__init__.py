"""A decoder-only transformer in Flax NNX, and what one does with it.

Reading order: ``config``, ``decoder`` (with ``attention``, ``mlp``, ``layers``), ``generate``.
"""

from jdml.models.transformer.config import TransformerConfig
from jdml.models.transformer.decoder import Block, Cache, Transformer
from jdml.models.transformer.generate import generate

__all__ = ["Block", "Cache", "Transformer", "TransformerConfig", "generate"]
