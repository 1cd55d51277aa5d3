"""A mesh axis along which nothing is divided is warned of, once; one in use never is."""

import warnings

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jdml.aggregate import mean_gradients
from jdml.communicate.codecs import int8
from jdml.sharding import Rules, constrain, make_mesh
from jdml.train import make_step

WIDTH = 8
WHOLE, BY_DATA = P(), P("data")


def plain(params, batch, key):
    del key
    return jnp.mean((batch @ params["w"]) ** 2), {}


def constrained(params, batch, key):
    del key
    return jnp.mean(constrain(batch @ params["w"], "batch", "mlp") ** 2), {}


def picked(params, batch, key):
    """Each device of the axis takes a part of the whole by its own number."""

    def part(x):
        mine = jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index("model") * 2, 2)
        return jax.lax.psum(jnp.sum(mine**2), "model")

    del key
    inner = jax.shard_map(part, in_specs=P(), out_specs=P(), axis_names={"model"}, check_vma=False)
    return inner(batch @ params["w"]), {}


def lowered(sizes, loss_fn=plain, spec=WHOLE, batch_spec=BY_DATA, **kwargs):
    """The step, lowered twice: nothing needs compiling."""
    mesh = make_mesh(sizes)
    tx = optax.chain(mean_gradients("data", int8(16)), optax.sgd(0.1))
    init, step = make_step(loss_fn, tx, mesh, specs={"w": spec}, **kwargs)
    state = init.abstract({"w": jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.float32)})
    sharding = NamedSharding(mesh, batch_spec)
    batch = jax.ShapeDtypeStruct((16, WIDTH), jnp.float32, sharding=sharding)
    for _ in range(2):
        step.lower(state, batch)


@pytest.mark.parametrize("steps_per_call", [1, 2])
def test_an_axis_without_use_is_named_with_its_cost(steps_per_call):
    """Though the exchange opens a region over it."""
    mesh = make_mesh({"data": 4, "model": 2})
    tx = optax.chain(mean_gradients("data", int8(16)), optax.sgd(0.1))
    init, step = make_step(plain, tx, mesh, specs={"w": P()}, steps_per_call=steps_per_call)
    state = init.abstract({"w": jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.float32)})
    shape = (16, WIDTH) if steps_per_call == 1 else (steps_per_call, 16, WIDTH)
    batch = jax.ShapeDtypeStruct(shape, jnp.float32)
    with pytest.warns(UserWarning, match="mesh axis 'model' of size 2") as record:
        step.lower(state, batch)
    step.lower(state, batch)  # a second warning would be an error
    assert len(record) == 1
    text = str(record[0].message)
    assert "1/2 of the tokens per second" in text
    assert "batch_axes=('model',)" in text
    assert "make_mesh({'data': 4})" in text


USES = {
    "of size 1": ({"data": 8, "model": 1}, {}),
    "batch_axes": ({"data": 4, "model": 2}, {"batch_axes": ("model",)}),
    "a parameter": ({"data": 4, "model": 2}, {"spec": P(None, "model")}),
    "the batch as placed": ({"data": 4, "seq": 2}, {"batch_spec": P("data", "seq")}),
    "a constraint": (
        {"data": 4, "model": 2},
        {"loss_fn": constrained, "rules": Rules(batch="data", mlp="model")},
    ),
    "axis_index": ({"data": 4, "model": 2}, {"loss_fn": picked, "mapping": "shard_map"}),
}


@pytest.mark.parametrize("use", USES)
def test_an_axis_in_use_is_not(use):
    sizes, kwargs = USES[use]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lowered(sizes, **kwargs)
