"""A run that does not run in lockstep, saved and resumed as a whole."""

import json
import warnings

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jdml.communicate.codecs import one_bit
from jdml.communicate.error_feedback import error_feedback
from jdml.communicate.pace import (
    AdmmWorker,
    ElasticWorker,
    OptaxTask,
    Rule,
    Server,
    SgdWorker,
    ShardedServer,
    VirtualClock,
    add,
    async_admm,
    asynchronous,
    average,
    dc_asgd_adaptive,
    delayed_nesterov,
    elastic_centre,
    log_normal,
    optimise,
    run_threads,
    simulate,
    stale_synchronous,
    synchronous,
)
from jdml.communicate.pace.whole import load_whole_state, whole_state
from jdml.train.checkpoint import Checkpointer, CheckpointWarning
from jdml.train.pace import load_run, save_run
from jdml.train.saving.pack import pack, unpack
from tests.communicate.pace.problems import Quadratic, start

K = 3
TIMES = log_normal(0.5)
FEEDBACK = error_feedback(one_bit(block=8))


def sgd(k, task):
    return SgdWorker(k, task)


METHODS = {
    "sgd": (Rule(synchronous(), average()), sgd, {}),
    "push 3, fetch 2": (
        Rule(synchronous(), average()),
        lambda k, task: SgdWorker(k, task, 3, 2),
        {},
    ),
    "error feedback": (Rule(synchronous(), average()), sgd, {"push": FEEDBACK}),
    "delayed nesterov": (
        Rule(synchronous(), delayed_nesterov(0.7, 0.9, buffer_size=4)),
        sgd,
        {},
    ),
    "dc-asgd": (Rule(synchronous(), dc_asgd_adaptive(0.1)), sgd, {"gradients": True}),
    "elastic": (
        Rule(synchronous(), elastic_centre(0.3)),
        lambda k, task: ElasticWorker(k, task, 2, 0.3),
        {},
    ),
    "admm": (async_admm(K, 1), lambda k, task: AdmmWorker(k, task, 2, 1.0), {}),
    "two servers": (Rule(synchronous(), average()), sgd, {"num_servers": 2, "push": FEEDBACK}),
}


def saved_and_read(server, workers, new_server, new_workers):
    """Through the bytes that a checkpoint holds, without the checkpoint."""
    outline, data = pack(whole_state(server, workers))
    state = unpack(json.loads(json.dumps(outline)), data)
    load_whole_state(new_server, new_workers, state)


def fresh(method, num_workers=K, **options):
    """A new server and new workers, that have forgotten all."""
    rule, worker, settings = METHODS[method]
    if method == "admm":
        rule = async_admm(num_workers, 1)
    task = Quadratic(max(num_workers, K), 8, noise=0.1, gradients=settings.get("gradients", False))
    options = {"now": VirtualClock(), "push": settings.get("push")} | options
    if "num_servers" in settings:
        server = ShardedServer(start(8), rule, num_workers, settings["num_servers"], **options)
    else:
        server = Server(start(8), rule, num_workers, **options)
    return server, [worker(k, task) for k in range(num_workers)]


@pytest.mark.parametrize("method", METHODS)
def test_resumed_in_lockstep_is_not_interrupted_bit_for_bit(method):
    whole, workers = fresh(method)
    simulate(whole, workers, TIMES, num_versions=20)

    first, workers = fresh(method)
    simulate(first, workers, TIMES, virtual_seconds=18.3)  # within a round
    assert 2 < first.version < 17
    second, others = fresh(method)
    saved_and_read(first, workers, second, others)
    assert float(second.now()) == 18.3
    simulate(first, workers, TIMES, num_versions=20)
    simulate(second, others, TIMES, num_versions=20)
    for server in (first, second):
        np.testing.assert_array_equal(server.params["w"], whole.params["w"])
    assert second.traffic.pushes == whole.traffic.pushes


def loss_fn(params, batch, key):
    return jnp.mean((params["w"] - batch) ** 2), {}


def test_optimisers_of_worker_and_server_through_a_checkpoint(tmp_path):
    """Adam at the workers, momentum at the server: moments and counters go on."""
    draws = np.random.default_rng(0).standard_normal((40, 2, 4)).astype(np.float32)
    task = OptaxTask(loss_fn, optax.adam(0.1), lambda worker, index: draws[index, worker])

    def one():
        rule = Rule(synchronous(), optimise(optax.sgd(0.5, momentum=0.9)))
        server = Server({"w": np.zeros(4, np.float32)}, rule, 2, now=VirtualClock())
        return server, [SgdWorker(k, task) for k in range(2)]

    whole, workers = one()
    simulate(whole, workers, TIMES, num_versions=12)
    first, workers = one()
    simulate(first, workers, TIMES, num_versions=5)
    with Checkpointer(tmp_path) as checkpointer:
        assert save_run(checkpointer, first, workers, wait=True) == 5
        second, workers = one()
        assert load_run(checkpointer, second, workers) == 5
    simulate(second, workers, TIMES, num_versions=12)
    np.testing.assert_array_equal(second.params["w"], whole.params["w"])
    assert [int(w._state[0].count) for w in workers] == [12, 12]


