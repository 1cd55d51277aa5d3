"""Computation parallelism: every worker sees all the data and the whole model of one machine.

The same sources, online and offline, drive Hogwild's threads, workers that wait for each other
round by round, and the compiled step on a mesh.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jdml.aggregate import mean_gradients
from jdml.communicate.pace import (
    OptaxTask,
    Rows,
    Rule,
    Server,
    SgdWorker,
    Task,
    average,
    hogwild,
    run_threads,
    synchronous,
)
from jdml.partition.sources import Offline, Online, gaussian_logistic
from jdml.sharding import make_mesh
from jdml.train import make_step

TRUTH = np.array([1.5, -1.0, 0.5, 0.0, -0.5], np.float32)
NUM_WORKERS, BATCH, RIDGE = 4, 16, 0.01
ONLINE = Online(gaussian_logistic(TRUTH, BATCH), seed=1)
DATA = jax.tree.map(np.asarray, Online(gaussian_logistic(TRUTH, 2000), seed=2)(0, 0))
OFFLINE = Offline(DATA, BATCH, NUM_WORKERS, seed=3, draws="replacement")
START = {"w": np.zeros(5, np.float32)}


def loss_fn(params, batch, key):
    margins = batch["y"] * (batch["x"] @ params["w"])
    return jnp.mean(jnp.logaddexp(0, -margins)) + RIDGE / 2 * jnp.sum(params["w"] ** 2), {}


def objective(w, data):
    """Of the empirical or of a large sample of the expected loss, and its gradient, in f64."""
    x, y, w = (np.asarray(a, np.float64) for a in (data["x"], data["y"], w))
    margins = y * (x @ w)
    slope = -y / (1 + np.exp(margins))
    value = np.mean(np.logaddexp(0, -margins)) + RIDGE / 2 * w @ w
    return value, x.T @ slope / len(y) + RIDGE * w


def optimum(data):
    """By Newton's method, to a gradient of 1e-10."""
    x, w = np.asarray(data["x"], np.float64), np.zeros(5)
    for _ in range(30):
        _, gradient = objective(w, data)
        p = 1 / (1 + np.exp(-x @ w))
        w = w - np.linalg.solve((x.T * (p * (1 - p))) @ x / len(x) + RIDGE * np.eye(5), gradient)
    assert np.linalg.norm(objective(w, data)[1]) < 1e-10
    return w


# What online draws minimise, but for the error of a sample of 40,000.
EXPECTED = jax.tree.map(np.asarray, Online(gaussian_logistic(TRUTH, 100_000), seed=9)(0, 0))


@pytest.mark.parametrize(
    ("source", "data"), [(ONLINE, EXPECTED), (OFFLINE, DATA)], ids=["online", "offline"]
)
def test_hogwild_reaches_the_neighbourhood_of_the_optimum(source, data):
    """The excess falls to what steps of 0.1 with batches of 16 leave: about a hundredth."""
    task = OptaxTask(loss_fn, optax.sgd(0.1), source)
    done = hogwild(START, task, NUM_WORKERS, num_steps=200)
    best, _ = objective(optimum(data), data)
    excess = objective(done.params["w"], data)[0] - best
    assert 0 <= excess < 0.05 * (objective(START["w"], data)[0] - best)
    assert done.num_steps.tolist() == [200] * NUM_WORKERS


class SparseLogistic(Task):
    """NumPy steps on single rows of shared arrays, which read and write a few elements in place."""

    def __init__(self, source):
        self.source = source

    def init(self, worker, params):
        return ()

    def step(self, worker, params, state, index, towards=None):
        one = self.source(worker, index)
        x, y = one["x"][0], one["y"][0]
        touched = np.flatnonzero(x)
        slope = -y / (1 + np.exp(y * (x[touched] @ params["w"][touched])))
        return {"w": Rows(touched, -0.5 * slope * x[touched])}, state, 0.0


def test_threads_share_the_arrays_and_the_model_itself():
    """Sparse rows drawn from one array, the model read where it stands: Hogwild as it was meant."""
    random = np.random.default_rng(5)
    x = random.standard_normal((1000, 60)) * (random.random((1000, 60)) < 0.05)
    w = 2 * random.standard_normal(60)
    y = np.where(x @ w + 0.3 * random.logistic(size=1000) > 0, 1.0, -1.0)
    source = Offline({"x": x, "y": y}, 1, NUM_WORKERS, draws="local")
    done = hogwild(
        {"w": np.zeros(60)}, SparseLogistic(source), NUM_WORKERS, num_steps=2000, copy=False
    )

    def value(w):
        return np.mean(np.logaddexp(0, -y * (x @ w)))

    assert value(done.params["w"]) < 0.65 * value(np.zeros(60))
    assert np.mean((x @ done.params["w"]) * y > 0) > 0.8 * np.mean((x @ w) * y > 0)


@pytest.mark.parametrize("source", [ONLINE, OFFLINE], ids=["online", "offline"])
def test_in_lock_step_threads_and_the_compiled_step_agree(source):
    """Workers that wait for each other, each round the mean of the same draws, on both ways."""
    num_steps = 30
    task = OptaxTask(loss_fn, optax.sgd(0.2), source)
    server = Server(START, Rule(synchronous(), average()), NUM_WORKERS)
    workers = [SgdWorker(k, task) for k in range(NUM_WORKERS)]
    run_threads(server, workers, num_versions=num_steps)
    assert server.version == num_steps

    mesh = make_mesh({"data": NUM_WORKERS}, devices=jax.devices()[:NUM_WORKERS])
    tx = optax.chain(mean_gradients("data"), optax.sgd(0.2))
    init, step = make_step(loss_fn, tx, mesh)
    state = init(jax.tree.map(jnp.asarray, START), 0)
    batches = source.batches(mesh)
    for _ in range(num_steps):
        state, _ = step(state, next(batches))
    np.testing.assert_allclose(server.params["w"], state.params["w"], atol=1e-5)
    assert np.linalg.norm(server.params["w"]) > 0.5
