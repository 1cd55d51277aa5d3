"""Each rule against its formula written out, and in the limit where it is another."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jdml.communicate.pace import (
    AdmmWorker,
    ElasticWorker,
    Rule,
    Server,
    VirtualClock,
    add,
    async_admm,
    asynchronous,
    average,
    backup,
    dc_asgd,
    dc_asgd_adaptive,
    delayed_nesterov,
    elastic_centre,
    local_steps_by_speed,
    optimise,
    simulate,
    stale_synchronous,
    synchronous,
)
from jdml.communicate.pace.rules.arithmetic import all_moved, moved
from tests.communicate.pace.problems import Quadratic, sgd_workers, start

K = 4
ROUNDS = 30
JITTER = np.random.default_rng(5).lognormal(0.0, 0.7, (64, K))
JITTER[:, 1] *= 4


def run(rule, workers, times=JITTER, params=None, **limits):
    server = Server(start() if params is None else params, rule, len(workers), now=VirtualClock())
    return server, simulate(server, workers, times, trace=True, **limits)


def test_no_staleness_is_synchronous_sgd_bit_for_bit():
    task = Quadratic(K, noise=0.3)
    server, _ = run(
        Rule(stale_synchronous(0), average()), sgd_workers(task, K), num_versions=ROUNDS
    )
    w = np.zeros(3)
    for t in range(ROUNDS):
        total = np.zeros(3)
        for k in range(K):
            total = total + -task.learning_rate * task.gradient(k, w, t)
        w = w + total * (1 / K)
    np.testing.assert_array_equal(server.params["w"], w)
    assert server.staleness == {0: K * ROUNDS}


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_large_leaves_move_as_small_ones_do(scale):
    draw = np.random.default_rng(0)
    shapes = [(3, 700_001), (), (0, 4), (600_000,), (5,)]
    x = [draw.standard_normal(shape).astype(np.float32) for shape in shapes]
    x += [x[0].astype(np.float16), x[0].T]
    u = [np.cos(leaf) for leaf in x]
    with_large = all_moved(tuple(x), u, scale)
    for leaf, step, out in zip(x, u, with_large, strict=True):
        np.testing.assert_array_equal(out, moved(leaf, step, scale))
        assert out.dtype == leaf.dtype
        assert not out.flags.writeable


def replayed(trace, task, apply):
    """What a list of pulls and pushes makes of the parameters: ``apply(w, update, base)``."""
    w, read, count = np.zeros(3), {}, {}
    for event in trace:
        k = event.worker
        if event.what == "pull":
            read[k] = w
        elif event.what == "push":
            n = count[k] = count.get(k, -1) + 1
            update, _, _ = task.step(k, {"w": read[k]}, (), n)
            w = apply(w, update["w"], read[k])
    return w


def test_no_bound_is_asynchronous_sgd_bit_for_bit():
    task = Quadratic(K, noise=0.3)
    server, done = run(Rule(asynchronous(), add()), sgd_workers(task, K), num_versions=100)
    expected = replayed(done.trace, task, lambda w, u, base: w + u)
    np.testing.assert_array_equal(server.params["w"], expected)
    loose, _ = run(Rule(stale_synchronous(10**9), add()), sgd_workers(task, K), num_versions=100)
    np.testing.assert_array_equal(server.params["w"], loose.params["w"])
    assert not done.waiting_virtual_seconds.any()


def test_no_backups_are_synchronous_bit_for_bit():
    task = Quadratic(K, noise=0.3)
    made = [
        run(Rule(pace, average()), sgd_workers(task, K), num_versions=ROUNDS)
        for pace in (backup(0), synchronous())
    ]
    np.testing.assert_array_equal(made[0][0].params["w"], made[1][0].params["w"])
    assert made[0][1].virtual_seconds == made[1][1].virtual_seconds
    assert made[0][1].refused == 0


def test_backups_take_the_first_and_refuse_the_late():
    """Times 1, 1, 1 and 3.5: the slow one answers in every fourth round, too late."""
    times = np.array([[1.0, 1.0, 1.0, 3.5]])
    task = Quadratic(K)
    server, done = run(Rule(backup(1), average()), sgd_workers(task, K), times, num_versions=8)
    w = np.zeros(3)
    for t in range(8):
        w = w + sum(-task.learning_rate * task.gradient(k, w, t) for k in range(3)) * (1 / 3)
    np.testing.assert_allclose(server.params["w"], w, rtol=1e-13)
    assert done.virtual_seconds == 8
    assert done.refused == 2  # at 3.5 and 7
    # Pulled again at 3.5 and at 7, where a round of the others is on its way.
    assert [e.virtual_seconds for e in done.trace if e.worker == 3 and e.what == "pull"] == [
        0.0,
        3.5,
        7.0,
    ]


def test_dc_asgd_without_compensation_is_asynchronous_sgd():
    task = Quadratic(K, noise=0.3, gradients=True)
    for rule in (dc_asgd(0.1, 0.0), dc_asgd_adaptive(0.1, 0.0)):
        plain, _ = run(Rule(asynchronous(), add(-0.1)), sgd_workers(task, K), num_versions=80)
        server, _ = run(Rule(asynchronous(), rule), sgd_workers(task, K), num_versions=80)
        np.testing.assert_array_equal(server.params["w"], plain.params["w"])


def test_dc_asgd_is_its_formula():
    task = Quadratic(K, noise=0.3, gradients=True)
    server, done = run(
        Rule(asynchronous(), dc_asgd(0.1, 0.5)), sgd_workers(task, K), num_versions=80
    )
    expected = replayed(
        done.trace, task, lambda w, g, base: w - 0.1 * (g + 0.5 * g * g * (w - base))
    )
    np.testing.assert_allclose(server.params["w"], expected, rtol=1e-12)
    server, done = run(
        Rule(asynchronous(), dc_asgd_adaptive(0.1, 0.7, 0.9)), sgd_workers(task, K), num_versions=80
    )
    ms = np.zeros(3)

    def adaptive(w, g, base):
        nonlocal ms
        ms = 0.9 * ms + (1 - 0.9) * g * g
        return w - 0.1 * (g + 0.7 / np.sqrt(ms + 1e-7) * g * g * (w - base))

    expected = replayed(done.trace, task, adaptive)
    np.testing.assert_allclose(server.params["w"], expected, rtol=1e-12)


def test_dc_asgd_takes_off_most_of_a_late_gradients_error():
    """Where the Hessian's diagonal is λ g ⊙ g, the corrected gradient is that of the new model."""
    w_old, w_new, t = np.array([1.0]), np.array([1.2]), np.array([0.0])
    g_old, g_new = w_old - t, w_new - t  # f = (w - t)^2 / 2: Hessian 1 = g_old^2 at w_old = 1
    server = Server(w_old, Rule(asynchronous(), dc_asgd(0.1, 1.0)), 2)
    server.register(0), server.register(1)
    base = server.pull(0).version
    # The other worker moves the model from 1 to 1.2.
    server.push(1, 0, 0, np.array([-2.0]), server.pull(1).version)
    np.testing.assert_allclose(server.params, w_new)
    server.push(0, 0, 0, g_old, base)
    np.testing.assert_allclose(server.params, w_new - 0.1 * g_new)


