"""The decoder in three parts, as ``jdml.partition.pipeline`` takes a model.

pipe = pipeline(*pipeline_parts(model), mesh, num_layers=model.config.num_layers, ...)
params = pipe.arrange(nnx.to_pure_dict(nnx.state(model)))
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jdml.models.experts.routing import Balance
from jdml.models.loss import loss_of_hidden
from jdml.models.transformer.decoder import Transformer
from jdml.models.transformer.objective import with_balance
from jdml.models.transformer.remat import remat

PyTree = Any


class PipelineParts(NamedTuple):
    """Functions of a decoder's parameters, as a pure dict, and of a micro-batch.

    Attributes:
      first: ``(others, batch, key) -> x``, ``batch["inputs"]`` int32 [batch, seq] and x [batch,
        seq, embed]; with experts a pair of it and zeros, one for each of ``Balance``.
      block: ``(layer, x, batch, key) -> x``, of one layer's parameters; with experts its balance,
        over the number of layers, is added to what travels along.
      last: ``(others, x, batch, key) -> (loss, metrics)``: of
        :func:`jdml.models.training_loss` over ``batch["targets"]``.
    """

    first: Callable[..., Any]
    block: Callable[..., Any]
    last: Callable[..., tuple[jax.Array, dict[str, jax.Array]]]


def pipeline_parts(model: Transformer) -> PipelineParts:
    """The embedding, one block, and norm, head and loss of a decoder.

    A tied head reads the embedding, which ``first`` and ``last`` are both given. Dropout's masks
    are not those of ``Transformer``, which has other keys. ``config.remat`` holds for each block.
    A mixture's losses are those of ``training_loss``, of each micro-batch by itself, and their
    mean: a router balances the tokens of a micro-batch. They travel with x, five floats.

    Args:
      model: The decoder, or ``nnx.eval_shape`` of it: only its structure is used.

    Raises:
      ValueError: an offload, for a schedule itself says what is kept.
    """
    c = model.config
    if c.offloads:
        raise ValueError(
            f"pipeline_parts: remat={c.remat!r}: a pipeline's schedule says what is kept, on the "
            f"device. Use remat={c.recomputes!r}, or pipeline(..., remat=True)."
        )
    graphdef, state = nnx.split(model)
    shapes = nnx.to_pure_dict(state)
    block_def = nnx.graphdef(model.layers)

    def merged(others: PyTree) -> Transformer:
        # The stack stays abstract: neither end calls it.
        return nnx.merge(graphdef, {**shapes, **others})

    def first(others: PyTree, batch: PyTree, key: jax.Array | None) -> Any:
        tokens = batch["inputs"]
        whole = merged(others)
        whole._check(tokens, c.max_seq_len, "config.max_seq_len")
        x = whole.enter(tokens, key)
        return x if c.num_experts is None else (x, jnp.zeros(len(Balance._fields)))

    def block(layer: PyTree, x: Any, batch: PyTree, key: jax.Array | None) -> Any:
        def apply(layer: PyTree, x: jax.Array) -> tuple[jax.Array, Balance | None]:
            table = model.rotary_table(x.shape[1])
            y, _, balance = nnx.merge(block_def, layer).run(x, table, key)
            return y, balance

        if c.num_experts is None:
            return remat(apply, c)(layer, x)[0]
        x, so_far = x
        x, balance = remat(apply, c)(layer, x)
        return x, so_far + jnp.stack(balance) / c.num_layers

    def last(others: PyTree, x: Any, batch: PyTree, key: jax.Array | None) -> Any:
        whole = merged(others)
        hidden, balance = (x, None) if c.num_experts is None else x
        loss = loss_of_hidden(whole, whole.norm(hidden), batch["targets"])
        return (loss, {}) if balance is None else with_balance(c, loss, Balance(*balance))

    return PipelineParts(first, block, last)
