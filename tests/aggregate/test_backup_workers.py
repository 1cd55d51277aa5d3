"""Backup workers: whose gradients count, and the clocks that say so."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jdml.aggregate import backup_workers, mean_gradients
from jdml.communicate import error_feedback
from jdml.communicate.codecs import int8
from jdml.communicate.pace import heavy_tailed, log_normal, masked
from jdml.sharding import make_mesh
from jdml.train import make_step

K = 4


def slopes(tx, num_steps=1, num_workers=K):
    """Worker k's gradient is the k-th unit vector: the sum of means shows who was counted."""
    mesh = make_mesh({"data": num_workers}, devices=jax.devices()[:num_workers])

    def loss_fn(params, batch, key):
        return jnp.sum(batch * params["w"]), {}

    init, step = make_step(loss_fn, optax.chain(tx, optax.sgd(1.0)), mesh)
    state = init({"w": jnp.zeros(num_workers)}, 0)
    for _ in range(num_steps):
        state, _ = step(state, np.eye(num_workers, dtype=np.float32))
    return -np.asarray(state.params["w"]), state


def at(*times):
    return lambda key, step, num_workers: jnp.asarray(times)


def test_takes_the_first_and_drops_the_late():
    counted, state = slopes(backup_workers("data", 1, at(3.0, 1.0, 9.0, 2.0)))
    np.testing.assert_allclose(counted, [1 / 3, 1 / 3, 0, 1 / 3], rtol=1e-6)
    metrics = state.opt_state[0].metrics
    assert float(metrics["backup_arrived"]) == 3
    assert float(metrics["backup_time"]) == 3.0


def test_ties_go_to_the_lower_number():
    counted, _ = slopes(backup_workers("data", 2, at(1.0, 1.0, 1.0, 1.0)))
    np.testing.assert_allclose(counted, [0.5, 0.5, 0, 0])


def test_fewer_than_expected_are_still_a_mean_and_none_is_zero():
    inf = float("inf")
    counted, _ = slopes(backup_workers("data", 1, at(inf, 1.0, inf, inf)))
    np.testing.assert_allclose(counted, [0, 1, 0, 0])
    counted, state = slopes(backup_workers("data", 0, at(inf, inf, inf, inf)))
    np.testing.assert_array_equal(counted, 0)
    assert float(state.opt_state[0].metrics["backup_arrived"]) == 0


@pytest.mark.parametrize(
    "codec", [None, int8(16), pytest.param(error_feedback(int8(16)), marks=pytest.mark.slow)]
)
def test_no_backups_is_synchronous_sgd(codec):
    backup, _ = slopes(backup_workers("data", 0, log_normal(1.0), codec), num_steps=3)
    synchronous, _ = slopes(mean_gradients("data", codec), num_steps=3)
    np.testing.assert_array_equal(backup, synchronous)


def test_a_late_workers_debt_waits():
    """What error feedback holds of a worker that is late stays as it was."""
    mask = np.array([[True] * 4, [True, True, False, True]])
    feedback = error_feedback(int8(4), two_sided=False)
    _, one = slopes(backup_workers("data", 0, masked(mask), feedback), num_steps=1)
    _, two = slopes(backup_workers("data", 0, masked(mask), feedback), num_steps=2)
    before, after = (np.asarray(s.opt_state[0].residual["w"]) for s in (one, two))
    np.testing.assert_array_equal(after[2], before[2])


def test_clocks_follow_their_distributions():
    key, n = jax.random.key(0), 200_000
    times = np.asarray(log_normal(0.5, median=2.0)(key, 0, n))
    np.testing.assert_allclose(np.median(times), 2.0, rtol=0.01)
    np.testing.assert_allclose(np.std(np.log(times)), 0.5, rtol=0.01)
    times = np.asarray(heavy_tailed(1.5, least=3.0)(key, 0, n))
    assert times.min() >= 3.0
    np.testing.assert_allclose(np.mean(times > 6.0), 0.5**1.5, rtol=0.02)
    slow = np.asarray(log_normal(0.0, slower={1: 4.0})(key, 0, 3))
    np.testing.assert_allclose(slow, [1, 4, 1])


def test_clocks_differ_from_step_to_step_and_repeat_with_the_key():
    draw = log_normal(1.0)
    first, again = draw(jax.random.key(0), 3, 8), draw(jax.random.key(0), 3, 8)
    np.testing.assert_array_equal(first, again)
    assert (np.asarray(first) != np.asarray(draw(jax.random.key(0), 4, 8))).all()


def test_refuses_what_cannot_work():
    with pytest.raises(ValueError, match="int >= 0"):
        backup_workers("data", -1, log_normal(1.0))
    with pytest.raises(ValueError, match="at most 3 of them"):
        slopes(backup_workers("data", 4, log_normal(1.0)))
    with pytest.raises(ValueError, match=r"expected \(4,\)"):
        slopes(backup_workers("data", 0, at(1.0, 2.0)))
    with pytest.raises(ValueError, match="sigma >= 0"):
        log_normal(-1.0)
    with pytest.raises(ValueError, match="shape > 0"):
        heavy_tailed(0.0)
    with pytest.raises(ValueError, match="bool array"):
        masked(np.ones(3))
    with pytest.raises(ValueError, match="factor > 0"):
        log_normal(1.0, slower={0: 0.0})
