"""Local steps of any loss by any Optax chain, on one device."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from jdml.communicate.pace.workers.base import PyTree, Task, Towards


class OptaxTask(Task):
    """``update, state = tx.update(grad loss(params, batch, key), state, params)``, compiled once.

    Args:
      loss_fn: ``(params, batch, key) -> (loss, metrics)``, as for ``jdml.train.make_step``.
      tx: Any Optax chain; ``optax.identity()`` makes the workers push gradients.
      batches: ``(worker, index) -> batch``: a worker's samples of its step ``index``. A function of
        these alone makes a run repeat itself, and lets one be resumed from its counters.
      seed: Of the keys, which differ by worker and step.
    """

    def __init__(
        self,
        loss_fn: Callable[..., tuple[jax.Array, Any]],
        tx: optax.GradientTransformation,
        batches: Callable[[int, int], PyTree],
        seed: int = 0,
    ) -> None:
        self.tx, self.batches = optax.with_extra_args_support(tx), batches
        key = jax.random.key(seed)

        def step(
            params: PyTree, state: Any, batch: PyTree, worker: Any, index: Any, towards: Any
        ) -> tuple[PyTree, Any, jax.Array]:
            own = jax.random.fold_in(jax.random.fold_in(key, worker), index)
            (loss, _), gradients = jax.value_and_grad(loss_fn, has_aux=True)(params, batch, own)
            if towards is not None:
                gradients = jax.tree.map(
                    lambda g, x, c: (g + towards.rho * (x - c)).astype(g.dtype),
                    gradients,
                    params,
                    towards.centre,
                )
            update, state = self.tx.update(gradients, state, params)
            return update, state, loss

        self._init, self._step = jax.jit(self.tx.init), jax.jit(step)

    def init(self, worker: int, params: PyTree) -> Any:
        return self._init(params)

    def step(
        self, worker: int, params: PyTree, state: Any, index: int, towards: Towards | None = None
    ) -> tuple[PyTree, Any, jax.Array]:
        return self._step(params, state, self.batches(worker, index), worker, index, towards)