class Remembering(Quadratic):
    """Its samples come from a generator that it keeps for each worker."""

    def __init__(self):
        super().__init__(K)
        self.positions = np.zeros(K, np.int64)

    def gradient(self, worker, w, index):
        self.positions[worker] += 1
        noise = np.random.default_rng([worker, self.positions[worker]])
        return super().gradient(worker, w, index) + 0.1 * noise.standard_normal(w.shape)

    def state(self, worker):
        return {"position": self.positions[worker].copy()}

    def load_state(self, worker, state):
        self.positions[worker] = state["position"]


def test_a_sampler_that_remembers_is_saved_and_not_moved_by_a_rehearsal():
    def one():
        task = Remembering()
        server = Server(start(), Rule(synchronous(), average()), K, now=VirtualClock())
        return server, [SgdWorker(k, task) for k in range(K)], task

    whole, workers, _ = one()
    simulate(whole, workers, TIMES, num_versions=12)
    first, workers, _ = one()
    simulate(first, workers, TIMES, num_versions=5)
    second, others, task = one()
    saved_and_read(first, workers, second, others)
    workers = others
    assert task.positions.tolist() == [5] * K
    for worker in workers:
        worker.rehearse(second.params)
    assert task.positions.tolist() == [5] * K
    simulate(second, workers, TIMES, num_versions=12)
    np.testing.assert_array_equal(second.params["w"], whole.params["w"])


@pytest.mark.parametrize("num_workers", [1, 2, 5])
@pytest.mark.parametrize("method", ["error feedback", "admm", "two servers"])
def test_on_another_number_of_workers(method, num_workers):
    """It goes on towards the new workers' own optimum; what was owed is still owed."""
    first, workers = fresh(method)
    simulate(first, workers, TIMES, virtual_seconds=11.3)
    owed = [worker.residual for worker in workers]
    second, others = fresh(method, num_workers)
    saved_and_read(first, workers, second, others)
    workers, version = others, first.version
    assert version == second.version
    np.testing.assert_array_equal(second.params["w"], first.params["w"])
    if method != "admm":
        before = sum(r[0] for r in owed)
        after = sum(w.residual[0] for w in workers if w.residual is not None)
        np.testing.assert_allclose(after, before, rtol=1e-12)
        assert np.any(before)
    assert sorted(second.members()) == list(range(min(num_workers, K)))
    done = simulate(second, workers, TIMES, num_versions=version + 60)
    assert sorted(second.members()) == list(range(num_workers))
    assert (done.computing_virtual_seconds > 0).all()
    task = workers[0].task
    curvature, target = task.curvature[:num_workers], task.target[:num_workers]
    optimum = (curvature * target).sum(0) / curvature.sum(0)
    start_distance = np.linalg.norm(optimum)
    assert np.linalg.norm(second.params["w"] - optimum) < 0.35 * start_distance


def test_threads_go_on_from_what_virtual_time_began():
    """Asynchronously it is not the same run, but no update is lost or applied twice."""

    def one(**options):
        applied = []
        rule = Rule(stale_synchronous(2), add(1 / K))
        server = Server(start(), rule, K, on_applied=applied.append, **options)
        return server, [SgdWorker(k, Quadratic(K)) for k in range(K)], applied

    first, workers, before = one(now=VirtualClock())
    simulate(first, workers, TIMES, num_versions=20)
    second, others, after = one()
    saved_and_read(first, workers, second, others)
    run_threads(second, others, num_versions=40)
    seen = [(a.worker, a.clock) for a in before + after]
    assert len(set(seen)) == len(seen)
    for k in range(K):
        clocks = [clock for worker, clock in seen if worker == k]
        assert clocks == list(range(len(clocks)))
    assert max(a.staleness for a in after) <= 2


def test_a_damaged_checkpoint_is_passed_over(tmp_path):
    server, workers = fresh("sgd")
    with Checkpointer(tmp_path) as checkpointer:
        for version in (5, 10):
            simulate(server, workers, TIMES, num_versions=version)
            save_run(checkpointer, server, workers, wait=True)
    largest = max((tmp_path / "10").rglob("*"), key=lambda p: p.stat().st_size * p.is_file())
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    second, workers = fresh("sgd")
    with Checkpointer(tmp_path) as checkpointer, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert load_run(checkpointer, second, workers) == 5
    assert any(issubclass(w.category, CheckpointWarning) for w in caught)


def test_refused(tmp_path):
    server, workers = fresh("sgd")
    simulate(server, workers, TIMES, num_versions=3)
    with Checkpointer(tmp_path) as checkpointer:
        save_run(checkpointer, server, workers, wait=True)
        with pytest.raises(ValueError, match="ascend"):
            save_run(checkpointer, server, workers)
        other = Server(start(7), Rule(synchronous(), average()), K, now=VirtualClock())
        with pytest.raises(ValueError, match=r"leaf 'w' was saved as float64\[8\]"):
            load_run(checkpointer, other, workers)
        momentum = Rule(synchronous(), delayed_nesterov(0.7))
        other = Server(start(8), momentum, K, now=VirtualClock())
        with pytest.raises(ValueError, match="another rule"):
            load_run(checkpointer, other, workers)
        with pytest.raises(ValueError, match="saved by 1 server"):
            load_run(checkpointer, fresh("two servers")[0], workers)
        other = Server(start(8), Rule(asynchronous(), add()), K, now=VirtualClock())
        elastic = [ElasticWorker(k, Quadratic(K), 1, 0.5) for k in range(K)]
        with pytest.raises(ValueError, match=r"another kind of worker, .*without \['exchanged"):
            load_run(checkpointer, other, elastic)