def test_delayed_nesterov_with_a_buffer_of_one_is_nesterov():
    g = np.random.default_rng(0).standard_normal((20, 3))
    server = Server(start(), Rule(asynchronous(), delayed_nesterov(0.7, 0.9)), 1)
    server.register(0)
    tx = optax.sgd(0.7, momentum=0.9, nesterov=True)
    w = jnp.zeros(3)
    state = tx.init(w)
    for t in range(20):
        server.push(0, 0, t, {"w": -g[t]}, server.pull(0).version)
        moves, state = tx.update(jnp.asarray(g[t], jnp.float32), state, w)
        w = optax.apply_updates(w, moves)
    np.testing.assert_allclose(server.params["w"], w, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("c", [0.0, 0.1, 0.25])
def test_delayed_nesterov_applies_its_momentum_once_in_a_buffer(c):
    """Over two full buffers of the same gradient the model moves as two Nesterov steps would."""
    server = Server(np.zeros(1), Rule(asynchronous(), delayed_nesterov(1.0, 0.5, 4, c)), 1)
    server.register(0)
    for t in range(8):
        server.push(0, 0, t, np.array([-1.0]), server.pull(0).version)
    # m is 1 after the first buffer and 1.5 after the second; between them c of the old m counts.
    applied = 0.5 * 1 * (1 - 3 * c) + 0.5 * (1 * 3 * c + 1.5 * (1 - 3 * c))
    np.testing.assert_allclose(server.params, -(2 + applied))


def test_faster_workers_take_more_local_steps():
    assert local_steps_by_speed([1.0, 2.0, 3.0, 100.0], 12) == [12, 6, 4, 1]
    with pytest.raises(ValueError, match="times > 0"):
        local_steps_by_speed([0.0], 4)


def test_elastic_averaging_in_step_is_its_formula():
    """Synchronous: both differences are from before the exchange, as in ``elastic_average``."""
    task, alpha, every = Quadratic(K, noise=0.2), 0.9 / K, 3
    workers = [ElasticWorker(k, task, every, alpha) for k in range(K)]
    server, _ = run(Rule(synchronous(), elastic_centre(alpha)), workers, num_versions=10)
    x, c, taken = np.zeros((K, 3)), np.zeros(3), 0
    for _ in range(10):
        apart = x - c
        x, c = x - alpha * apart, c + alpha * apart.sum(0)
        for i in range(every):
            g = np.stack([task.gradient(k, x[k], taken + i) for k in range(K)])
            x = x - task.learning_rate * g
        taken += every
    np.testing.assert_allclose(server.params["w"], c, rtol=1e-12)


def test_elastic_averaging_conserves_the_sum():
    """Without steps of their own, what the workers give the centre gets, in any order."""
    task, alpha = Quadratic(K, learning_rate=0.0), 0.2
    workers = [ElasticWorker(k, task, 1, alpha) for k in range(K)]
    for k, worker in enumerate(workers):
        worker.params = {"w": np.full(3, float(k))}
    server, _ = run(Rule(asynchronous(), elastic_centre(alpha)), workers, num_events=3000)
    total = server.params["w"] + sum(w.params["w"] for w in workers)
    np.testing.assert_allclose(total, sum(range(K)), rtol=1e-12)
    np.testing.assert_allclose(server.params["w"], 6 / 5, atol=1e-3)


def admm_reference(task, rho, every, rounds):
    x, u, z, taken = np.zeros((K, 3)), np.zeros((K, 3)), np.zeros(3), 0
    for _ in range(rounds):
        for i in range(every):
            g = np.stack([task.gradient(k, x[k], taken + i) for k in range(K)])
            x = x - task.learning_rate * (g + rho * (x - (z - u)))
        taken += every
        z = ((((x[0] + u[0]) + (x[1] + u[1])) + (x[2] + u[2])) + (x[3] + u[3])) / K
        u = u + x - z
    return z


@pytest.mark.parametrize(("reports", "age"), [(K, 1), (1, 1), (K, 5)])
def test_admm_that_waits_for_all_is_synchronous_admm(reports, age):
    task = Quadratic(K, noise=0.2)
    workers = [AdmmWorker(k, task, 5, rho=0.8) for k in range(K)]
    server, _ = run(async_admm(reports, age, rho=0.8), workers, num_versions=12)
    np.testing.assert_allclose(
        server.params["w"], admm_reference(task, 0.8, 5, 12), rtol=1e-13, atol=1e-15
    )


def test_async_admm_waits_for_no_one_longer_than_it_says_and_finds_the_optimum():
    times = np.ones((1, K))
    times[0, 2] = 7.0
    applied = []
    task = Quadratic(K, learning_rate=0.3)
    workers = [AdmmWorker(k, task, 10, rho=1.0) for k in range(K)]
    server = Server(
        start(), async_admm(2, 3, rho=1.0), K, now=VirtualClock(), on_applied=applied.append
    )
    done = simulate(server, workers, times, num_versions=150)
    in_step, synchronous_run = run(
        async_admm(K, 1, rho=1.0),
        [AdmmWorker(k, task, 10, 1.0) for k in range(K)],
        times,
        num_versions=150,
    )
    np.testing.assert_allclose(server.params["w"], task.optimum, atol=1e-6)
    np.testing.assert_allclose(in_step.params["w"], task.optimum, atol=1e-6)
    assert done.virtual_seconds < 0.5 * synchronous_run.virtual_seconds
    # Nobody misses more than two rounds in a row.
    for k in range(K):
        versions = [0] + [a.version for a in applied if a.worker == k]
        assert max(np.diff(versions)) <= 3


def test_admm_shrinks_by_the_proximal_operator():
    task = Quadratic(K, learning_rate=0.3)

    def prox_l2(tree, step):
        return {"w": tree["w"] / (1 + step * 2.0)}

    workers = [AdmmWorker(k, task, 20, rho=1.0) for k in range(K)]
    server, _ = run(async_admm(K, 1, 1.0, prox_l2), workers, num_versions=150)
    expected = (task.curvature * task.target).sum(0) / (task.curvature.sum(0) + 2.0)
    np.testing.assert_allclose(server.params["w"], expected, atol=1e-6)


def test_an_optimiser_at_the_server_is_optax_on_the_mean_gradient():
    task = Quadratic(K, gradients=True)
    tx = optax.adam(0.1)
    server, _ = run(
        Rule(synchronous(), optimise(tx)),
        sgd_workers(task, K),
        params={"w": np.zeros(3, np.float32)},
        num_versions=10,
    )
    w = jnp.zeros(3)
    state = tx.init(w)
    for t in range(10):
        mean = sum(task.gradient(k, np.asarray(w), t) for k in range(K)) / K
        moves, state = tx.update(jnp.asarray(mean, jnp.float32), state, w)
        w = optax.apply_updates(w, moves)
    np.testing.assert_allclose(server.params["w"], w, rtol=1e-5, atol=1e-6)


def test_narrow_floats_are_stepped_in_f32():
    server = Server(jnp.ones(2, jnp.bfloat16), Rule(asynchronous(), add(0.5)), 1)
    server.register(0)
    server.push(0, 0, 0, np.full(2, 0.25, np.float32), server.pull(0).version)
    assert server.params.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(server.params, np.float32), 1.125)


def test_refuses_rates_out_of_range():
    for make in (
        lambda: dc_asgd(0.0),
        lambda: dc_asgd(0.1, -1.0),
        lambda: dc_asgd_adaptive(0.1, decay=1.0),
        lambda: delayed_nesterov(0.7, 1.0),
        lambda: delayed_nesterov(0.7, buffer_size=0),
        lambda: delayed_nesterov(0.7, buffer_size=4, activation=0.3),
        lambda: elastic_centre(1.0),
        lambda: async_admm(0, 1),
        lambda: async_admm(1, 0),
        lambda: async_admm(1, 1, rho=0.0),
        lambda: backup(-1),
        lambda: add(float("nan")),
        lambda: optimise(0.1),
    ):
        with pytest.raises(ValueError, match="expected"):
            make()
