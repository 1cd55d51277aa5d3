"""``make_step(zero=...)``: the same numbers, less of the state on each device."""

import jax
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from jdml.aggregate import average_params, mean_gradients
from jdml.communicate import error_feedback
from jdml.communicate.codecs import int8
from jdml.sharding import collectives, make_mesh
from jdml.train import make_step
from tests.train.problems import make_batch, pytree_problem

WORKERS = {"one worker": {"data": 1, "fsdp": 8}, "two": {"data": 2, "fsdp": 4}}
CHAINS = {
    "exact": lambda: optax.chain(mean_gradients("data"), optax.adam(1e-2)),
    "int8": lambda: optax.chain(mean_gradients("data", error_feedback(int8(16))), optax.adam(1e-2)),
    "local": lambda: optax.chain(optax.adam(1e-2), average_params("data", every=2)),
}


def build(mesh, chain, zero, accumulate=1):
    problem = pytree_problem(mesh)
    whole = jax.tree.map(lambda _: P(), problem.params)
    init, step = make_step(
        problem.loss_fn,
        CHAINS[chain](),
        mesh,
        specs=whole,
        batch_axes=("fsdp",),
        zero=zero,
        accumulate=accumulate,
    )
    return init(problem.params, 0), step


def whole_bytes(tree):
    return sum(x.nbytes for x in jax.tree.leaves(tree))


def device_bytes(tree):
    return sum(
        x.dtype.itemsize * np.prod(x.sharding.shard_shape(x.shape), dtype=int)
        for x in jax.tree.leaves(tree)
    )


@pytest.mark.parametrize(
    ("chain", "workers"),
    [
        pytest.param("exact", "one worker", marks=pytest.mark.slow),
        pytest.param("int8", "two", marks=pytest.mark.slow),
        ("local", "two"),
    ],
)
def test_every_stage_gives_the_numbers_of_stage_0(chain, workers):
    mesh = make_mesh(WORKERS[workers])
    found = []
    for zero in (0, 1, 2, 3):
        state, step = build(mesh, chain, zero)
        for i in range(3):
            state, _ = step(state, make_batch(i))
        found.append(jax.tree.map(np.asarray, step.consensus(state)[0]))
    # int8's blocks are of a slice or of the whole: another rounding, held by its step.
    atol = 2e-2 if chain == "int8" else 1e-6
    for other in found[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol), other, found[0])


@pytest.mark.slow
@pytest.mark.parametrize("zero", [1, 2, 3])
def test_accumulated_gradients_are_exchanged_once(zero):
    """Two micro-batches of a worker: int8 says of their mean what it says of the whole batch."""
    mesh, found, sent = make_mesh(WORKERS["two"]), {}, {}
    for accumulate in (1, 2):
        state, step = build(mesh, "int8", zero, accumulate)
        compiled = step.lower(state, make_batch(0)).compile()
        sent[accumulate] = [
            (c.kind, c.dtype, c.sent_bytes, c.count)
            for c in collectives(compiled, mesh)
            if c.axes == ("data",)
        ]
        state, _ = step(state, make_batch(0))
        found[accumulate] = jax.tree.map(np.asarray, state.params)
    assert sorted(sent[2]) == sorted(sent[1])
    # One step of Adam is at most its rate; a code that rounding tips over changes less.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5e-3), found[2], found[1])


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_what_a_device_holds(zero):
    mesh = make_mesh(WORKERS["one worker"])
    state, _ = build(mesh, "exact", zero)
    for tree, divided in ((state.opt_state, zero >= 1), (state.params, zero == 3)):
        share = device_bytes(tree) / whole_bytes(tree)
        assert share < 1 / 4 if divided else share == 1


def test_workers_exchange_their_slices():
    """Summed exactly inside a worker, then each device sends its part of the gradient as int8."""
    mesh = make_mesh(WORKERS["two"])
    sent = {}
    for zero in (0, 2):
        state, step = build(mesh, "int8", zero)
        compiled = step.lower(state, make_batch(0)).compile()
        sent[zero] = sum(c.sent_bytes for c in collectives(compiled, mesh) if c.axes == ("data",))
    assert sent[2] < sent[0] / 2  # 1/4, less what is filled up to a block


@pytest.mark.parametrize(
    ("zero", "axes", "message"),
    [(4, ("fsdp",), "expected 0, 1, 2 or 3"), (1, (), "batch_axes, which is empty")],
)
def test_refused(zero, axes, message):
    with pytest.raises(ValueError, match=message):
        make_step(
            lambda *_: None, optax.sgd(1.0), make_mesh(WORKERS["two"]), batch_axes=axes, zero=zero
        )
