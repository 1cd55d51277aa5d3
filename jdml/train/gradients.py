"""Gradients: of one worker's samples, over micro-batches; and of all workers at once."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jdml.sharding.fit import axes_of
from jdml.train.validate import Axis, check_loss

PyTree = Any
Metrics = dict[str, jax.Array]
Gradients = tuple[PyTree, jax.Array, Metrics, PyTree]
"""``(gradients, loss, metrics, model_state)``"""
Mapping = Literal["vmap", "shard_map"]


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


def default_mapping(mesh: Mesh, axis: Axis) -> Mapping:
    """``"shard_map"`` on CPU meshes with at most one other axis longer than 1, else ``"vmap"``."""
    others = [a for a, size in mesh.shape.items() if a not in axes_of(axis) and size > 1]
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    return "shard_map" if on_cpu and len(others) <= 1 else "vmap"


def over_workers(
    gradients: Callable[..., Gradients],
    mesh: Mesh,
    axis: Axis,
    mapping: Mapping,
    params_flags: PyTree,
    model_state_flags: PyTree,
) -> Callable[..., Gradients]:
    """``gradients`` on every worker at once: batch, keys and results have a leading worker dim.

    Both mappings leave the other mesh axes automatic and give the same numbers:

    - ``"vmap"`` with ``spmd_axis_name`` compiles for every mesh and topology tried. The worker dim,
      of size 1 on each device, costs jax 0.10's CPU compiler about 12 % of a transformer's step in
      transposes (0.12: nothing).
    - ``"shard_map"``, manual over the worker axis, has no such dim. XLA's partitioner aborts on it
      when a table sharded over its vocabulary is gathered from and two more axes are automatic.

    Args:
      gradients: From :func:`gradients_of`.
      mesh: The mesh.
      axis: The worker axis, or a tuple of axes.
      mapping: Which of the two.
      params_flags: True for each parameter that has a leading worker dim.
      model_state_flags: The same for the model state.
    """
    flags = (params_flags, model_state_flags)
    if mapping == "vmap":
        in_axes = jax.tree.map(lambda flag: 0 if flag else None, flags)
        return jax.vmap(gradients, in_axes=(*in_axes, 0, 0), spmd_axis_name=axis)
    in_specs = jax.tree.map(lambda flag: P(axis) if flag else P(), flags)

    def on_worker(params: PyTree, model_state: PyTree, batch: PyTree, key: jax.Array) -> Gradients:
        params, model_state = jax.tree.map(
            lambda x, flag: x[0] if flag else x, (params, model_state), flags
        )
        batch = jax.tree.map(lambda x: x[0], batch)
        return jax.tree.map(lambda x: x[None], gradients(params, model_state, batch, key[0]))

    # Unchecked: types that vary over the workers would have to be declared in every loop of the
    # user's loss, and nothing in it is exchanged over this axis.
    return jax.shard_map(
        on_worker,
        mesh=mesh,
        in_specs=(*in_specs, P(axis), P(axis)),
        out_specs=P(axis),
        axis_names=set(axes_of(axis)),
        check_vma=False,
    )


def _sum_dtype(dtype: Any) -> Any:
    """f32, or the dtype itself where that is wider."""
    return jnp.promote_types(dtype, jnp.float32)
