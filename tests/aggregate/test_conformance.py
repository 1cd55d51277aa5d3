"""What every aggregation must do, whatever it is; the methods are listed in ``methods.py``."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jdml.sharding import make_mesh
from jdml.train import Checkpointer, make_step
from tests.aggregate.methods import METHODS
from tests.train.problems import BATCH, make_batch, pytree_problem

MESHES = {
    "one worker": {"data": 1, "model": 2},
    "data": {"data": 4},
    "data×model": {"data": 4, "model": 2},  # beside a mask
    "data×fsdp×model": {"data": 2, "fsdp": 2, "model": 2},
}
NUM_STEPS = 5  # an odd number: the last round of local steps is cut short


A_FEW = (
    "mean_gradients int8 with error feedback",
    "average_params H=2",
    "backup_workers, one missing",
    "parameter_server",
    "gossip",
    "choco",
    "adasum",
    "dgc, all sent",
)
CODECS = ("int8", "PowerSGD", "feedback")
FAST = [n for n in METHODS if n in A_FEW or not (n == "dgc" or any(c in n for c in CODECS))]
# Codecs for gradients, parameters, and over a graph; further methods send in the same ways.
COMPARED = [
    *FAST,
    "mean_gradients int8",
    "average_params int8 with error feedback",
    "choco int8",
]


def each_method(quick):
    """Compiling is what costs: a method's tests run one after the other and share its programs."""
    names = [n if n in quick else pytest.param(n, marks=pytest.mark.slow) for n in METHODS]
    return pytest.mark.parametrize("name", names, scope="module")


class Run(NamedTuple):
    mesh: Any
    problem: Any
    init: Any
    step: Any


@functools.cache
def build(name: str, mesh_name: str) -> Run:
    """One program for all tests of a method on a mesh; beside a mask on that with four workers."""
    shape = MESHES[mesh_name]
    mesh = make_mesh(shape, devices=jax.devices()[: int(np.prod(list(shape.values())))])
    problem = pytree_problem(mesh)
    axes = ("fsdp",) if "fsdp" in shape else ()
    tx = METHODS[name].make(optax.adamw(1e-2))
    if mesh_name == "data×model":
        tx = kernels_alone(METHODS[name].make(optax.sgd(0.1)))
    init, step = make_step(problem.loss_fn, tx, mesh, specs=problem.specs, batch_axes=axes)
    return Run(mesh, problem, init, step)


def kernels_alone(tx):
    def kernels(wanted):
        def mask(params):
            is_kernel = lambda path, _: ("kernel" in str(path)) == wanted  # noqa: E731
            return jax.tree_util.tree_map_with_path(is_kernel, params)

        return mask

    return optax.chain(
        optax.masked(tx, kernels(True)), optax.masked(optax.set_to_zero(), kernels(False))
    )


@functools.cache
def gradient_of(num_workers):
    loss_fn = pytree_problem(make_mesh({"data": 1}, devices=jax.devices()[:1])).loss_fn
    size = BATCH // num_workers
    grad = jax.jit(jax.grad(lambda p, b: loss_fn(p, b, None)[0]))

    def gradient(params, step, worker):
        batch = jax.tree.map(lambda x: x[worker * size : (worker + 1) * size], make_batch(step))
        return grad(params, batch)

    return gradient


def run(init, step, problem, num_steps=NUM_STEPS, first=0, state=None):
    state = init(problem.params, 0) if state is None else state
    for i in range(first, first + num_steps):
        state, metrics = step(state, make_batch(i))
    return state, metrics


def is_key(x):
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def check_numbers(name, mesh_name):
    mesh, problem, init, step = build(name, mesh_name)
    num_workers = mesh.shape["data"]
    state, _ = run(init, step, problem)
    params = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), problem.params)
    gradient = gradient_of(num_workers)
    expected = METHODS[name].reference(gradient, optax.adamw(1e-2), params, num_workers, NUM_STEPS)
    # A lone worker exchanges nothing, so no codec can touch what it has.
    atol = 1e-5 if num_workers == 1 else METHODS[name].tolerance
    for k in range(num_workers):
        for (path, x), y in zip(
            jax.tree_util.tree_leaves_with_path(state.params),
            jax.tree.leaves(expected[k]),
            strict=True,
        ):
            mine = x[k] if x.ndim > y.ndim else x
            np.testing.assert_allclose(mine, y, atol=atol, err_msg=str((k, path)))


@each_method(COMPARED)
@pytest.mark.parametrize("mesh_name", [pytest.param("one worker", marks=pytest.mark.slow), "data"])
def test_equals_its_dense_reference(name, mesh_name):
    check_numbers(name, mesh_name)


@each_method(A_FEW)
def test_equals_its_dense_reference_beside_other_axes(name):
    check_numbers(name, "data×fsdp×model")


@each_method(A_FEW)
def test_one_worker_is_the_inner_optimiser_alone(name):
    if not METHODS[name].lone_worker_is_inner:
        pytest.skip("it acts on a lone worker too")
    _, problem, init, step = build(name, "one worker")
    state, _ = run(init, step, problem)
    inner = optax.adamw(1e-2)
    params = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), problem.params)
    opt_state, gradient = inner.init(params), gradient_of(1)
    for i in range(NUM_STEPS):
        updates, opt_state = inner.update(gradient(params, i, 0), opt_state, params)
        params = optax.apply_updates(params, updates)
    for x, y in zip(jax.tree.leaves(state.params), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(np.asarray(x).reshape(y.shape), y, atol=1e-6)


@each_method(A_FEW)
def test_state_keeps_shapes_dtypes_and_shardings(name):
    _, problem, init, step = build(name, "data×fsdp×model")

    def layout(state):
        return [(x.shape, x.dtype, x.sharding, x.aval.weak_type) for x in jax.tree.leaves(state)]

    state = init(problem.params, 0)
    before = layout(state)
    assert len(before) == len(jax.tree.leaves(init.abstract(problem.params)))
    state, _ = run(init, step, problem, num_steps=2, state=state)
    assert layout(state) == before
    for x in jax.tree.leaves(state):
        assert is_key(x) or np.isfinite(np.asarray(x, np.float32)).all()


@each_method(A_FEW)
def test_a_checkpoint_holds_all_that_it_needs(name, tmp_path):
    _, problem, init, step = build(name, "data×fsdp×model")
    whole, _ = run(init, step, problem)
    half, _ = run(init, step, problem, num_steps=3)
    with Checkpointer(tmp_path / "checkpoints") as checkpointer:
        checkpointer.save(3, half, wait=True)
    with Checkpointer(tmp_path / "checkpoints") as checkpointer:
        state, _, _ = checkpointer.restore(init.abstract(problem.params))
    resumed, _ = run(init, step, problem, num_steps=NUM_STEPS - 3, first=3, state=state)
    for x, y in zip(jax.tree.leaves(whole), jax.tree.leaves(resumed), strict=True):
        if is_key(x):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_array_equal(x, y)


@each_method(A_FEW)
def test_learns_beside_a_mask(name):
    """A masked transformation sees fewer leaves, in the same places."""
    _, problem, init, step = build(name, "data×model")
    state = init(problem.params, 0)
    losses = []
    for _ in range(12):
        state, metrics = step(state, make_batch(0))
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.8 * losses[0]
    scale = np.asarray(state.params["scale"])
    np.testing.assert_array_equal(scale, np.ones_like(scale))
    moved = np.asarray(state.params["out"]["kernel"]) != np.asarray(problem.params["out"]["kernel"])
    assert moved.any()
