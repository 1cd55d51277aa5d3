"""A run saved by four workers goes on with two, eight or one: what error feedback owes is kept."""

import jax
import numpy as np
import optax
import pytest

from jdml.aggregate import average_params, mean_gradients
from jdml.communicate import error_feedback
from jdml.communicate.codecs import int8, power_sgd
from jdml.sharding import make_mesh
from jdml.train import Checkpointer, make_step
from tests.train.problems import make_batch, pytree_problem

FEEDBACK = error_feedback(int8(16))
MESHES = {
    "two": {"data": 2, "model": 2},
    "eight": {"data": 8},
    "eight on two axes": {"slice": 2, "data": 4},
    "one": {"data": 1},
}


def build(shape, codec=FEEDBACK, make_tx=None):
    mesh = make_mesh(shape, devices=jax.devices()[: int(np.prod(list(shape.values())))])
    problem = pytree_problem(mesh)
    workers = tuple(a for a in mesh.axis_names if a != "model")
    tx = make_tx or optax.chain(mean_gradients(workers, codec), optax.adam(1e-2))
    init, step = make_step(problem.loss_fn, tx, mesh, workers, problem.specs)
    return init, step, problem.params


def train(state, step, first, num_steps):
    for i in range(first, first + num_steps):
        state, metrics = step(state, make_batch(i))
        assert np.isfinite(metrics["loss"])
    return state


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a checkpoint of four workers, and its residuals as NumPy arrays."""
    folder = tmp_path_factory.mktemp("four")
    init, step, params = build({"data": 4, "model": 2})
    state = train(init(params, 0), step, 0, 3)
    with Checkpointer(folder) as checkpointer:
        checkpointer.save(3, state, wait=True)
    return folder, jax.tree.map(np.asarray, state._replace(key=0))


def restore(folder, abstract, **options):
    with Checkpointer(folder, read_only=True) as checkpointer:
        return checkpointer.restore(abstract, **options).state


def residuals(state):
    return [np.asarray(x) for x in jax.tree.leaves(state.opt_state[0])]


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow) if n.startswith("eight") else n for n in MESHES],
)
def test_the_sum_of_the_residuals_stays_and_training_goes_on(saved, name):
    folder, before = saved
    init, step, params = build(MESHES[name])
    abstract = init.abstract(params)
    state = restore(folder, abstract)
    assert [x.sharding for x in jax.tree.leaves(state)] == [
        x.sharding for x in jax.tree.leaves(abstract)
    ]
    assert any(np.abs(old).max() > 1e-4 for old in residuals(before))
    for new, old in zip(residuals(state), residuals(before), strict=True):
        rows = new.reshape(-1, *old.shape[1:])  # one worker keeps no worker dim
        np.testing.assert_allclose(rows.sum(0), old.sum(0), atol=1e-7)
        if len(rows) == 2:
            np.testing.assert_array_equal(rows[0], old[0] + old[2])
        elif len(rows) == 8:
            np.testing.assert_array_equal(rows[:4], old)
    for new, old in [(state.params, before.params), (state.opt_state[1:], before.opt_state[1:])]:
        jax.tree.map(np.testing.assert_array_equal, new, old)
    state = train(state, step, 3, 2)
    assert int(state.step) == 5


def test_what_the_mean_owes_may_be_kept_instead(saved):
    folder, before = saved
    for shape in (MESHES["two"], MESHES["eight"]):
        init, _, params = build(shape)
        state = restore(folder, init.abstract(params), residual="mean")
        for new, old in zip(residuals(state), residuals(before), strict=True):
            np.testing.assert_allclose(new.mean(0), old.mean(0), atol=1e-7)


def test_as_many_workers_on_other_axes_keep_everything(saved):
    folder, before = saved
    init, _, params = build({"slice": 2, "data": 2})
    for policy in ("sum", "mean"):
        state = restore(folder, init.abstract(params), residual=policy)
        for new, old in zip(residuals(state), residuals(before), strict=True):
            np.testing.assert_array_equal(new, old)


@pytest.mark.parametrize(
    "shape", [{"data": 4, "model": 2}, pytest.param({"data": 2}, marks=pytest.mark.slow)]
)
def test_a_reset_is_explicit_and_begins_with_zeros(saved, shape):
    folder, before = saved
    init, step, params = build(shape)
    abstract = init.abstract(params)
    state = restore(folder, abstract, residual="reset")
    assert not any(map(np.any, residuals(state)))
    jax.tree.map(np.testing.assert_array_equal, state.params, before.params)
    train(state, step, 3, 1)


@pytest.mark.slow
def test_error_feedback_may_be_taken_up_or_dropped_with_a_reset(saved, tmp_path):
    folder, before = saved
    with_feedback, exact = build({"data": 4}), build({"data": 4}, None)
    abstract = exact[0].abstract(exact[2])
    with pytest.raises(ValueError, match=r"residual/in/bias' .* is only in the checkpoint"):
        restore(folder, abstract)
    state = restore(folder, abstract, residual="reset")
    jax.tree.map(np.testing.assert_array_equal, state.params, before.params)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(3, state, wait=True)
    abstract = with_feedback[0].abstract(with_feedback[2])
    with pytest.raises(ValueError, match=r"residual/in/bias' .* is not in the checkpoint"):
        restore(tmp_path, abstract)
    state = restore(tmp_path, abstract, residual="reset")
    assert not any(map(np.any, residuals(state)))
    train(state, with_feedback[1], 3, 1)


@pytest.mark.slow
def test_of_a_reducer_the_debt_moves_and_the_rest_stays(tmp_path):
    codec = power_sgd(1)
    init, step, params = build({"data": 4}, codec)
    before = train(init(params, 0), step, 0, 2)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(2, before, wait=True)
        init, step, params = build({"data": 2}, codec)
        state = checkpointer.restore(init.abstract(params)).state
        anew = checkpointer.restore(init.abstract(params), residual="reset").state
    old, new, fresh = (s.opt_state[0].residual for s in (before, state, anew))
    for a, b in zip(jax.tree.leaves(new.residual), jax.tree.leaves(old.residual), strict=True):
        np.testing.assert_allclose(np.asarray(a).sum(0), np.asarray(b).sum(0), atol=1e-6)
    assert np.abs(np.asarray(jax.tree.leaves(old.residual)[0])).max() > 1e-3
    for kept in (new, fresh):
        a = jax.tree.leaves(kept._replace(residual=()))
        b = jax.tree.leaves(old._replace(residual=()))
        jax.tree.map(np.testing.assert_array_equal, a, b)
    assert not any(map(np.any, jax.tree.leaves(fresh.residual)))
    train(state, step, 2, 1)


def test_models_of_the_workers_own_are_refused_with_what_to_do(tmp_path):
    def local():
        return optax.chain(optax.sgd(0.1), average_params("data", 4, codec=FEEDBACK))

    init, step, params = build({"data": 4}, make_tx=local())
    state = init(params, 0)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(2, state, wait=True)
        init, other, params = build({"data": 2}, make_tx=local())
        for policy in ("sum", "reset"):
            with pytest.raises(ValueError, match=r"saved by 4 workers, and 2 are here") as error:
                checkpointer.restore(init.abstract(params), residual=policy)
            assert "'params/in/kernel': saved float32[4, 8, 16], given" in str(error.value)
            assert "/residual/" not in str(error.value)
            assert "step.consensus(state)" in str(error.value)
    # As the message says.
    consensus = jax.tree.map(np.asarray, step.consensus(state)[0])
    train(init(consensus, 0), other, 2, 1)


def test_a_damaged_residual_is_seen_before_it_is_moved(saved, monkeypatch):
    from jdml.train.saving import orbax

    folder, _ = saved
    init, _, params = build({"data": 2})
    read = orbax.read_arrays

    def damaged(*args):
        arrays = read(*args)
        path = "opt_state/0/residual/in/kernel"
        return {**arrays, path: arrays[path].at[1, 2, 3].add(1e-3)}

    monkeypatch.setattr(orbax, "read_arrays", damaged)
    with (
        pytest.warns(UserWarning, match="residual/in/kernel': the bits are not those saved"),
        pytest.raises(OSError, match="no checkpoint could be restored"),
    ):
        restore(folder, init.abstract(params))


def test_an_unknown_policy_is_refused(saved):
    init, _, params = build({"data": 2})
    with pytest.raises(ValueError, match="residual='keep'"):
        restore(saved[0], init.abstract(params), residual="keep")
