"""What one worker computes alone: the mean gradient of its samples, over micro-batches."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jdml.train.validate import check_loss

PyTree = Any
Metrics = dict[str, jax.Array]
Gradients = tuple[PyTree, jax.Array, Metrics, PyTree]
"""``(gradients, loss, metrics, model_state)``"""


def gradients_of(
    loss_fn: Callable[..., tuple[jax.Array, Any]], accumulate: int, has_model_state: bool
) -> Callable[[PyTree, PyTree, PyTree, jax.Array], Gradients]:
    """``(params, model_state, batch, key) -> Gradients`` for one worker.

    Args:
      loss_fn: As ``make_step`` takes it.
      accumulate: Number of micro-batches; when over 1 the batch's leading dim is that long.
      has_model_state: Whether ``loss_fn`` takes and returns model state, which then passes from
        micro-batch to micro-batch.
    """

    def objective(params: PyTree, model_state: PyTree, batch: PyTree, key: jax.Array) -> Any:
        if has_model_state:
            loss, (metrics, model_state) = loss_fn(params, model_state, batch, key)
        else:
            loss, metrics = loss_fn(params, batch, key)
        check_loss(loss, metrics)
        return loss, (metrics, model_state)

    value_and_grad = jax.value_and_grad(objective, has_aux=True)

    def whole(params: PyTree, model_state: PyTree, batch: PyTree, key: jax.Array) -> Gradients:
        (loss, (metrics, model_state)), gradients = value_and_grad(params, model_state, batch, key)
        return gradients, loss, metrics, model_state

    def in_parts(params: PyTree, model_state: PyTree, batch: PyTree, key: jax.Array) -> Gradients:
        def micro_step(carry: PyTree, x: PyTree) -> tuple[PyTree, None]:
            totals, model_state = carry
            part, number = x
            *terms, model_state = whole(params, model_state, part, jax.random.fold_in(key, number))
            totals = jax.tree.map(lambda total, x: total + x.astype(total.dtype), totals, terms)
            return (totals, model_state), None

        first = jax.tree.map(lambda x: x[0], batch)
        *shapes, _ = jax.eval_shape(whole, params, model_state, first, key)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, _sum_dtype(s.dtype)), shapes)
        (totals, model_state), _ = jax.lax.scan(
            micro_step, (zeros, model_state), (batch, jnp.arange(accumulate))
        )
        gradients, loss, metrics = jax.tree.map(lambda x: x / accumulate, totals)
        gradients = jax.tree.map(lambda g, s: g.astype(s.dtype), gradients, shapes[0])
        return gradients, loss, metrics, model_state

    return whole if accumulate == 1 else in_parts


def _sum_dtype(dtype: Any) -> Any:
    """f32, or the dtype itself where that is wider."""
    return jnp.promote_types(dtype, jnp.float32)
