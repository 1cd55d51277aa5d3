"""The compiled pipeline: a scan over ticks, in each of which a stage does what the timetable says.

Everything here runs inside a ``shard_map`` that is manual over the stage axis; other axes stay
automatic. All devices run one program: ``jax.lax.switch`` takes each stage to its operation. No
branch exchanges anything over the stage axis; after it, activations go one stage forward and
gradients one back. Collectives that the partitioner puts into a branch for other axes involve only
devices of one stage, all of which take that branch.

The backward pass is no transposed scan: it is what the timetable says, when it says it.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jdml.partition.pipeline.buffers import put
from jdml.partition.pipeline.operations import Mail, Operations, Row, State
from jdml.partition.pipeline.parts import Local, Parts
from jdml.partition.pipeline.timetable import Timetable

PyTree = Any


def run(
    parts: Parts,
    local: Local,
    timetable: Timetable,
    table: jax.Array,
    axis: str,
    num_layers: int,
    *,
    backward: bool,
    split: bool,
    remat: bool,
    static_count: int | None,
) -> tuple[jax.Array, dict[str, jax.Array], PyTree, PyTree]:
    """All micro-batches through the pipeline, on one stage.

    Args:
      parts: The model.
      local: This stage's share.
      timetable: The schedule in ticks.
      table: This stage's ``[ticks, columns]`` of it.
      axis: The stage axis.
      num_layers: Of the whole model.
      backward: Whether to compute gradients; without, ``timetable`` has no operations but ``F``.
      split: Whether the timetable has ``W``.
      remat: Keep the input of a part alone, and run it forward again before its backward pass.
      static_count: Layers of every part, where they are equal.

    Returns:
      ``(loss, metrics, layer gradients, other gradients)``: loss, metrics and other gradients are
      this stage's share of a sum over the stages. Gradients are f32; ``()`` without ``backward``.
    """
    operations = Operations(
        parts, local, timetable, num_layers, backward, split, remat, static_count
    )
    num_stages = jax.lax.axis_size(axis)
    forward = [(s, (s + 1) % num_stages) for s in range(num_stages)]
    back = [(t, s) for s, t in forward]
    columns = timetable.columns
    sends = (
        (columns["input_arrives"] >= 0).any(axis=1),
        (columns["gradient_arrives"] >= 0).any(axis=1),
    )

    def exchange(x: PyTree, pairs: list[tuple[int, int]], any_sends: jax.Array) -> PyTree:
        # The same on every stage: nobody waits for one who does not come.
        with jax.named_scope("branch.sends"):
            return jax.lax.cond(
                any_sends,
                lambda: jax.tree.map(lambda a: jax.lax.ppermute(a, axis, pairs), x),
                lambda: x,
            )

    def tick(carry: tuple[Mail, State], xs: Any) -> tuple[tuple[Mail, State], None]:
        mail, state = carry
        numbers, (inputs_go, gradients_go) = xs
        row = Row(numbers)
        state, y, dx = operations.operate(mail, state, row)
        inputs = put(mail.input, row.input_arrives, exchange(y, forward, inputs_go))
        gradients = mail.gradient
        if backward:
            gradients = put(gradients, row.output_stays, y)
            gradients = put(gradients, row.gradient_arrives, exchange(dx, back, gradients_go))
        return (Mail(inputs, gradients), state), None

    xs = (table, jax.tree.map(jnp.asarray, sends))
    (_, end), _ = jax.lax.scan(tick, operations.start(), xs)
    return end.loss, end.metrics, end.layer_gradients, end.other_gradients
