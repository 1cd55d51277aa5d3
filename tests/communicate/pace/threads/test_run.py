"""Workers in threads: the same as in virtual time, and really at the same time."""

import signal
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

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
    Task,
    VirtualClock,
    add,
    async_admm,
    asynchronous,
    average,
    constant,
    elastic_centre,
    run_threads,
    simulate,
    stale_synchronous,
    synchronous,
)
from jdml.sharding import make_mesh
from tests.communicate.pace.problems import Quadratic, sgd_workers, start

K = 3


EVEN = np.ones((1, K))


def run(rule, workers=None, params=None, **options):
    """``(server, what the run says, every applied update, workers)``."""
    applied = []
    workers = sgd_workers(Quadratic(K, noise=0.1), K) if workers is None else workers
    server = Server(
        start() if params is None else params,
        rule,
        len(workers),
        on_applied=applied.append,
        push=options.pop("push", None),
    )
    return server, run_threads(server, workers, **options), applied, workers


def threads_alive():
    return [t.name for t in threading.enumerate() if t.name.startswith("worker")]


METHODS = {
    "sgd": (Rule(synchronous(), average()), lambda task, k: SgdWorker(k, task)),
    "push 2, fetch 3": (Rule(synchronous(), average()), lambda task, k: SgdWorker(k, task, 2, 3)),
    "elastic": (
        Rule(synchronous(), elastic_centre(0.3)),
        lambda task, k: ElasticWorker(k, task, 2, 0.3),
    ),
    "admm": (async_admm(K, 1), lambda task, k: AdmmWorker(k, task, 2, 1.0)),
}


@pytest.mark.parametrize("method", METHODS)
def test_lockstep_is_what_it_is_in_virtual_time_also_in_two_runs(method):
    rule, worker = METHODS[method]

    def workers():
        task = Quadratic(K, noise=0.1)
        return [worker(task, k) for k in range(K)]

    simulated = Server(start(), rule, K, now=VirtualClock())
    simulate(simulated, workers(), EVEN, num_versions=12)
    server, _, _, crew = run(rule, workers(), num_versions=7)
    assert server.version == 7
    run_threads(server, crew, num_versions=12)
    assert server.version == 12
    np.testing.assert_array_equal(server.params["w"], simulated.params["w"])
    assert not threads_alive()


def test_several_servers_are_one_in_lockstep():
    rule, task = Rule(synchronous(), average()), Quadratic(K, 8, noise=0.1)
    one = Server(start(8), rule, K)
    run_threads(one, sgd_workers(task, K), num_versions=12)
    several = ShardedServer(start(8), rule, K, 3)
    done = run_threads(several, sgd_workers(task, K), num_versions=12)
    np.testing.assert_array_equal(several.params["w"], one.params["w"])
    assert (done.num_pushes >= 12).all()


@pytest.mark.parametrize("staleness", [0, 1, 4])
def test_nobody_is_farther_ahead_than_the_bound_and_no_update_is_applied_twice(staleness):
    _, done, applied, _ = run(
        Rule(stale_synchronous(staleness), add(1 / K)),
        num_versions=60,
        slow_down=np.array([[0.0, 0.0, 0.002]]),
    )
    assert max(a.staleness for a in applied) <= staleness
    assert len({(a.worker, a.clock) for a in applied}) == len(applied)
    assert done.num_pushes.sum() >= len(applied)


def test_a_slow_worker_does_not_hold_the_others():
    _, done, _, _ = run(
        Rule(asynchronous(), add(1 / K)), seconds=0.6, slow_down=constant(0.005, {2: 40.0})
    )
    assert done.num_steps[2] <= 4
    # 40 times as many, less what a busy machine adds to the sleep of the fast.
    assert min(done.num_steps[:2]) > 5 * done.num_steps[2]
    assert done.wall_seconds >= 0.6
    assert (done.computing_wall_seconds > 0.3).all()


