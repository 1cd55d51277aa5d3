"""Rows from every device to every other, so many as there are."""

import functools

import jax
import jax.numpy as jnp

from jdml.models.experts.mapped import one_by_one
from jdml.sharding.region import alike


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def exchange(
    rows: jax.Array, sent: jax.Array, received: jax.Array, axes: tuple[str, ...], on: str
) -> jax.Array:
    """Part k of every device's rows, on device k, in the devices' order; inside ``shard_map``.

    Args:
      rows: [parts · size, width]: the first ``sent[k]`` rows of part k are meant, the others zeros.
      sent, received: int32 [parts]; a device's ``received[j]`` is device j's ``sent`` to it.
      axes: mesh axes with ``parts`` devices.
      on: the platform: ``"cpu"`` exchanges whole parts, others the rows that are meant.

    Returns:
      [parts · size, width], zeros after what was received of each part.
    """

    def run(rows: jax.Array, sent: jax.Array, received: jax.Array) -> jax.Array:
        if on == "cpu":  # no ragged all-to-all in XLA's backend
            return jax.lax.all_to_all(rows, axes, 0, 0, tiled=True)
        size = rows.shape[0] // sent.shape[0]
        starts = jnp.arange(sent.shape[0], dtype=jnp.int32) * size
        mine = jnp.full_like(starts, size) * jax.lax.axis_index(axes)
        rows, empty, *offsets = alike(rows, jnp.zeros_like(rows), starts, sent, mine, received)
        axis = axes if len(axes) > 1 else axes[0]
        return jax.lax.ragged_all_to_all(rows, empty, *offsets, axis_name=axis)

    return one_by_one(run)(rows, sent, received)


def _forward(
    rows: jax.Array, sent: jax.Array, received: jax.Array, axes: tuple[str, ...], on: str
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return exchange(rows, sent, received, axes, on), (sent, received)


def _backward(
    axes: tuple[str, ...], on: str, kept: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, None, None]:
    sent, received = kept
    return exchange(gradient, received, sent, axes, on), None, None


exchange.defvjp(_forward, _backward)
