"""The decoder in three parts, as ``jdml.partition.pipeline`` takes a model.

pipe = pipeline(*pipeline_parts(model), mesh, num_layers=model.config.num_layers, ...)
params = pipe.arrange(nnx.to_pure_dict(nnx.state(model)))
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import nnx

from jdml.models.loss import loss_of_hidden
from jdml.models.transformer.decoder import Transformer
from jdml.models.transformer.remat import remat

PyTree = Any


class PipelineParts(NamedTuple):
    """Functions of a decoder's parameters, as a pure dict, and of a micro-batch.

    Attributes:
      first: ``(others, batch, key) -> x``, ``batch["inputs"]`` int32 [batch, seq] and x [batch,
        seq, embed].
      block: ``(layer, x, batch, key) -> x``, of one layer's parameters.
      last: ``(others, x, batch, key) -> (loss, {})``: the mean of
        :func:`jdml.models.next_token_loss` over ``batch["targets"]``.
    """

    first: Callable[..., jax.Array]
    block: Callable[..., jax.Array]
    last: Callable[..., tuple[jax.Array, dict[str, jax.Array]]]


def pipeline_parts(model: Transformer) -> PipelineParts:
    """The embedding, one block, and norm, head and loss of a decoder.

    A tied head reads the embedding, which ``first`` and ``last`` are both given. Dropout's masks
    are not those of ``Transformer``, which has other keys. ``config.remat`` holds for each block.

    Args:
      model: The decoder, or ``nnx.eval_shape`` of it: only its structure is used.

    Raises:
      ValueError: a mixture of experts whose balance is part of the loss; an offload, for a
        schedule itself says what is kept.
    """
    c = model.config
    if c.offloads:
        raise ValueError(
            f"pipeline_parts: remat={c.remat!r}: a pipeline's schedule says what is kept, on the "
            f"device. Use remat={c.recomputes!r}, or pipeline(..., remat=True)."
        )
    if c.num_experts is not None and (c.balance_weight or c.importance_weight or c.z_weight):
        raise ValueError(
            f"pipeline_parts: num_experts={c.num_experts} with losses of their own, which no stage "
            "hands on. Set balance_weight, importance_weight and z_weight to 0, or let a block of "
            "yours carry them along in x."
        )
    graphdef, state = nnx.split(model)
    shapes = nnx.to_pure_dict(state)
    block_def = nnx.graphdef(model.layers)

    def merged(others: PyTree) -> Transformer:
        # The stack stays abstract: neither end calls it.
        return nnx.merge(graphdef, {**shapes, **others})

    def first(others: PyTree, batch: PyTree, key: jax.Array | None) -> jax.Array:
        tokens = batch["inputs"]
        whole = merged(others)
        whole._check(tokens, c.max_seq_len, "config.max_seq_len")
        return whole.enter(tokens, key)

    def block(layer: PyTree, x: jax.Array, batch: PyTree, key: jax.Array | None) -> jax.Array:
        def apply(layer: PyTree, x: jax.Array) -> jax.Array:
            table = model.rotary_table(x.shape[1])
            return nnx.merge(block_def, layer)(x, table, key)[0]

        return remat(apply, c)(layer, x)

    def last(others: PyTree, x: jax.Array, batch: PyTree, key: jax.Array | None) -> Any:
        whole = merged(others)
        return loss_of_hidden(whole, whole.norm(x), batch["targets"]), {}

    return PipelineParts(first, block, last)