def test_threads_and_virtual_time_agree_in_distribution():
    """The staleness of the updates, who takes part how often, and how far the model comes."""
    times, num_versions = [0.016, 0.016, 0.016, 0.048], 200
    rule = Rule(stale_synchronous(3), add(1 / 4))

    def fresh(**options):
        return Server(start(), rule, 4, **options), sgd_workers(Quadratic(4, noise=0.1), 4)

    simulated, workers = fresh(now=VirtualClock())
    virtual = simulate(simulated, workers, np.array([times]), num_versions=num_versions)
    server, crew = fresh()
    wall = run_threads(server, crew, slow_down=np.array([times]), num_versions=num_versions)

    def shares(counts):
        return np.array([counts[s] for s in range(4)]) / sum(counts.values())

    assert np.abs(shares(server.staleness) - shares(simulated.staleness)).sum() / 2 < 0.2
    optimum = Quadratic(4).optimum
    distances = [np.linalg.norm(s.params["w"] - optimum) for s in (server, simulated)]
    # What the gradients' noise leaves of the way from the start; it is another at each run.
    assert max(distances) < 0.2 * np.linalg.norm(optimum)
    # The time that sleeping alone takes is a bound from below, whatever else the machine does.
    assert 0.8 * virtual.virtual_seconds < wall.wall_seconds


@pytest.mark.parametrize("pipelined", [True, False])
def test_a_pipelined_worker_computes_while_its_update_travels(pipelined):
    """The first four pushes do not come before the step after them has begun, if it does."""
    began = [threading.Event() for _ in range(20)]

    class Noting(Quadratic):
        def step(self, worker, params, state, index, towards=None):
            began[index].set()
            return super().step(worker, params, state, index, towards)

    class Far(Server):
        on_their_way, most, overlapped = 0, 0, 0

        def push(self, worker, incarnation, seq, *args):
            self.on_their_way += 1
            self.most = max(self.most, self.on_their_way)
            if seq < 4:
                self.overlapped += began[seq + 1].wait(20.0 if pipelined else 0.03)
            ack = super().push(worker, incarnation, seq, *args)
            self.on_their_way -= 1
            return ack

    workers = sgd_workers(Noting(1), 1, pipelined=pipelined)
    server = Far(start(), Rule(asynchronous(), add()), 1)
    done = run_threads(server, workers, num_versions=8, rehearse=False)
    assert server.overlapped == (4 if pipelined else 0)
    assert server.most == 1  # two buffers: one is filled, one travels
    assert done.num_pushes[0] == done.num_steps[0] == server.version


def test_what_error_feedback_owes_goes_on_with_the_worker():
    def fresh():
        return sgd_workers(Quadratic(K, size=8), K)

    rule, push = Rule(synchronous(), average()), error_feedback(one_bit(block=8))
    one = {"devices": jax.devices()[:1]}  # one program for all
    whole, _, _, _ = run(rule, fresh(), start(8), push=push, num_versions=10, **one)
    server, _, _, workers = run(rule, fresh(), start(8), push=push, num_versions=4, **one)
    assert all(np.any(worker.residual[0]) for worker in workers)
    run_threads(server, workers, num_versions=10, **one)
    np.testing.assert_array_equal(server.params["w"], whole.params["w"])


def test_evaluations_and_times():
    seen = []
    server, done, _, _ = run(
        Rule(asynchronous(), add(1 / K)),
        seconds=1.2,
        slow_down=np.array([[0.004] * K]),
        evaluate=lambda params: seen.append(params["w"].copy()) or len(seen),
        evaluate_every_seconds=0.2,
    )
    times = [e.wall_seconds for e in done.evaluations]
    assert times[0] == 0
    assert times[-1] == done.wall_seconds
    assert times == sorted(times)
    assert 4 <= len(times) <= 8
    assert [e.value for e in done.evaluations] == list(range(1, len(times) + 1))
    assert done.evaluations[-1].version == server.version
    np.testing.assert_array_equal(seen[0], 0)
    np.testing.assert_array_equal(seen[-1], server.params["w"])


