import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from jdml.aggregate import dgc, mean_gradients
from jdml.aggregate.dgc import densities
from jdml.communicate import error_feedback
from jdml.communicate.codecs import int8, top_k
from jdml.sharding import collectives, make_mesh
from jdml.train import make_step
from jdml.train.saving.residuals import debts
from tests.marks import slow
from tests.train.problems import BATCH, make_batch, pytree_problem

LEARNING_RATE = 0.1


def flat(tree):
    return np.concatenate([np.asarray(x, np.float32).reshape(-1) for x in jax.tree.leaves(tree)])


def buckets(params, num_shards):
    """Indices into the flat parameters of what each device chooses from by itself.

    Over ``model`` the last dim of the first kernel and of its bias and the first of the second
    kernel are divided; the scale is the same everywhere and stays in a bucket of its own.
    """
    leaves, treedef = jax.tree.flatten(params)
    ends = np.cumsum([x.size for x in leaves])
    index = jax.tree.unflatten(
        treedef,
        [
            np.arange(end - x.size, end).reshape(x.shape)
            for x, end in zip(leaves, ends, strict=True)
        ],
    )
    if num_shards == 1:
        return [np.arange(ends[-1])]
    parts = [
        np.concatenate([np.split(x, num_shards, dim)[i].reshape(-1) for x, dim in divided])
        for divided in [
            [(index["in"]["bias"], 0), (index["in"]["kernel"], 1), (index["out"]["kernel"], 0)]
        ]
        for i in range(num_shards)
    ]
    return [*parts, index["scale"].reshape(-1)]


def reference(params, gradient, num_workers, num_steps, groups, parts, options):
    """DGC as its Algorithm 4 has it, on flat vectors in NumPy."""
    momentum, nesterov, clip = options
    x = flat(params)
    u, v = np.zeros((2, num_workers, x.size), np.float32)
    for step in range(num_steps):
        total = np.zeros_like(x)
        for k in range(num_workers):
            g = gradient(x, step, k)
            if clip is not None:
                g = g * min(1, clip / np.sqrt(num_workers) / np.linalg.norm(g))
            u[k] = momentum * u[k] + g
            v[k] += momentum * u[k] + g if nesterov else u[k]
            for group in groups:
                num = int(np.ceil(round(parts[step] * group.size, 6)))
                sent = group[np.argsort(-np.abs(v[k, group]), kind="stable")[:num]]
                total[sent] += v[k, sent]
                u[k, sent] = v[k, sent] = 0
        x = x - LEARNING_RATE * total / num_workers
    return x, u, v


@pytest.mark.parametrize(
    ("shape", "tx", "parts", "options"),
    [
        slow({"data": 4}, dgc("data", 0.9), [0.1] * 5, (0.9, False, None)),
        (
            {"data": 4},
            dgc("data", 0.95, 0.8, nesterov=True, clip_norm=0.3, warmup_steps=3),
            [1 / 4, 1 / 4, 1 / 16, 0.05, 0.05],
            (0.8, True, 0.3),
        ),
        slow({"data": 2, "model": 2}, dgc("data", 0.9), [0.1] * 5, (0.9, False, None)),
    ],
)
def test_equals_the_algorithm_in_numpy(shape, tx, parts, options):
    num_workers, num_shards = shape["data"], shape.get("model", 1)
    mesh = make_mesh(shape, devices=jax.devices()[: num_workers * num_shards])
    problem = pytree_problem(mesh)
    tx = optax.chain(tx, optax.sgd(LEARNING_RATE))
    init, step = make_step(problem.loss_fn, tx, mesh, specs=problem.specs)
    state = init(problem.params, 0)
    for i in range(5):
        state, _ = step(state, make_batch(i))

    params = jax.tree.map(np.asarray, problem.params)
    _, unravel = jax.flatten_util.ravel_pytree(params)
    grad = jax.jit(jax.grad(lambda x, b: problem.loss_fn(unravel(x), b, None)[0]))
    size = BATCH // num_workers

    def gradient(x, i, k):
        batch = jax.tree.map(lambda a: a[k * size : (k + 1) * size], make_batch(i))
        return np.asarray(grad(jnp.asarray(x), batch))

    groups = buckets(params, num_shards)
    x, u, v = reference(params, gradient, num_workers, 5, groups, parts, options)
    np.testing.assert_allclose(flat(state.params), x, atol=1e-5)
    residual = state.opt_state[0].residual
    for k in range(num_workers):
        mine = jax.tree.map(lambda a, k=k: a[k], residual)
        np.testing.assert_allclose(flat(mine.velocity), u[k], atol=1e-5)
        np.testing.assert_allclose(flat(mine.unsent), v[k], atol=1e-5)


def run(tx, gradients):
    """Updates and last residual of a chain; ``[step, worker, element]``, two leaves."""
    mesh = make_mesh({"data": 4}, devices=jax.devices()[:4])
    state = tx.init({"a": jnp.zeros(40), "b": jnp.zeros(24)})

    def body(gradients, state):
        def one(state, g):
            tree = {"a": g[0, :40], "b": g[0, 40:]}
            updates, state = tx.update(tree, state)
            return state, jnp.concatenate([updates["a"], updates["b"]])

        out = []
        for g in gradients:
            state, update = one(state, g)
            out.append(update)
        return jnp.stack(out), jax.tree.map(lambda x: x[None], state)

    mapped = jax.shard_map(
        body,
        mesh=mesh,
        in_specs=(P(None, "data"), P()),
        out_specs=(P(), P("data")),
        check_vma=False,
    )
    updates, state = jax.jit(mapped)(gradients, state)
    return np.asarray(updates), state


