"""Workers on several mesh axes at once: the numbers of one axis of the same size."""

import functools
import io

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from rich.console import Console

from jdml.aggregate import average_params, mean_gradients
from jdml.communicate import error_feedback
from jdml.communicate.codecs import int8
from jdml.sharding import collectives, constrain, make_mesh
from jdml.train import Checkpointer, MetricsLog, fit, make_step
from tests.train.problems import RULES, make_batch, pytree_problem

AXES = ("slice", "data")
FEEDBACK = error_feedback(int8(16))
METHODS = {
    "exact": lambda axis: optax.chain(mean_gradients(axis), optax.adam(1e-2)),
    "int8": lambda axis: optax.chain(mean_gradients(axis, FEEDBACK), optax.adam(1e-2)),
    "plain local": lambda axis: optax.chain(optax.sgd(0.1), average_params(axis, 2)),
    "local": lambda axis: optax.chain(optax.sgd(0.1), average_params(axis, 2, codec=FEEDBACK)),
}


def one_axis(model=2):
    return make_mesh({"data": 4, "model": model}, devices=jax.devices()[: 4 * model])


def two_axes(model=2):
    shape = {"slice": 2, "data": 2, "model": model}
    return make_mesh(shape, devices=jax.devices()[: 4 * model])


def noisy(problem):
    """A loss in which the key and the order of the workers count."""

    def loss_fn(params, batch, key):
        x = batch["x"]
        if key is not None:
            x = x * jax.random.bernoulli(key, 0.8, x.shape)
        loss, metrics = problem.loss_fn(params, {**batch, "x": x}, None)
        return loss, metrics

    return loss_fn


def train(mesh, workers, method, num_steps=3, **kwargs):
    problem = pytree_problem(mesh)
    tx = METHODS[method](workers)
    init, step = make_step(noisy(problem), tx, mesh, workers, problem.specs, **kwargs)
    state, metrics = init(problem.params, 0), {}
    for i in range(num_steps):
        state, metrics = step(state, make_batch(i))
    return state, metrics, init, step


def assert_close(a, b, atol=1e-6):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        assert x.shape == y.shape
        np.testing.assert_allclose(x, y, atol=atol)


@functools.cache
def on_one_axis(method):
    return train(one_axis(), "data", method)


@pytest.mark.parametrize("mapping", ["vmap", "shard_map"])
@pytest.mark.parametrize("method", ["exact", pytest.param("local", marks=pytest.mark.slow)])
def test_the_numbers_of_one_axis(method, mapping):
    expected = on_one_axis(method)
    # Either order of the names: worker k is the k-th as they are named.
    workers = AXES if mapping == "vmap" else AXES[::-1]
    got = train(two_axes(), workers, method, mapping=mapping)
    assert_close(got[0], expected[0])
    assert_close(got[1], expected[1])
    assert_close(got[3].consensus(got[0]), expected[3].consensus(expected[0]))


@pytest.mark.parametrize("mapping", ["vmap", pytest.param("shard_map", marks=pytest.mark.slow)])
def test_with_micro_batches_and_batch_axes(mapping):
    """Also on a mesh on which "data" stands after the axis that divides each worker's samples."""
    options = {"mapping": mapping, "accumulate": 2, "batch_axes": ("fsdp",)}
    four = jax.devices()[:4]
    expected = train(make_mesh({"fsdp": 1, "data": 4}, devices=four), "data", "exact", **options)
    mesh = make_mesh({"slice": 2, "fsdp": 2, "data": 2})
    got = train(mesh, AXES, "exact", **options)
    assert_close(got[0], expected[0])


def test_a_tuple_of_one_is_the_axis_itself():
    a = train(one_axis(1), "data", "exact", 1)
    b = train(one_axis(1), ("data",), "exact", 1)
    assert_close(a[0], b[0], atol=0)
    for x, y in zip(jax.tree.leaves(a[0]), jax.tree.leaves(b[0]), strict=True):
        assert x.sharding == y.sharding


def test_per_worker_leaves_are_divided_over_all_worker_axes():
    state, *_ = train(two_axes(), AXES, "local", 0)
    for leaf in (state.params["in"]["kernel"], state.opt_state[1].residual["in"]["kernel"]):
        assert (leaf.shape, leaf.sharding.spec) == ((4, 8, 16), P(AXES, None, "model"))
    assert state.opt_state[1].anchor["in"]["kernel"].sharding.spec == P(None, "model")


def test_a_mean_over_one_of_them_leaves_one_model_for_each_of_the_other():
    mesh = two_axes(1)
    problem = pytree_problem(mesh)
    tx = optax.chain(mean_gradients("data"), optax.sgd(0.1))
    init, step = make_step(problem.loss_fn, tx, mesh, AXES, problem.specs)
    state, _ = step(init(problem.params, 0), make_batch(0))
    kernel = np.asarray(state.params["in"]["kernel"])
    np.testing.assert_array_equal(kernel[0], kernel[1])
    np.testing.assert_array_equal(kernel[2], kernel[3])
    assert np.abs(kernel[0] - kernel[2]).max() > 0


