"""What the devices do, in the order in which they do it, against the simulator's timeline."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdml.partition.pipeline import (
    gpipe,
    interleaved,
    one_f_one_b,
    pipeline,
    simulate,
    zero_bubble,
)
from jdml.partition.pipeline.schedule import needs
from tests.partition.pipeline.model import mesh_of

pytestmark = pytest.mark.usefixtures("compiled_lightly")

NUM_STAGES, MICRO_BATCHES = 4, 8
events = []
"""``(stage, kind, micro-batch, part)``, appended to by the running program."""


def seen(kind, number, layer, x):
    """0, and an event at the time at which it is computed, which needs ``x``."""

    def record(stage, number, layer, x):
        events.append((int(stage), kind, int(number), int(layer)))
        return np.float32(0)

    stage = jax.lax.axis_index("stage")
    zero = jax.ShapeDtypeStruct((), jnp.float32)
    return jax.pure_callback(record, zero, stage, number, layer, jnp.sum(x))


@jax.custom_vjp
def product(weight, x, number, layer):
    return weight * x + seen("F", number, layer, x)


def forward(weight, x, number, layer):
    return product(weight, x, number, layer), (weight, x, number, layer)


def backward(kept, dy):
    weight, x, number, layer = kept
    dx = weight * dy + seen("B", number, layer, dy)
    dweight = jnp.sum(x * dy) + seen("W", number, layer, dy)
    return dweight, dx, jnp.zeros_like(number), jnp.zeros_like(layer)


product.defvjp(forward, backward)


def block(params, x, batch, key):
    return product(params["weight"], x, batch["number"][0], params["number"])


def executed(schedule):
    """What each of four devices did in a training step, in order; and all of it."""
    parts = NUM_STAGES * schedule.chunks
    pipe = pipeline(
        lambda others, batch, key: others["in"] * jnp.ones((1, 2)),
        block,
        lambda others, x, batch, key: (jnp.mean(x**2), {}),
        mesh_of(stage=NUM_STAGES),
        num_layers=parts,
        micro_batches=MICRO_BATCHES,
        schedule=schedule,
    )
    params = {
        "in": jnp.ones(()),
        "layers": {"weight": jnp.linspace(0.5, 1.5, parts), "number": jnp.arange(float(parts))},
    }
    batch = {"number": jnp.arange(float(MICRO_BATCHES))}  # one sample in each micro-batch
    events.clear()
    jax.block_until_ready(jax.jit(jax.grad(pipe, has_aux=True))(pipe.arrange(params), batch))
    return [[event[1:] for event in events if event[0] == s] for s in range(NUM_STAGES)], events[:]


@pytest.mark.parametrize(
    "schedule",
    [gpipe(), one_f_one_b(), interleaved(2), zero_bubble()],
    ids=lambda schedule: schedule.name,
)
def test_devices_keep_to_the_timeline(schedule):
    by_stage, everything = executed(schedule)
    timeline = simulate(schedule, NUM_STAGES, MICRO_BATCHES)
    for stage, row in enumerate(timeline.stages):
        # Where the backward pass is not split, its halves come together, in any order.
        want = [
            {
                (kind, op.micro_batch, op.chunk * NUM_STAGES + stage)
                for kind in ("BW" if op.kind == "B" and not schedule.splits_backward else op.kind)
            }
            for op, _, _ in row
        ]
        did = iter(by_stage[stage])
        assert [set(itertools.islice(did, len(ops))) for ops in want] == want
        assert not list(did)

    when = {event[1:]: place for place, event in enumerate(everything)}
    for (kind, number, part), place in when.items():
        for before, other in needs(kind, part, NUM_STAGES * schedule.chunks - 1):
            # An unsplit W is part of its B.
            assert when[before, number, other] < place or (before, kind) == ("B", "W")
