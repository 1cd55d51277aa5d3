"""Hogwild: one thread is plain SGD; many converge where steps are sparse; nobody holds another."""

import threading

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jdml.communicate.pace import OptaxTask, PaceError, Rows, Task, hogwild

SIZE, NUM_ROWS, PER_ROW = 64, 256, 3
DRAWS = np.random.default_rng(0)
COLUMNS = np.array([DRAWS.choice(SIZE, PER_ROW, replace=False) for _ in range(NUM_ROWS)])
VALUES = DRAWS.standard_normal((NUM_ROWS, PER_ROW))
VALUES /= np.linalg.norm(VALUES, axis=1, keepdims=True)
SOLUTION = DRAWS.standard_normal(SIZE)
RIGHT = (VALUES * SOLUTION[COLUMNS]).sum(1)


def sparse_step(w, thread, index):
    """Of ``(1/2) (a_e w - b_e)^2``, which touches three of the elements: rate 1/2."""
    e = np.random.default_rng([thread, index]).integers(NUM_ROWS)
    error = VALUES[e] @ w[COLUMNS[e]] - RIGHT[e]
    return Rows(COLUMNS[e], -0.5 * error * VALUES[e]), 0.5 * error**2


class Sparse(Task):
    def init(self, worker, params):
        return ()

    def step(self, worker, params, state, index, towards=None):
        update, loss = sparse_step(params["w"], worker, index)
        return {"w": update}, state, loss


def test_one_thread_is_sgd_bit_for_bit():
    done = hogwild({"w": np.zeros(SIZE)}, Sparse(), 1, num_steps=300, copy=False)
    w = np.zeros(SIZE)
    for t in range(300):
        (indices, values), _ = sparse_step(w, 0, t)
        np.add.at(w, indices, values)
    np.testing.assert_array_equal(done.params["w"], w)
    assert done.num_steps.tolist() == [300]


@pytest.mark.parametrize("copy", [False, True])
def test_threads_converge_on_a_sparse_convex_problem(copy):
    """All equations hold at the solution, so that a constant rate reaches it geometrically."""
    start = {"w": np.zeros(SIZE)}
    done = hogwild(
        start,
        Sparse(),
        4,
        num_steps=3000,
        copy=copy,
        evaluate=lambda p: np.linalg.norm(p["w"] - SOLUTION),
    )
    assert done.num_steps.tolist() == [3000] * 4
    first, last = (e.value for e in done.evaluations)
    assert last < 1e-6 * first
    assert done.evaluations[-1].version == 12_000
    np.testing.assert_array_equal(start["w"], 0)


def test_dense_updates_of_any_loss():
    x = DRAWS.standard_normal((16, 5)).astype(np.float32)
    y = x @ np.arange(5, dtype=np.float32)

    def loss_fn(params, batch, key):
        return jnp.mean((x @ params["w"] - y) ** 2), {}

    task = OptaxTask(loss_fn, optax.sgd(0.05), lambda worker, index: ())
    params = {"w": np.zeros(5, np.float32)}
    done = hogwild(params, task, 2, num_steps=100)
    np.testing.assert_allclose(done.params["w"], np.arange(5), atol=1e-2)
    alone = hogwild(params, task, 1, num_steps=20).params["w"]
    w, state = params, task.init(0, params)
    for t in range(20):
        update, state, _ = task.step(0, w, state, t)
        w = {"w": w["w"] + np.asarray(update["w"])}
    np.testing.assert_array_equal(alone, w["w"])


def test_nobody_holds_another():
    """Thread 0 stops within a step until thread 1 has taken all of its own."""
    others_done = threading.Event()

    class Uneven(Sparse):
        def step(self, worker, params, state, index, towards=None):
            if worker == 0 and index == 0:
                assert others_done.wait(10)
            out = super().step(worker, params, state, index, towards)
            if worker == 1 and index == 49:
                others_done.set()
            return out

    done = hogwild({"w": np.zeros(SIZE)}, Uneven(), 2, num_steps=50)
    assert done.num_steps.tolist() == [50, 50]


def test_what_is_handed_out_cannot_be_written():
    class Writes(Sparse):
        def step(self, worker, params, state, index, towards=None):
            params["w"][0] = 1
            return super().step(worker, params, state, index, towards)

    with pytest.raises(PaceError, match=r"thread \d failed at its step 0: ValueError.*read-only"):
        hogwild({"w": np.zeros(SIZE)}, Writes(), 2, seconds=10, copy=False)


def test_refused():
    with pytest.raises(ValueError, match="at least one thread"):
        hogwild({"w": np.zeros(2)}, Sparse(), 0, num_steps=1)
    with pytest.raises(ValueError, match="a limit"):
        hogwild({"w": np.zeros(2)}, Sparse(), 1)

    class Wide(Sparse):
        def step(self, worker, params, state, index, towards=None):
            return {"w": np.zeros(3)}, state, 0.0

    with pytest.raises(PaceError, match=r"leaf 'w' has shape \(3,\), the parameter \(2,\)"):
        hogwild({"w": np.zeros(2)}, Wide(), 1, num_steps=1)