@pytest.mark.slow
def test_the_exchange_spans_both_axes_and_no_other():
    _, _, init, step = train(two_axes(), AXES, "int8", 0)
    abstract = init.abstract(pytree_problem(two_axes()).params)
    seen = collectives(step.lower(abstract, make_batch(0)).compile(), two_axes())
    compressed = [c for c in seen if set(c.dtypes) <= {"u8", "s8"} and c.payload_bytes > 16]
    assert {c.kind for c in compressed} == {"all-to-all", "all-gather"}
    assert {c.axes for c in compressed} == {AXES}


def test_exact_within_a_slice_and_compressed_between_slices():
    mesh = two_axes()
    problem = pytree_problem(mesh)

    def build(**options):
        tx = optax.chain(mean_gradients(AXES, **options), optax.sgd(0.1))
        return make_step(problem.loss_fn, tx, mesh, AXES, problem.specs)

    states = []
    for init, step in (build(), build(codec=FEEDBACK, topology="hierarchical")):
        state = init(problem.params, 0)
        for i in range(3):
            state, _ = step(state, make_batch(i))
        states.append(state)
    # A step of 0.1 along a gradient whose elements are 1/254 of their block's largest off.
    assert_close(states[1].params, states[0].params, atol=2e-3)
    seen = collectives(step.lower(state, make_batch(0)).compile(), mesh)
    compressed = [c for c in seen if set(c.dtypes) <= {"u8", "s8"} and c.payload_bytes > 16]
    assert {c.axes for c in compressed} == {("slice",)}


def test_constrain_in_the_loss_leaves_out_both():
    mesh = two_axes()
    problem = pytree_problem(mesh)

    def loss_fn(params, batch, key):
        return problem.loss_fn(params, {**batch, "x": constrain(batch["x"], "batch", None)}, key)

    rules = RULES.replace(batch=(*AXES, "model"), embed=None)
    tx = METHODS["exact"](AXES)
    for mapping in ("vmap", "shard_map"):
        init, step = make_step(loss_fn, tx, mesh, AXES, problem.specs, rules=rules, mapping=mapping)
        _, metrics = step(init(problem.params, 0), make_batch(0))
        expected, _ = problem.loss_fn(problem.params, make_batch(0), None)
        np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)


class Data:
    def __init__(self):
        self.position = 0

    def __next__(self):
        self.position += 1
        return make_batch(self.position - 1)

    def state(self):
        return {"step": self.position}


def test_stopped_and_resumed_on_the_other_layout(tmp_path):
    """Three steps on two axes, two more on one axis of as many workers: as five in one go."""
    console = Console(file=io.StringIO())
    mesh, data = two_axes(), Data()
    problem = pytree_problem(mesh)
    init, step = make_step(noisy(problem), METHODS["plain local"](AXES), mesh, AXES, problem.specs)
    with Checkpointer(tmp_path) as checkpointer:
        options = {"checkpointer": checkpointer, "console": console}
        result = fit(step, init(problem.params, 0), data, 3, mesh=mesh, workers=AXES, **options)
        again = checkpointer.restore(init.abstract(problem.params))
        assert_close(again.state, result.state, atol=0)

        mesh = one_axis()
        init, step = make_step(
            noisy(problem), METHODS["plain local"]("data"), mesh, "data", problem.specs
        )
        state = checkpointer.restore(init.abstract(problem.params)).state
        result = fit(step, state, data, 5, mesh=mesh, **options)
    expected, *_ = train(one_axis(), "data", "plain local", 5)
    assert_close(result.state, expected)


def test_the_loop_counts_what_goes_over_either_axis():
    sent = []
    for mesh, workers in [(one_axis(1), "data"), (two_axes(1), AXES[::-1])]:
        problem = pytree_problem(mesh)
        init, step = make_step(problem.loss_fn, METHODS["exact"](workers), mesh, workers)
        text, log = io.StringIO(), MetricsLog(None)
        fit(
            step,
            init(problem.params, 0),
            Data(),
            1,
            mesh=mesh,
            workers=workers,
            log=log,
            console=Console(file=text, width=200),
        )
        sent.append(log.rows[0]["bytes_per_step"])
        assert f"over {workers!r}" in text.getvalue()
    assert sent[0] == sent[1] > 0


def test_bad_input_is_refused():
    mesh = two_axes()
    problem = pytree_problem(mesh)

    def make(workers, **kwargs):
        return make_step(problem.loss_fn, METHODS["exact"](AXES), mesh, workers, **kwargs)

    with pytest.raises(ValueError, match=r"axes \('slice', 'data', 'model'\), not 'pipe'"):
        make(("slice", "pipe"))
    with pytest.raises(ValueError, match="names an axis twice"):
        make(("data", "data"))
    for nothing in ((), "", ["slice", "data"], None):
        with pytest.raises(ValueError, match="expected a mesh axis, or a tuple"):
            make(nothing)
    with pytest.raises(ValueError, match="names the worker axis 'slice'"):
        make(AXES, batch_axes=("model", "slice"))
    with pytest.raises(ValueError, match="dim 0, is sharded over the worker axis 'data'"):
        make(AXES, specs={"w": P(("model", "data"))}).init({"w": jnp.ones(8)})
    init, step = make(AXES, specs=problem.specs)
    odd = jax.tree.map(lambda x: x[:14], make_batch(0))
    with pytest.raises(ValueError, match=r"4 workers on axis \('slice', 'data'\)"):
        step(init(problem.params, 0), odd)
