"""Pipelines with other mesh axes around them, and inside the training step."""

import jax
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jdml.aggregate import mean_gradients
from jdml.partition.pipeline import gpipe, interleaved, one_f_one_b, pipeline, zero_bubble
from jdml.sharding import collectives, make_mesh, shard
from jdml.train import make_step
from tests.partition.pipeline.model import block, close, first, last, make_batch, make_params

PLAIN = {"in": P(), "out": P(), "layers": {"up": P(), "down": P()}}
TENSOR = {
    "in": P(),
    "out": P(),
    "layers": {"up": P(None, None, "model"), "down": P(None, "model", None)},
}


def without_dropout(params, x, batch, key):
    return block(params, x, batch, None)


def make(mesh, schedule, block=block):
    return pipeline(first, block, last, mesh, num_layers=8, micro_batches=4, schedule=schedule)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("axes", "schedule"),
    [
        ({"stage": 4, "model": 2}, one_f_one_b()),
        ({"data": 2, "stage": 2, "model": 2}, zero_bubble()),
        ({"model": 2, "stage": 2}, interleaved(2)),
    ],
    ids=str,
)
def test_automatic_axes(axes, schedule):
    mesh = make_mesh(axes, devices=jax.devices()[: int(np.prod(list(axes.values())))])
    pipe = make(mesh, schedule)
    params, batch, key = make_params(8), make_batch(), jax.random.key(3)
    specs = pipe.specs(TENSOR)
    arranged = shard(pipe.arrange(params), mesh, specs)
    placed = jax.device_put(batch, NamedSharding(mesh, P("data" if "data" in axes else None)))
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    compiled = (
        jax.jit(jax.value_and_grad(pipe, has_aux=True), out_shardings=(None, shardings))
        .lower(arranged, placed, key)
        .compile()
    )
    got, gradients = compiled(arranged, placed, key)
    want, reference = jax.jit(jax.value_and_grad(pipe.reference, has_aux=True))(params, batch, key)
    close(got, want)
    close(pipe.restore(gradients), reference)
    found = collectives(compiled, mesh)
    # Neighbours exchange x and its gradient; the ends' parameters are summed over the stages.
    over_stages = {c.kind for c in found if "stage" in c.axes}
    assert over_stages == {"collective-permute", "all-reduce"}
    assert {c.kind for c in found if c.axes == ("model",)} == {"all-reduce"}
    permutes = [c for c in found if c.kind == "collective-permute"]
    micro_batch = batch["x"].nbytes // 4 // mesh.shape.get("data", 1)
    assert {c.payload_bytes for c in permutes} == {micro_batch}
    assert [c.count for c in permutes] == [pipe.timetable.ticks] * 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("axes", "schedule"),
    [
        ({"data": 2, "stage": 4}, gpipe()),
        ({"data": 2, "stage": 2, "model": 2}, zero_bubble()),
    ],
    ids=str,
)
def test_in_a_training_step(axes, schedule):
    mesh = make_mesh(axes)
    pipe = make(mesh, schedule, without_dropout)  # each worker has keys of its own
    params, batch = make_params(8), make_batch()
    tx = optax.chain(mean_gradients("data"), optax.sgd(0.1))
    specs = pipe.specs(TENSOR if "model" in axes else PLAIN)
    init, step = make_step(pipe, tx, mesh, specs=specs)
    state = init(pipe.arrange(params))
    up = state.params["layers"]["up"].sharding.spec
    assert up == specs["layers"]["up"]
    state, metrics = step(state, batch)
    reference = jax.jit(jax.value_and_grad(pipe.reference, has_aux=True))
    (loss, more), gradients = reference(params, batch)
    close({"loss": loss, **more}, metrics)
    want = jax.tree.map(lambda p, g: p - 0.1 * g, params, gradients)
    close(pipe.restore(state.params), want)
