"""Gradients: of one worker's samples, over micro-batches; and of all workers at once."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jdml.sharding.fit import axes_of, num_parts
from jdml.train.validate import Axis, check_loss

PyTree = Any
Metrics = dict[str, jax.Array]
Gradients = tuple[PyTree, jax.Array, Metrics, PyTree]
"""``(gradients, loss, metrics, model_state)``"""
Mapping = Literal["vmap", "shard_map"]
Scale = jax.Array | None


def gradients_of(
    loss_fn: Callable[..., tuple[jax.Array, Any]], accumulate: int, has_model_state: bool
) -> Callable[[PyTree, PyTree, PyTree, jax.Array, Scale], Gradients]:
    """``(params, model_state, batch, key, scale) -> Gradients`` for one worker.

    ``scale`` multiplies the loss that is differentiated, not the one that is returned; None for 1.

    Args:
      loss_fn: As ``make_step`` takes it.
      accumulate: Number of micro-batches; when over 1 the batch's leading dim is that long.
      has_model_state: Whether ``loss_fn`` takes and returns model state, which then passes from
        micro-batch to micro-batch.
    """

    def objective(
        params: PyTree, model_state: PyTree, batch: PyTree, key: jax.Array, scale: Scale
    ) -> Any:
        if has_model_state:
            loss, (metrics, model_state) = loss_fn(params, model_state, batch, key)
        else:
            loss, metrics = loss_fn(params, batch, key)
        check_loss(loss, metrics)
        # In f32: a scale may lie beyond what the loss's own dtype holds.
        scaled = loss if scale is None else loss.astype(jnp.float32) * scale
        return scaled, (loss, metrics, model_state)

    value_and_grad = jax.value_and_grad(objective, has_aux=True)

    def whole(
        params: PyTree, model_state: PyTree, batch: PyTree, key: jax.Array, scale: Scale
    ) -> Gradients:
        (_, aux), gradients = value_and_grad(params, model_state, batch, key, scale)
        loss, metrics, model_state = aux
        return gradients, loss, metrics, model_state

    def in_parts(
        params: PyTree, model_state: PyTree, batch: PyTree, key: jax.Array, scale: Scale
    ) -> Gradients:
        def micro_step(carry: PyTree, x: PyTree) -> tuple[PyTree, None]:
            totals, model_state = carry
            part, number = x
            part_key = jax.random.fold_in(key, number)
            *terms, model_state = whole(params, model_state, part, part_key, scale)
            totals = jax.tree.map(lambda total, x: total + x.astype(total.dtype), totals, terms)
            return (totals, model_state), None

        first = jax.tree.map(lambda x: x[0], batch)
        *shapes, _ = jax.eval_shape(whole, params, model_state, first, key, scale)
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

    The scale of the loss is one for all.

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
        return jax.vmap(gradients, in_axes=(*in_axes, 0, 0, None), spmd_axis_name=axis)
    in_specs = jax.tree.map(lambda flag: P(axis) if flag else P(), flags)

    def on_worker(
        params: PyTree, model_state: PyTree, batch: PyTree, key: jax.Array, scale: Scale
    ) -> Gradients:
        params, model_state = jax.tree.map(
            lambda x, flag: x[0] if flag else x, (params, model_state), flags
        )
        batch = jax.tree.map(lambda x: x[0], batch)
        found = gradients(params, model_state, batch, key[0], scale)
        return jax.tree.map(lambda x: x[None], found)

    if num_parts(axis, mesh) == 1:
        # JAX lowers no region for one device, and XLA then aborts on regions inside it whose axes
        # are not in the mesh's order.
        return on_worker
    # Unchecked: types that vary over the workers would have to be declared in every loop of the
    # user's loss, and nothing in it is exchanged over this axis.
    return jax.shard_map(
        on_worker,
        mesh=mesh,
        in_specs=(*in_specs, P(axis), P(axis), P()),
        out_specs=P(axis),
        axis_names=set(axes_of(axis)),
        check_vma=False,
    )


def _sum_dtype(dtype: Any) -> Any:
    """f32, or the dtype itself where that is wider."""
    return jnp.promote_types(dtype, jnp.float32)