@pytest.fixture
def interruptible():
    """Ctrl-C raises, also where the tests run in the background and it would be ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_ends_the_run_and_it_may_go_on():
    server = Server(start(), Rule(synchronous(), average()), K)
    workers = sgd_workers(Quadratic(K), K)
    main = threading.main_thread().ident
    timer = threading.Timer(0.15, signal.pthread_kill, (main, signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        run_threads(server, workers, seconds=30, slow_down=np.array([[0.002] * K]))
    timer.join()
    assert not threads_alive()
    version = server.version
    assert version > 0
    run_threads(server, workers, num_versions=version + 5)
    assert {m.clock for m in server.members().values()} == {version + 5}


def loss_fn(params, batch, key):
    x, y = batch
    return jnp.mean((x @ params["w"] - y) ** 2), {}


DRAWS = np.random.default_rng(0)
X = DRAWS.standard_normal((40, 2, 8, 6)).astype(np.float32)
Y = X @ np.arange(6, dtype=np.float32)


def samples(worker, index):
    return X[index % 40, worker], Y[index % 40, worker]


class Placed(OptaxTask):
    """Notes where each worker's updates are."""

    def __init__(self, *args):
        super().__init__(*args)
        self.devices = {}

    def step(self, worker, *args):
        out = super().step(worker, *args)
        self.devices.setdefault(worker, set()).update(out[0]["w"].devices())
        return out


def test_each_worker_has_a_device_and_an_optimiser_of_its_own():
    task = Placed(loss_fn, optax.adam(0.05), samples)
    server, _, _, workers = run(
        Rule(synchronous(), average()),
        sgd_workers(task, 2),
        {"w": np.zeros(6, np.float32)},
        num_versions=30,
        devices=jax.devices()[1:3],
    )
    assert task.devices == {0: {jax.devices()[1]}, 1: {jax.devices()[2]}}
    assert [int(w._state[0].count) for w in workers] == [30, 30]
    error = np.linalg.norm(server.params["w"] - np.arange(6))
    assert error < 0.9 * np.linalg.norm(np.arange(6))


class OnMesh(Task):
    """SGD on a mesh of two devices: the parameters are divided over its axis "model"."""

    def __init__(self, mesh):
        self.cut = NamedSharding(mesh, PartitionSpec("model"))
        whole = NamedSharding(mesh, PartitionSpec())

        def step(w, x, y):
            loss, g = jax.value_and_grad(lambda w: loss_fn({"w": w}, (x, y), None)[0])(w)
            return -0.05 * g, loss

        self._step = jax.jit(
            step, in_shardings=(self.cut, whole, whole), out_shardings=(self.cut, whole)
        )
        self.shardings = []

    def init(self, worker, params):
        return ()

    def step(self, worker, params, state, index, towards=None):
        update, loss = self._step(params["w"], *samples(worker, index))
        self.shardings.append(update.sharding)
        return {"w": update}, state, loss


def test_a_worker_may_be_a_mesh():
    """One on a single device and one on a mesh of two, which may not use the first one's."""
    single = OptaxTask(loss_fn, optax.sgd(0.05), samples)
    devices, rule = jax.devices(), Rule(synchronous(), average())
    mesh = OnMesh(make_mesh({"fsdp": 1, "model": 2}, devices=devices[1:3]))
    params = {"w": np.zeros(6, np.float32)}
    server, _, _, _ = run(
        rule,
        [SgdWorker(0, single), SgdWorker(1, mesh)],
        params,
        num_versions=10,
        devices=[devices[0], None],
    )
    assert all(s == mesh.cut and len(s.device_set) == 2 for s in mesh.shardings)
    alone = Server(params, rule, 2, now=VirtualClock())
    simulate(alone, sgd_workers(single, 2), EVEN[:, :2], num_versions=10)
    np.testing.assert_allclose(server.params["w"], alone.params["w"], rtol=1e-5)


def test_refused():
    rule = Rule(asynchronous(), add())
    server, workers = Server(start(), rule, 2), sgd_workers(Quadratic(2), 2)
    with pytest.raises(ValueError, match="no end"):
        run_threads(server, workers)
    with pytest.raises(ValueError, match="starts with 2"):
        run_threads(server, workers[:1], seconds=1)
    with pytest.raises(ValueError, match=r"workers \[1\] are there more than once"):
        run_threads(server, [workers[1]] * 2, seconds=1)
    with pytest.raises(ValueError, match="virtual"):
        run_threads(Server(start(), rule, 2, now=VirtualClock()), workers, seconds=1)
    with pytest.raises(ValueError, match="on_failure"):
        run_threads(server, workers, seconds=1, on_failure="ignore")
    with pytest.raises(ValueError, match="floats"):
        run_threads(server, workers, seconds=1, slow_down=np.ones((1, 3)))
