"""Independent subnet training: a narrower network on each worker, dealt out anew every round."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jdml.communicate.wire import per_worker
from jdml.partition.subnets import cut, draw_subnets, join

PyTree = Any
Round = Callable[[PyTree, PyTree, jax.Array], tuple[PyTree, jax.Array]]


def independent_subnets(
    loss_fn: Callable[[PyTree, Mapping[str, jax.Array], PyTree, jax.Array], jax.Array],
    tx: optax.GradientTransformation,
    mesh: Mesh,
    names: PyTree,
    sizes: Mapping[str, int],
    *,
    axis: str = "data",
    backbone: float = 0.0,
) -> Round:
    """``round(params, batches, key) -> (params, loss)``: H steps on subnets, then joined.

    1. Every worker draws the same :class:`~jdml.partition.subnets.Subnets` from ``key`` and cuts
       its own out of the whole network.
    2. It takes H steps of ``tx`` on that, from a fresh state, without a word to anybody.
    3. The parts are gathered and put back: what a worker has alone is taken from it, the backbone's
       own edges are averaged, cut edges stay as they were.

    A worker computes on its subnet alone, about ``(b + (1 - b) / K)²`` of the edges between two
    hidden layers for a backbone of share b. It keeps the whole network beside it for the next draw.
    With ``backbone=1``, or on one worker, this is local SGD with a fresh optimiser every round.

    Args:
      loss_fn: ``(params, scales, batch, key) -> loss`` of a network as wide as its parameters;
        ``scales[layer]``, f32 ``[kept]``, is to multiply that hidden layer's outputs.
      tx: A chain without exchanges.
      mesh: The mesh; ``axis`` is its only axis longer than 1.
      names: For each leaf of the parameters the names of its dims (``jdml.partition.subnets.cut``).
      sizes: Units of each hidden layer.
      axis: The worker axis.
      backbone: Share of each hidden layer that all workers have.

    Returns:
      ``round``, to be jitted: ``batches`` has leaves ``[H, batch, ...]`` whose dim 1 is divided
      over the workers; ``loss`` is f32 ``[H]``, the mean over the workers' own.

    Raises:
      ValueError: an axis that the mesh lacks, or other axes that would divide nothing; what
        ``draw_subnets`` refuses.

    Bytes on the wire: ``(K - 1)`` times a subnet's parameters for each worker and round (an
    all-gather), and the losses' mean.

    Reference: Yuan et al., "Distributed Learning of Deep Neural Networks using Independent Subnet
    Training", 2022 (which uses no backbone, and normalises instead of scaling).
    """
    others = [a for a, size in mesh.shape.items() if a != axis and size > 1]
    if axis not in mesh.shape or others:
        raise ValueError(
            f"independent_subnets: expected a mesh whose only axis longer than 1 is {axis!r}, got "
            f"{dict(mesh.shape)}. A subnet lies on one device: make_mesh({{{axis!r}: -1}})."
        )
    num_workers = mesh.shape[axis]
    draw_subnets(jax.random.key(0), sizes, num_workers, backbone)  # what it refuses, before tracing

    def on_worker(params: PyTree, batches: PyTree, key: jax.Array) -> tuple[PyTree, jax.Array]:
        me = jax.lax.axis_index(axis)
        draw_key, step_key = jax.random.split(key)
        subnets = draw_subnets(draw_key, sizes, num_workers, backbone)
        # Of this worker in its type, also what all have: else gradients would arrive summed.
        whole = jax.tree.map(lambda x: per_worker(x, axis), params)
        own = cut(whole, names, {name: rows[me] for name, rows in subnets.units.items()})
        step_key = jax.random.fold_in(step_key, me)

        def step(carry: PyTree, x: PyTree) -> tuple[PyTree, jax.Array]:
            (own, state), (batch, number) = carry, x
            loss, gradients = jax.value_and_grad(loss_fn)(
                own, subnets.scales, batch, jax.random.fold_in(step_key, number)
            )
            updates, state = tx.update(gradients, state, own)
            return (optax.apply_updates(own, updates), state), loss

        num_steps = jax.tree.leaves(batches)[0].shape[0]
        state = jax.tree.map(lambda x: per_worker(x, axis), tx.init(own))
        (own, _), losses = jax.lax.scan(step, (own, state), (batches, jnp.arange(num_steps)))
        parts = jax.tree.map(lambda x: jax.lax.all_gather(x, axis, to="invarying"), own)
        return join(params, names, parts, subnets.units), jax.lax.pmean(losses, axis)

    return jax.shard_map(
        on_worker, mesh=mesh, in_specs=(P(), P(None, axis), P()), out_specs=(P(), P())
    )
