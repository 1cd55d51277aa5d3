"""Models nobody here wrote, at their published shapes, sharded by rules alone: the losses stay.

The yardstick is the example as its authors train it: plain JAX on one device, with none of jdml.
Losses are compared over a few steps of the example's own optimiser, on 1, 2 × 2, 2 × 2 × 2 and 8
devices.
"""

import contextlib
import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jdml.aggregate import mean_gradients
from jdml.sharding import check, describe, init, make_mesh, optimizer_specs, specs
from jdml.sharding.paths import leaves_with_paths
from jdml.train import make_step
from tests.sharding.published import flax_mnist, flax_scaled_up, flax_seq2seq, optax_nanolm
from tests.sharding.published.example import BATCH, Example

EXAMPLES = {
    "flax mnist": flax_mnist.EXAMPLE,
    "flax seq2seq": flax_seq2seq.EXAMPLE,
    "flax scaled up": flax_scaled_up.EXAMPLE,
    "optax nanolm": optax_nanolm.EXAMPLE,
}
NUM_STEPS = 3
KEY = 0


def mesh_of(example, name):
    sizes = {
        "1": {},
        "2x2": {"data": 2, example.second_axis: 2},
        "2x2x2": {"data": 2, "fsdp": 2, "model": 2},
        "8": {example.only_axis: 8},
    }[name]
    # Axes of size 1 stay, so that the rules name the same axes everywhere.
    sizes = {"data": 1, "fsdp": 1, "model": 1} | sizes
    return make_mesh(sizes, devices=jax.devices()[: math.prod(sizes.values())])


def batches(example):
    rng = np.random.default_rng(0)
    return [example.samples(rng, BATCH) for _ in range(NUM_STEPS)]


class Parts(NamedTuple):
    """A model as parameters, whatever else it keeps, and a loss that returns the latter anew."""

    params: object
    rest: object
    loss: object


def parts_of(example: Example, model) -> Parts:
    if not isinstance(model, nnx.Module):
        return Parts(model, (), lambda p, rest, batch, key: (example.loss(p, batch, key), ()))
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params, rest, batch, key):
        model = nnx.merge(graphdef, params, rest, copy=True)
        value = example.loss(model, batch, key)
        return value, nnx.split(model, nnx.Param, ...)[2]

    return Parts(params, rest, loss)


def train_alone(example: Example, num_workers: int) -> list[float]:
    """Without jdml, on one device: the mean of the gradients of so many shares of the batch."""
    with nnx.use_eager_sharding(False):
        params, rest, loss = parts_of(example, example.make(jax.random.key(KEY)))
    opt_state = example.tx.init(params)

    @jax.jit
    def step(params, rest, opt_state, batch, key):
        found = []
        for k in range(num_workers):
            share = jax.tree.map(lambda x, k=k: jnp.split(x, num_workers)[k], batch)
            found.append(jax.value_and_grad(loss, has_aux=True)(params, rest, share, key))
        (value, rest), grads = jax.tree.map(lambda *x: mean_of(x), *found)
        updates, opt_state = example.tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), rest, opt_state, value

    losses = []
    for batch in batches(example):
        params, rest, opt_state, value = step(params, rest, opt_state, batch, jax.random.key(1))
        losses.append(float(value))
    return losses


def mean_of(values):
    return sum(values) / len(values) if jnp.issubdtype(values[0].dtype, jnp.floating) else values[0]


def train_sharded(example: Example, mesh):
    model = init(example.make, mesh, example.rules, jax.random.key(KEY))
    params, rest, loss = parts_of(example, model)
    param_specs = specs(params, mesh, example.rules)
    check(params, param_specs, mesh)
    kept = bool(jax.tree.leaves(rest))

    def with_rest(params, rest, batch, key):
        value, rest = loss(params, rest, batch, key)
        return value, ({}, rest)

    def without(params, batch, key):
        return loss(params, (), batch, key)[0], {}

    init_state, step = make_step(
        with_rest if kept else without,
        optax.chain(mean_gradients("data"), example.tx),
        mesh,
        specs=param_specs,
        batch_axes=("fsdp",),
        model_state="mean" if kept else None,
    )
    state, losses = init_state(params, 1, rest), []
    for batch in batches(example):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    check(state.params, param_specs, mesh)
    check(state.opt_state, optimizer_specs(state.opt_state, state.params, param_specs), mesh)
    return losses, state


@pytest.fixture(scope="module")
def alone():
    """Losses on one device without jdml, computed once."""
    found = {}

    def losses(name, num_workers):
        example = EXAMPLES[name]
        key = name, num_workers if example.per_worker else 1
        if key not in found:
            found[key] = train_alone(example, key[1])
        return found[key]

    return losses


QUICK = [("flax scaled up", "2x2x2")]


@pytest.mark.parametrize(
    ("name", "mesh_name"),
    [
        case if case in QUICK else pytest.param(*case, marks=pytest.mark.slow)
        for case in itertools.product(EXAMPLES, ["1", "2x2", "2x2x2", "8"])
    ],
)
def test_trains_as_on_one_device_without_jdml(name, mesh_name, alone):
    example = EXAMPLES[name]
    mesh = mesh_of(example, mesh_name)
    divided = {"data", *(axis for spec in example.layout.values() for axis in spec)}
    idle = [axis for axis, size in mesh.shape.items() if size > 1 and axis not in divided]
    with pytest.warns(match=f"axis '{idle[0]}' of") if idle else contextlib.nullcontext():
        losses, state = train_sharded(example, mesh)
    # Sums of f32 in another order, carried through the updates: 7e-7 was the most seen.
    np.testing.assert_allclose(losses, alone(name, mesh.shape["data"]), rtol=5e-6)
    table = describe(state.params)
    axes = {axis for spec in example.layout.values() for axis in spec if axis}
    part = table.num_bytes / math.prod(mesh.shape[axis] for axis in axes)
    # Biases, norms and the narrowest kernels stay whole, or are divided over one axis of two.
    assert part <= table.bytes_per_device <= 1.1 * part


@pytest.mark.parametrize("name", EXAMPLES)
def test_rules_divide_the_published_shapes(name):
    example = EXAMPLES[name]
    shapes = jax.eval_shape(lambda: parts_of(example, example.make(jax.random.key(KEY))).params)
    assert sum(x.size for x in jax.tree.leaves(shapes)) == example.num_params
    found = dict(leaves_with_paths(specs(shapes, mesh_of(example, "2x2x2"), example.rules)))
    assert {path: found[path] for path in example.layout} == dict(example.layout)


@pytest.mark.slow
def test_statistics_are_those_of_each_workers_samples(alone):
    """Why the yardstick for batch norm has as many shares as the mesh has workers."""
    one, two = (np.array(alone("flax mnist", n)) for n in (1, 2))
    assert np.all(np.abs(two / one - 1) > 1e-4)
