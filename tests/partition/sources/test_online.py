"""Online data: by (seed, worker, step) alone, the same wherever drawn, distinct, from the truth."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jdml.partition.sources import Online, gaussian_linear, gaussian_logistic
from jdml.sharding import make_mesh

W = np.array([1.0, -2.0, 0.5], np.float32)
SOURCE = Online(gaussian_logistic(W, 4), seed=7)


@pytest.fixture(scope="module")
def mesh():
    return make_mesh({"data": 4, "model": 2})


def all_equal(a, b):
    return all(jax.tree.leaves(jax.tree.map(lambda x, y: np.array_equal(np.asarray(x), y), a, b)))


def by_hand(workers, step):
    parts = [SOURCE(k, step) for k in range(workers)]
    return jax.tree.map(lambda *xs: np.concatenate(xs), *parts)


def test_drawn_on_the_mesh_as_by_itself(mesh):
    batches = SOURCE.batches(mesh)
    first, second = next(batches), next(batches)
    assert batches.step == 2
    assert all_equal(first, by_hand(4, 0))
    assert all_equal(second, by_hand(4, 1))
    assert first["x"].sharding.is_equivalent_to(jax.NamedSharding(mesh, P("data")), 2)
    # Two axes of workers: eight of them, of whom the first four are the same ones.
    eight = next(SOURCE.batches(mesh, ("data", "model")))
    assert all_equal(eight, by_hand(8, 0))


def test_drawn_inside_a_step(mesh):
    @jax.jit
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=P(), out_specs=P("data"))
    def mean_of_x(step):
        batch = SOURCE(jax.lax.axis_index("data"), step)
        return jnp.mean(batch["x"])[None]

    found = mean_of_x(jnp.uint32(3))
    expected = [SOURCE(k, 3)["x"].mean() for k in range(4)]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_workers_steps_and_seeds_are_distinct():
    draws = [
        np.asarray(Online(SOURCE.draw, seed)(worker, step)["x"])
        for seed in (0, 1)
        for worker in range(3)
        for step in range(3)
    ]
    assert len({x.tobytes() for x in draws}) == len(draws)
    assert np.array_equal(draws[4], Online(SOURCE.draw, 0)(1, 1)["x"])


def test_it_goes_on_from_a_saved_position(mesh):
    batches = SOURCE.batches(mesh)
    expected = [next(batches) for _ in range(3)][2]
    again = SOURCE.batches(mesh)
    again.restore({**batches.state(), "step": 2})
    assert all_equal(next(again), jax.tree.map(np.asarray, expected))
    with pytest.raises(ValueError, match="seed: saved 7, here 8"):
        Online(SOURCE.draw, 8).batches(mesh).restore(batches.state())
    with pytest.raises(ValueError, match="num_workers: saved 4, here 2"):
        SOURCE.batches(mesh, "model").restore(batches.state())


def test_the_linear_distribution_has_its_moments():
    n, scale = 40_000, np.array([1.0, 2.0, 0.5], np.float32)
    batch = Online(gaussian_linear(W, n, b=3.0, noise=0.5, scale=scale))(0, 0)
    x, y = np.asarray(batch["x"], np.float64), np.asarray(batch["y"], np.float64)
    np.testing.assert_allclose(np.cov(x.T), np.diag(scale**2), atol=0.1)  # five deviations
    residual = y - x @ W - 3
    assert abs(residual.mean()) < 5 * 0.5 / np.sqrt(n)
    assert residual.var() == pytest.approx(0.25, rel=5 * np.sqrt(2 / n))
    assert abs(np.corrcoef(residual, x[:, 0])[0, 1]) < 5 / np.sqrt(n)


def test_the_truth_is_the_logistic_optimum():
    """E x (σ(xᵀw + b) - [y = 1]) = 0: the gradient of the expected loss vanishes there."""
    n = 40_000
    batch = Online(gaussian_logistic(W, n, b=-1.0))(0, 0)
    x, y = np.asarray(batch["x"], np.float64), np.asarray(batch["y"])
    assert set(np.unique(y)) == {-1, 1}
    error = 1 / (1 + np.exp(-x @ W + 1)) - (y > 0)
    assert np.all(np.abs(x.T @ error / n) < 5 * 0.5 / np.sqrt(n))
    assert abs(error.mean()) < 5 * 0.5 / np.sqrt(n)
    elsewhere = 1 / (1 + np.exp(-x @ W / 2 + 1)) - (y > 0)
    assert np.linalg.norm(x.T @ elsewhere / n) > 0.05


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Online(SOURCE.draw, -1), "seed=-1"),
        (lambda: Online(SOURCE.draw, 2**32), "seed=4294967296"),
        (lambda: SOURCE(-1, 0), "worker -1"),
        (lambda: SOURCE(0, 2**32), "step 4294967296"),
        (lambda: gaussian_linear(W, 0), "batch=0"),
        (lambda: gaussian_linear(W[None], 3), r"w of shape \(1, 3\)"),
        (lambda: gaussian_logistic(W, 3, scale=[1.0, 2.0]), r"scale of shape \(2,\)"),
        (lambda: gaussian_linear(W, 3, noise=-1), "noise=-1"),
        (lambda: SOURCE.batches(make_mesh({"data": 8}), "rows"), r"the mesh has the axes \['data'"),
    ],
)
def test_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
