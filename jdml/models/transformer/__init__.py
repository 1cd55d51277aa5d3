"""A decoder-only transformer in Flax NNX, and what one does with it.

Reading order: ``config``, ``decoder`` (with ``attention``, ``mlp``, ``experts``, ``layers``),
``generate``, ``objective``, ``parts``.
"""

from jdml.models.transformer.config import TransformerConfig
from jdml.models.transformer.decoder import Block, Cache, Transformer
from jdml.models.transformer.generate import generate
from jdml.models.transformer.objective import training_loss
from jdml.models.transformer.parts import PipelineParts, pipeline_parts

__all__ = [
    "Block",
    "Cache",
    "PipelineParts",
    "Transformer",
    "TransformerConfig",
    "generate",
    "pipeline_parts",
    "training_loss",
]
