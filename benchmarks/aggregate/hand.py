"""Training steps as one writes them without the library: ``jit`` around a ``shard_map``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

PyTree = Any
Loss = Callable[[PyTree, PyTree], jax.Array]
Exchange = Callable[[PyTree, PyTree], tuple[PyTree, PyTree]]
"""``(tree, kept) -> (tree, kept)`` on one worker: a collective, and what it keeps."""


class Hand(NamedTuple):
    """What the workers of a hand-written step tell each other.

    Attributes:
      gradients: Exchange of the gradients, before the optimiser; ``None`` if none.
      params: Exchange of the parameters, after the optimiser; ``None`` if none.
      kept: ``params -> kept``, what the exchange keeps at first, per worker.
      own_models: Whether every worker has a model of its own.
    """

    gradients: Exchange | None = None
    params: Exchange | None = None
    kept: Callable[[PyTree], PyTree] = lambda params: ()
    own_models: bool = True


def hand_written(
    loss_fn: Loss, optimizer: optax.GradientTransformation, hand: Hand, mesh: Mesh
) -> tuple[Callable[[PyTree], PyTree], Callable[[PyTree, PyTree], tuple[PyTree, jax.Array]]]:
    """``init(params) -> state`` and ``step(state, batch) -> (state, loss)``, the state donated."""
    mine, shared = P("data"), P()
    of_model = mine if hand.own_models else shared
    specs = (of_model, of_model, mine)

    def make(params: PyTree) -> PyTree:
        state = (params, optimizer.init(params), hand.kept(params))
        stack = (mesh.shape["data"],)

        def placed(x: jax.Array, spec: P) -> jax.Array:
            return jnp.broadcast_to(x, stack + x.shape) if spec == mine else jnp.copy(x)

        return tuple(
            jax.tree.map(lambda x, s=spec: placed(x, s), part)
            for part, spec in zip(state, specs, strict=True)
        )

    init = jax.jit(make, out_shardings=tuple(NamedSharding(mesh, spec) for spec in specs))

    def on_worker(state: PyTree, batch: PyTree) -> tuple[PyTree, jax.Array]:
        params, opt_state, kept = (
            jax.tree.map(lambda x, s=spec: x[0] if s == mine else x, part)
            for part, spec in zip(state, specs, strict=True)
        )
        loss, gradients = jax.value_and_grad(loss_fn)(params, batch)
        if hand.gradients is not None:
            gradients, kept = hand.gradients(gradients, kept)
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        params = optax.apply_updates(params, updates)
        if hand.params is not None:
            params, kept = hand.params(params, kept)
        new = tuple(
            jax.tree.map(lambda x, s=spec: x[None] if s == mine else x, part)
            for part, spec in zip((params, opt_state, kept), specs, strict=True)
        )
        return new, jax.lax.pmean(loss, "data")

    mapped = jax.shard_map(
        on_worker, mesh=mesh, in_specs=(specs, mine), out_specs=(specs, shared), check_vma=False
    )
    return init, jax.jit(mapped, donate_argnums=0)
