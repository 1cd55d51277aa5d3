"""Mean metrics over held-out batches."""

import contextlib
from collections.abc import Callable, Iterable
from typing import Any

import jax
from jax.sharding import Mesh

from jdml.sharding import Rules, use_rules

PyTree = Any


def make_evaluate(
    loss_fn: Callable[..., tuple[jax.Array, Any]],
    mesh: Mesh,
    rules: Rules | None = None,
    prefix: str = "val_",
) -> Callable[[PyTree, Iterable[PyTree]], dict[str, float]]:
    """``(params, batches) -> {"val_loss": ..., ...}``: means over batches, each of equal weight.

    Args:
      loss_fn: ``(params, batch, key) -> (loss, metrics)``, called with ``key=None`` (no dropout).
      mesh: Where the parameters and batches live.
      rules: Logical axis rules for ``constrain`` in ``loss_fn``.
      prefix: Put before every metric's name.
    """

    def one(params: PyTree, batch: PyTree) -> dict[str, jax.Array]:
        loss, metrics = loss_fn(params, batch, None)
        return {"loss": loss, **metrics}

    compiled = jax.jit(one)

    def evaluate(params: PyTree, batches: Iterable[PyTree]) -> dict[str, float]:
        context = contextlib.nullcontext() if rules is None else use_rules(mesh, rules)
        totals: dict[str, float] = {}
        count = 0
        with context:
            for batch in batches:
                # Fetching waits: on CPU, one program with collectives at a time.
                for name, value in jax.device_get(compiled(params, batch)).items():
                    totals[name] = totals.get(name, 0.0) + float(value)
                count += 1
        if not count:
            raise ValueError("evaluate: no batches; give at least one.")
        return {prefix + name: total / count for name, total in totals.items()}

    return evaluate
