"""Workers with a loss and an Optax chain of their own, in JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jdml.aggregate import average_params, consensus_admm
from jdml.communicate.pace import (
    AdmmWorker,
    ElasticWorker,
    OptaxTask,
    Rule,
    Server,
    SgdWorker,
    VirtualClock,
    async_admm,
    average,
    simulate,
    synchronous,
)
from jdml.sharding import make_mesh
from jdml.train import make_step

K = 4
EVERY = 3
TX = optax.sgd(0.1, momentum=0.9)
DRAWS = np.random.default_rng(0)
X = DRAWS.standard_normal((60, K, 8, 5)).astype(np.float32)
Y = X @ np.arange(5, dtype=np.float32) + DRAWS.standard_normal((60, K, 8)).astype(np.float32)
TIMES = DRAWS.lognormal(0.0, 0.7, (64, K))


def loss_fn(params, batch, key):
    x, y = batch
    return jnp.mean((x @ params["w"] - y) ** 2), {}


def task():
    return OptaxTask(loss_fn, TX, lambda worker, index: (X[index, worker], Y[index, worker]))


def in_virtual_time(rule, workers, rounds):
    server = Server({"w": np.zeros(5, np.float32)}, rule, K, now=VirtualClock())
    simulate(server, workers, TIMES, num_versions=rounds)
    return server


def in_lockstep(tx, num_steps):
    mesh = make_mesh({"data": K}, devices=jax.devices()[:K])
    init, step = make_step(loss_fn, tx, mesh)
    state = init({"w": jnp.zeros(5)}, 0)
    for t in range(num_steps):
        state, _ = step(state, (X[t].reshape(-1, 5), Y[t].reshape(-1)))
    return state


def test_synchronous_local_steps_are_average_params():
    """Local SGD whose momentum stays local: the same in lockstep and in virtual time."""
    workers = [SgdWorker(k, task_, push_every=EVERY) for task_ in [task()] for k in range(K)]
    server = in_virtual_time(Rule(synchronous(), average()), workers, 4)
    state = in_lockstep(optax.chain(TX, average_params("data", every=EVERY)), 4 * EVERY)
    expected = np.asarray(state.params["w"])[0]
    np.testing.assert_allclose(server.params["w"], expected, rtol=1e-5, atol=1e-6)


def test_synchronous_admm_is_consensus_admm():
    workers = [AdmmWorker(k, task_, EVERY, 0.7) for task_ in [task()] for k in range(K)]
    server = in_virtual_time(async_admm(K, 1, 0.7), workers, 4)
    state = in_lockstep(consensus_admm(TX, "data", 0.7, EVERY), 4 * EVERY)
    z = optax.tree.get(state.opt_state, "z")["w"]
    np.testing.assert_allclose(server.params["w"], z, rtol=1e-4, atol=1e-5)


def test_keys_differ_by_worker_and_step():
    seen = OptaxTask(
        lambda params, batch, key: (params["w"] * jax.random.normal(key), {}),
        optax.identity(),
        lambda worker, index: (),
    )
    params = {"w": np.float32(0)}
    draws = {
        float(seen.step(k, params, seen.init(k, params), t)[0]["w"])
        for k in range(3)
        for t in range(3)
    }
    assert len(draws) == 9


def test_refuses_what_cannot_work():
    with pytest.raises(ValueError, match="alpha"):
        ElasticWorker(0, task(), 1, 1.0)
    with pytest.raises(ValueError, match="rho"):
        AdmmWorker(0, task(), 1, 0.0)
