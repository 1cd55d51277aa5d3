"""The sharded server: it is the exact mean, its state is divided, and how often it is asked."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jdml.aggregate import average_params, mean_gradients, parameter_server
from jdml.communicate import error_feedback
from jdml.communicate.codecs import int8, power_sgd
from jdml.sharding import bytes_per_axis, collectives, make_mesh
from jdml.train import Checkpointer, make_step
from tests.train.problems import make_batch, pytree_problem

K = 4
FEEDBACK = error_feedback(int8(16))
ON_MODEL = {"data": K, "model": 2}


def build(tx, shape=ON_MODEL, workers="data"):
    """The problem of the conformance suite."""
    mesh = make_mesh(shape, devices=jax.devices()[: int(np.prod(list(shape.values())))])
    problem = pytree_problem(mesh)
    init, step = make_step(problem.loss_fn, tx, mesh, workers, specs=problem.specs)
    return mesh, problem.params, init, step


def train(tx, shape=ON_MODEL, workers="data", num_steps=4):
    _, params, init, step = build(tx, shape, workers)
    state = init(params, 0)
    for i in range(num_steps):
        state, _ = step(state, make_batch(i))
    return state


def assert_close(a, b, atol):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, atol=atol)


TARGETS = np.random.default_rng(0).normal(size=(8, K, 16)).astype(np.float32)
"""``[step, worker, element]``"""


def walk(tx, num_steps, curvature=1.0, targets=TARGETS):
    """``f_k(w) = curvature |w|² / 2 - w·target_k``, so that ``g = curvature w - target``."""
    mesh = make_mesh({"data": K}, devices=jax.devices()[:K])

    def loss_fn(params, batch, key):
        w = params["w"]
        return curvature * jnp.sum(w**2) / 2 - jnp.sum(batch * w), {}

    init, step = make_step(loss_fn, tx, mesh)
    state = init({"w": jnp.zeros(targets.shape[-1])}, 0)
    for i in range(num_steps):
        state, _ = step(state, targets[i])
    return state


@pytest.fixture(scope="module")
def synchronous():
    return {
        name: train(optax.chain(mean_gradients("data"), inner)).params
        for name, inner in INNER.items()
    }


INNER = {
    "adam": optax.adam(1e-2),
    "momentum": optax.sgd(0.1, momentum=0.9),
    # Starts from a copy of the parameters: of the worker's own slices.
    "schedule free": optax.contrib.schedule_free_sgd(0.1, b1=0.5),
}


@pytest.mark.parametrize("name", INNER)
def test_exact_and_in_every_step_it_is_the_mean_gradient(name, synchronous):
    state = train(parameter_server(INNER[name], "data"))
    assert_close(state.params, synchronous[name], 1e-6)


@pytest.mark.parametrize("axes", [("slice", "data"), ("data", "slice")])
def test_workers_on_two_axes_in_any_order(axes, synchronous):
    shape = {"slice": 2, "data": 2, "model": 2}
    state = train(parameter_server(INNER["adam"], axes), shape, axes)
    assert_close(state.params, synchronous["adam"], 1e-6)


def test_clips_by_the_norm_of_all_slices():
    inner = optax.sgd(0.1)
    clip = optax.chain(mean_gradients("data"), optax.clip_by_global_norm(0.3), inner)
    state = train(parameter_server(inner, "data", clip_norm=0.3), num_steps=2)
    assert_close(state.params, train(clip, num_steps=2).params, 1e-6)


def test_an_owner_keeps_its_part_of_the_state_where_its_shard_is():
    def bytes_per_device(tx):
        _, params, init, _ = build(tx)
        leaves = jax.tree.leaves(init.abstract(params).opt_state)
        shards = [x.sharding.shard_shape(x.shape) for x in leaves if x.shape]
        return 4 * sum(int(np.prod(shard)) for shard in shards)

    whole = bytes_per_device(optax.chain(mean_gradients("data"), optax.adam(1e-2)))
    assert whole == 2 * 4 * (8 * 16 + 16 + 16 * 4) / 2  # over two devices of the model axis
    assert bytes_per_device(parameter_server(optax.adam(1e-2), "data")) == whole / K


def test_a_leaf_is_cut_along_the_first_dim_that_can_be_or_stays_whole():
    shapes = {"first": (8, 3), "last": (3, 16), "middle": (5, 4, 3), "whole": (3, 2)}
    mesh = make_mesh({"data": K}, devices=jax.devices()[:K])
    rng = np.random.default_rng(1)
    batch = {name: rng.normal(size=(K, *s)).astype(np.float32) for name, s in shapes.items()}

    def loss_fn(params, batch, key):
        return sum(jnp.sum(params[name] * batch[name]) for name in shapes), {}

    init, step = make_step(loss_fn, parameter_server(optax.sgd(1.0, 0.9), "data"), mesh)
    state, _ = step(init({name: jnp.zeros(s) for name, s in shapes.items()}, 0), batch)
    for name, x in state.params.items():
        np.testing.assert_allclose(x, -batch[name].mean(0), atol=1e-6, err_msg=name)
    trace = {name: x.shape for name, x in state.opt_state.inner[0].trace.items()}
    assert trace == {
        "first": (K, 2, 3),
        "last": (K, 3, 4),
        "middle": (K, 5, 1, 3),
        "whole": (3, 2),
    }


def test_sends_what_a_ring_all_reduce_does_and_a_quarter_in_int8():
    size = 1 << 16
    targets = np.zeros((1, K, size), np.float32)

    def sent(tx):
        mesh = make_mesh({"data": K}, devices=jax.devices()[:K])
        init, step = make_step(lambda p, batch, key: (jnp.sum(p["w"] * batch), {}), tx, mesh)
        state = init.abstract({"w": jnp.zeros(size)})
        compiled = step.lower(state, targets[0]).compile()
        sent = bytes_per_axis(collectives(compiled, mesh))[("data",)]
        return sent, compiled.memory_analysis()

    loss = 2 * 4 * (K - 1) / K  # its mean, as everywhere
    adam = optax.adam(1e-2)
    exact, memory = sent(parameter_server(adam, "data"))
    assert exact == 2 * 4 * size * (K - 1) / K + loss
    # The parameters, two moments of which a quarter is here, batch, counters.
    slack = memory.argument_size_in_bytes - 4 * size * (1 + 2 / K + 1)
    assert 0 <= slack < 100
    coded, _ = sent(parameter_server(adam, "data", int8(), int8()))
    assert 260 / 1024 <= coded / exact <= 0.255  # a scale for 256 codes; whole lines


@pytest.mark.slow
def test_nothing_else_goes_over_the_model_axis():
    def over_model(tx):
        mesh, params, init, step = build(tx)
        compiled = step.lower(init.abstract(params), make_batch(0)).compile()
        return bytes_per_axis(collectives(compiled, mesh))[("model",)]

    inner = INNER["adam"]
    expected = over_model(optax.chain(mean_gradients("data"), inner))
    server = parameter_server(inner, "data", FEEDBACK, FEEDBACK)
    assert over_model(server) == expected


def test_int8_errs_by_half_a_step_on_either_way():
    state = walk(parameter_server(optax.sgd(1.0), "data", int8(16), int8(16)), 1)
    exact = TARGETS[0].mean(0)
    pushed = np.abs(TARGETS[0]).max() / 254 * (K - 1) / K
    error = np.abs(np.asarray(state.params["w"]) - exact)
    assert 0 < error.max() <= pushed + (np.abs(exact).max() + pushed) / 254


@pytest.mark.parametrize("every", [pytest.param((1, 1), marks=pytest.mark.slow), (2, 3)])
def test_error_feedback_loses_nothing(every):
    """Model, what the pulls owe and what the pushes owe add up to the exact model."""
    num_steps = 6
    tx = parameter_server(optax.sgd(0.5), "data", FEEDBACK, FEEDBACK, *every)
    state = walk(tx, num_steps, curvature=0.0)
    push, pull = state.opt_state.residual
    assert np.abs(push["w"]).max() > 1e-4
    assert np.abs(pull["w"]).max() > 1e-5
    owed_by_owners = np.asarray(pull["w"]).T.reshape(-1)  # worker k owns elements k, k + K, …
    owed_by_workers = -0.5 * np.asarray(push["w"]).mean(0)
    exact = 0.5 * TARGETS[:num_steps].mean(1).sum(0)
    known = np.asarray(state.params["w"])
    np.testing.assert_allclose(known + owed_by_owners + owed_by_workers, exact, atol=1e-6)


def test_in_step_with_plain_sgd_on_both_sides_it_is_local_sgd():
    server = parameter_server(
        optax.sgd(0.1), "data", push_every=3, pull_every=3, local=optax.sgd(0.1)
    )
    local = optax.chain(optax.sgd(0.1), average_params("data", 3))
    for num_steps in (5, 6):
        assert_close(walk(server, num_steps).params, walk(local, num_steps).params, 1e-6)


def test_a_push_now_and_then_is_a_step_on_the_sum_of_the_gradients():
    """And between pulls gradients are those of the parameters that were pulled last."""
    rate, momentum, num_steps = 0.1, 0.9, 8
    inner = optax.sgd(rate, momentum)
    for push_every, pull_every in ((2, 1), (1, 2), (3, 2)):
        known = server = trace = accrued = np.zeros(16, np.float32)
        for t in range(1, num_steps + 1):
            accrued = accrued + known - TARGETS[t - 1].mean(0)
            if t % push_every == 0:
                trace = momentum * trace + accrued
                server, accrued = server - rate * trace, np.zeros_like(accrued)
            if t % pull_every == 0:
                known = server
        tx = parameter_server(inner, "data", push_every=push_every, pull_every=pull_every)
        state = walk(tx, num_steps)
        assert state.params["w"].shape == (16,)  # one model, stored once
        np.testing.assert_allclose(state.params["w"], known, atol=1e-5)


def test_a_pull_of_nothing_new_is_left_out():
    server = parameter_server(optax.sgd(0.1), "data", push_every=3, pull_every=2)
    taken = [walk(server, t).opt_state.metrics["branch.parameter_server.pull"] for t in (2, 4, 6)]
    assert [float(x) for x in taken] == [0, 1, 1]


def test_another_number_of_workers_is_refused_and_the_parameters_can_be_taken_along(tmp_path):
    state = walk(parameter_server(optax.adam(1e-2), "data"), 2)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(2, state, wait=True)
        mesh = make_mesh({"data": 2}, devices=jax.devices()[:2])
        tx = parameter_server(optax.adam(1e-2), "data")
        init, _ = make_step(lambda p, batch, key: (jnp.sum(p["w"] * batch), {}), tx, mesh)
        with pytest.raises(
            ValueError, match=r"mu/w': saved float32\[4, 4\], given float32\[2, 8\]"
        ):
            checkpointer.restore(init.abstract({"w": jnp.zeros(16)}))
    again = init(jax.tree.map(np.asarray, state.params), 0)
    np.testing.assert_array_equal(again.params["w"], state.params["w"])


@pytest.mark.slow
def test_a_checkpoint_goes_on_beside_other_axes(tmp_path):
    tx = parameter_server(INNER["momentum"], "data")
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(3, train(tx, num_steps=3), wait=True)
        _, params, init, step = build(tx, {"data": K})
        state = checkpointer.restore(init.abstract(params)).state
    state, _ = step(state, make_batch(3))
    assert_close(state.params, train(tx, {"data": K}, num_steps=4).params, 1e-6)


MIXING = {
    "clipped": optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1)),
    "adafactor": optax.adafactor(1e-2, min_dim_size_to_factor=4),
    "muon": optax.contrib.muon(1e-2),
    "lamb": optax.lamb(1e-2),
    "finite only": optax.apply_if_finite(optax.sgd(0.1), 3),
    "masked": optax.masked(optax.lars(1e-2), lambda p: jax.tree.map(lambda x: x.ndim > 1, p)),
}
ELEMENTWISE = {
    "adamw": optax.adamw(optax.cosine_decay_schedule(1e-2, 10)),
    "lion": optax.lion(1e-3),
    "injected": optax.inject_hyperparams(optax.rmsprop)(1e-2),
    "nadam": optax.nadam(1e-3),
    "by shape": optax.multi_transform(
        {"matrix": optax.adam(1e-3), "rest": optax.sgd(0.1)},
        lambda p: jax.tree.map(lambda x: "matrix" if x.ndim > 1 else "rest", p),
    ),
}


@pytest.mark.parametrize("name", MIXING)
def test_refuses_what_must_see_whole_leaves(name):
    _, params, init, _ = build(parameter_server(MIXING[name], "data"))
    with pytest.raises(ValueError, match=r"not elementwise.*clip_norm=.*mean_gradients"):
        init.abstract(params)


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_takes_what_acts_on_each_element(name):
    _, params, init, _ = build(parameter_server(ELEMENTWISE[name], "data"))
    init.abstract(params)


def test_takes_one_that_sums_over_the_workers_itself():
    def update(updates, state, params=None):
        total = sum(jnp.sum(g**2) for g in jax.tree.leaves(updates))
        norm = jnp.sqrt(jax.lax.psum(total, "data"))
        return jax.tree.map(lambda g: -g / norm, updates), state

    inner = optax.GradientTransformation(lambda params: optax.EmptyState(), update)
    state = walk(parameter_server(inner, "data"), 1)
    np.testing.assert_allclose(np.linalg.norm(state.params["w"]), 1, rtol=1e-6)


def test_a_lone_worker_may_use_any_optimiser():
    _, params, init, _ = build(parameter_server(MIXING["muon"], "data"), {"data": 1, "model": 2})
    init.abstract(params)


def test_refuses_what_cannot_work():
    sgd = optax.sgd(0.1)
    for way in ("push", "pull"):
        with pytest.raises(ValueError, match=rf"{way}=.*mean_gradients.* takes PowerSgd"):
            parameter_server(sgd, "data", **{way: power_sgd(2)})
        with pytest.raises(ValueError, match="forget to call the factory"):
            parameter_server(sgd, "data", **{way: int8})
        for every in (0, True, 1.5):
            with pytest.raises(ValueError, match=rf"{way}_every=.*int >= 1"):
                parameter_server(sgd, "data", **{f"{way}_every": every})
    with pytest.raises(ValueError, match="lasts until the next pull"):
        parameter_server(sgd, "data", local=sgd)
    with pytest.raises(ValueError, match="norm > 0"):
        parameter_server(sgd, "data", clip_norm=0.0)
    with pytest.raises(ValueError, match="'data' is not bound here"):
        parameter_server(sgd, "data").init({"w": jnp.zeros(4)})