def gaussian(num_steps):
    return jax.random.normal(jax.random.key(0), (num_steps, 4, 64))


@pytest.mark.parametrize(
    ("values", "nesterov"),
    [(None, False), (None, True), slow(top_k(1.0), False), slow(top_k(1.0), True)],
)
def test_without_sparsity_it_is_synchronous_momentum_sgd(nesterov, values):
    """Also where every worker's v is said by a codec that loses nothing."""
    gradients = gaussian(4)
    updates, _ = run(dgc("data", 0, 0.9, nesterov, values=values), gradients)
    trace = optax.trace(0.9, nesterov)
    state, expected = trace.init(jnp.zeros(64)), []
    for g in np.asarray(gradients).mean(1):
        update, state = trace.update(jnp.asarray(g), state)
        expected.append(update)
    np.testing.assert_allclose(updates, np.stack(expected), atol=1e-5)


@pytest.mark.slow
def test_without_momentum_it_is_top_k_with_error_feedback():
    gradients = gaussian(3)
    updates, state = run(dgc("data", 0.75, momentum=0), gradients)
    codec = error_feedback(top_k(0.25), two_sided=False)
    expected, other = run(mean_gradients("data", codec, "all_gather"), gradients)
    np.testing.assert_array_equal(updates, expected)
    for a, b in zip(
        jax.tree.leaves(state.residual.unsent), jax.tree.leaves(other.residual), strict=True
    ):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_what_was_not_said_is_all_there():
    """Without momentum: the sum of the updates and the mean of v are the sum of the gradients."""
    gradients = gaussian(4)
    updates, state = run(dgc("data", 0.9, momentum=0, values=int8(16)), gradients)
    unsent = np.concatenate([np.asarray(x) for x in jax.tree.leaves(state.residual.unsent)], 1)
    np.testing.assert_allclose(
        updates.sum(0) + unsent.mean(0), np.asarray(gradients).mean(1).sum(0), atol=1e-5
    )


def test_what_is_held_back_moves_to_another_number_of_workers():
    """A checkpoint takes both, and nothing else, for debts whose sum it keeps."""
    state = dgc("data", warmup_steps=4).init({"a": jnp.zeros(3)})
    assert debts(state) == {"residual/velocity/a", "residual/unsent/a"}


@pytest.mark.slow
def test_clipping_bounds_what_each_worker_adds():
    gradients = 100 * gaussian(1)
    _, state = run(dgc("data", 0.999, 0.9, clip_norm=2.0), gradients)
    unsent = np.concatenate([np.asarray(x) for x in jax.tree.leaves(state.residual.unsent)], 1)
    # One element of the bucket was sent.
    assert (np.linalg.norm(unsent, axis=1) < 2 / np.sqrt(4)).all()
    assert (np.linalg.norm(unsent, axis=1) > 0.8 * 2 / np.sqrt(4)).all()


@pytest.mark.parametrize("clip_norm", [slow(None), 1.0])
def test_what_is_not_finite_is_seen_and_forgotten(clip_norm):
    gradients = gaussian(3).at[1, 2, 50].set(jnp.nan)
    updates, state = run(dgc("data", 0.75, clip_norm=clip_norm), gradients)
    assert np.isfinite(updates[0]).all()
    assert np.isnan(updates[1]).any()
    assert np.isfinite(updates[2]).all()
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.residual))


def test_warm_up_is_that_of_the_paper():
    sent = [0.25, 0.0625, 0.015625, 0.00390625, 0.001]
    assert densities(0.999, 100) == pytest.approx(sent)
    assert densities(0.99, 100) == pytest.approx([*sent[:3], 0.01])
    assert densities(0.999, 0) == pytest.approx([0.001])
    assert densities(0.5, 100) == (0.5,)


@pytest.mark.slow
def test_the_wire_carries_one_payload_of_the_phase_to_each_worker():
    mesh = make_mesh({"data": 4}, devices=jax.devices()[:4])
    problem = pytree_problem(mesh)
    tx = optax.chain(dgc("data", 0.95, warmup_steps=4, values=int8(16)), optax.sgd(0.1))
    init, step = make_step(problem.loss_fn, tx, mesh, specs=problem.specs)
    state = init(problem.params, 0)
    compiled = step.lower(state, make_batch(0)).compile()
    found = [c for c in collectives(compiled, mesh) if c.kind == "all-gather"]
    assert all(set(c.dtypes) <= {"u8", "s8"} for c in found)
    size = flat(problem.params).size
    payloads = [top_k(part, int8(16)).payload_bytes(size) for part in (1 / 4, 1 / 16, 0.05)]
    assert sorted(c.sent_bytes for c in found) == sorted(3 * payload for payload in payloads)
    phases = []
    for i in range(6):
        state, metrics = step(state, make_batch(i))
        phases.append(int(metrics["branch.dgc"]))
    assert phases == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": 1.0}, r"dgc\(sparsity=1.0\).*\[0, 1\)"),
        ({"sparsity": -0.1}, r"dgc\(sparsity=-0.1"),
        ({"momentum": 1}, r"dgc\(momentum=1\)"),
        ({"clip_norm": 0}, r"dgc\(clip_norm=0\)"),
        ({"warmup_steps": -1}, r"dgc\(warmup_steps=-1\)"),
        ({"warmup_steps": 2.5}, r"dgc\(warmup_steps=2.5\)"),
        ({"values": int8}, r"dgc\(values=.*forget to call"),
        ({"axis": 3}, "name of a mesh axis"),
    ],
)
def test_refuses_arguments_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        dgc(**{"axis": "data", **arguments})
