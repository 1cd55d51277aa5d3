"""Models of the clocks that lockstep methods do not use (the others: test_backup_workers)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdml.communicate.pace import by_worker, constant, log_normal, pausing, recorded

KEY = jax.random.key(0)


def test_pauses_come_as_often_as_they_should():
    model = pausing(constant(1.0), {1: 0.3, 2: 1.0}, 10.0)
    times = np.asarray(jax.jit(jax.vmap(lambda t: model(KEY, t, 3)))(jnp.arange(600)))
    assert set(times[:, 0]) == {1.0}
    assert set(times[:, 1]) == {1.0, 11.0}
    assert abs(np.mean(times[:, 1] > 1) - 0.3) < 0.06
    assert set(times[:, 2]) == {11.0}


def test_each_worker_may_have_a_model_of_its_own():
    model = by_worker(constant(1.0), {2: constant(5.0), 0: log_normal(0.5)})
    times = np.asarray(model(KEY, 3, 4))
    np.testing.assert_array_equal(times[1:], [1, 5, 1])
    assert times[0] == log_normal(0.5)(KEY, 3, 4)[0]


def test_a_recorded_trace_comes_back_and_round_again():
    trace = np.arange(6.0).reshape(3, 2)
    np.testing.assert_array_equal(recorded(trace)(KEY, 4, 2), trace[1])


def test_refuses_what_cannot_work():
    with pytest.raises(ValueError, match="pause > 0"):
        pausing(constant(), {0: 0.5}, 0.0)
    with pytest.raises(ValueError, match="probability"):
        pausing(constant(), {0: 1.5}, 1.0)
    with pytest.raises(ValueError, match=r"workers \[4\], beyond the 2"):
        pausing(constant(), {4: 0.5}, 1.0)(KEY, 0, 2)
    with pytest.raises(ValueError, match="beyond"):
        by_worker(constant(), {2: constant()})(KEY, 0, 2)
    with pytest.raises(ValueError, match="times >= 0"):
        recorded(-np.ones((1, 1)))
    with pytest.raises(ValueError, match="3 columns"):
        recorded(np.ones((1, 3)))(KEY, 0, 2)
