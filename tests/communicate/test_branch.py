"""Exchanges on some steps only: one type, and bytes by the branch that was taken."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from jdml.aggregate import average_params, mean_gradients, streaming_diloco
from jdml.communicate.branch import branch, choose
from jdml.sharding import bytes_per_axis, collectives, make_mesh
from jdml.train import MetricsLog, fit, make_step

K = 4


@pytest.fixture(scope="module")
def mesh():
    return make_mesh({"data": K}, devices=jax.devices()[:K])


def test_branches_may_differ_in_what_varies(mesh):
    def body(x, flag):
        mean = branch(flag > 0, lambda: jax.lax.pmean(x, "data"), lambda: 2 * x)
        return mean, jax.lax.pmean(mean, "data")

    f = jax.shard_map(body, mesh=mesh, in_specs=(P("data"), P()), out_specs=(P("data"), P()))
    x = jnp.arange(4.0)
    np.testing.assert_array_equal(f(x, 1)[0], np.full(4, 1.5))
    np.testing.assert_array_equal(f(x, 0)[0], 2 * x)


def test_bytes_are_those_of_the_branch_taken(mesh):
    def body(x, i):
        def said(n):
            return lambda: jnp.sum(jax.lax.pmean(x[:n], "data")) if n else jnp.float32(0)

        return choose("test", i, [said(0), said(8), said(16)])

    f = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=(P("data"), P()), out_specs=P()))
    compiled = f.lower(jnp.zeros(64), jnp.int32(0)).compile()
    listed = collectives(compiled, mesh)
    assert {c.branches for c in listed} == {(("test", 1),), (("test", 2),)}
    sent = [bytes_per_axis(listed, taken={"test": i}) for i in range(3)]
    ring = 2 * 3 / 4 * 4
    assert sent == [{}, {("data",): ring * 8}, {("data",): ring * 16}]
    assert bytes_per_axis(listed) == {("data",): ring * 24}
    _, metrics = f(jnp.zeros(64), jnp.int32(2))
    assert metrics == {"branch.test": 2.0}


class Rows:
    def __next__(self):
        return np.ones((8, 3), np.float32)

    def state(self):
        return {}


def sent_by(mesh, tx, num_steps=7):
    def loss_fn(params, batch, key):
        return jnp.sum((batch @ params["a"]) ** 2) + jnp.sum(params["b"] ** 2), {}

    init, step = make_step(loss_fn, tx, mesh)
    state = init({"a": jnp.ones((3, 4)), "b": jnp.ones(20)}, 0)
    log = MetricsLog(None)
    fit(step, state, Rows(), num_steps, mesh=mesh, log=log)
    assert [r["bytes_sent"] for r in log.rows] == list(
        np.cumsum([r["bytes_per_step"] for r in log.rows])
    )
    return [r["bytes_per_step"] for r in log.rows]


def test_the_log_counts_what_was_sent(mesh):
    other = sent_by(mesh, optax.sgd(0.1))[0]  # the mean of the loss, in every step
    whole = 2 * 3 / 4 * 4 * 32
    local = optax.chain(optax.sgd(0.1), average_params("data", 3))
    assert [n - other for n in sent_by(mesh, local)] == [0, 0, whole, 0, 0, whole, 0]
    every = optax.chain(mean_gradients("data"), optax.sgd(0.1))
    assert [n - other for n in sent_by(mesh, every)] == [whole] * 7
    parts = optax.chain(optax.sgd(0.1), streaming_diloco("data", 4, 2, optax.sgd(1.0)))
    a, b = (2 * 3 / 4 * 4 * n for n in (12, 20))
    assert [n - other for n in sent_by(mesh, parts)] == [0, a, 0, b, 0, a, 0]
