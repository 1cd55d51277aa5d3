"""Dense forms of the reducers and optimisers that exchange something other than gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

B1, B2 = 0.9, 0.999


def mean(trees):
    return jax.tree.map(lambda *xs: sum(xs) / len(xs), *trees)


def zeros(tree):
    return jax.tree.map(jnp.zeros_like, tree)


def low_rank_round(xs, owed, q, fresh):
    """PowerSGD's algorithm 1 with a warm start, on ``[K, n, m]`` in f64: ``(D, owed, Q)``.

    ``fresh``: ``[m, rank]``, what the method draws and adds to the last round's Q.
    """
    matrices = np.asarray(xs, np.float64) + owed
    norm = np.linalg.norm(q, axis=0)
    right = q / np.where(norm == 0, 1, norm) + 1e-3 * fresh
    p, triangle = np.linalg.qr(np.mean([m @ right for m in matrices], axis=0))
    p = p * np.sign(np.diag(triangle))  # as Gram-Schmidt has it
    q = np.mean([m.T @ p for m in matrices], axis=0)
    return p @ q.T, matrices - p @ q.T, q


def drawn(key, shapes, rank):
    """``[m, rank]`` for each matrix ``[n, m]``, as the method draws them: all at once."""
    sizes = [rank * m for _, m in shapes]
    parts = np.split(np.asarray(jax.random.normal(key, (sum(sizes),))), np.cumsum(sizes)[:-1])
    return [p.reshape(rank, m).T / np.sqrt(m) for p, (_, m) in zip(parts, shapes, strict=True)]


def low_rank(rank):
    """Synchronous SGD on PowerSGD's means of the matrices and the exact means of the rest."""

    def reference(gradient, inner, params, num_workers, num_steps):
        state = inner.init(params)
        leaves, treedef = jax.tree.flatten(params)
        matrices = [i for i, x in enumerate(leaves) if x.ndim == 2]
        shapes = [leaves[i].shape for i in matrices]
        owed = [np.zeros((num_workers, *shape)) for shape in shapes]
        qs = [np.zeros((m, rank)) for _, m in shapes]
        for step in range(num_steps):
            gradients = [gradient(params, step, k) for k in range(num_workers)]
            means = jax.tree.leaves(mean(gradients))
            if num_workers > 1:
                fresh = drawn(jax.random.fold_in(jax.random.key(0), step), shapes, rank)
                for j, i in enumerate(matrices):
                    xs = [jax.tree.leaves(g)[i] for g in gradients]
                    d, owed[j], qs[j] = low_rank_round(xs, owed[j], qs[j], fresh[j])
                    means[i] = jnp.asarray(d, jnp.float32)
            updates, state = inner.update(jax.tree.unflatten(treedef, means), state, params)
            params = optax.apply_updates(params, updates)
        return [params] * num_workers

    return reference


def adam_step(x, m, v, rate, variance_correction, eps):
    d = jax.tree.map(lambda v: jnp.sqrt(v / variance_correction) + eps, v)
    return jax.tree.map(lambda x, m, d: x - rate * m / d, x, m, d)


def first_moment(m, g):
    return jax.tree.map(lambda m, g: B1 * m + (1 - B1) * g, m, g)


def second_moment(v, g):
    return jax.tree.map(lambda v, g: B2 * v + (1 - B2) * g**2, v, g)


def frozen_adam(learning_rate, warmup_steps, eps=1e-8):
    """Adam of the mean gradient whose variance stays as it is after the warm-up."""

    def reference(gradient, inner, params, num_workers, num_steps):
        m = v = zeros(params)
        for t in range(1, num_steps + 1):
            g = mean([gradient(params, t - 1, k) for k in range(num_workers)])
            m = first_moment(m, g)
            v = second_moment(v, g) if t <= warmup_steps else v
            correction = 1 - B2 ** min(t, warmup_steps)
            params = adam_step(params, m, v, learning_rate / (1 - B1**t), correction, eps)
        return [params] * num_workers

    return reference


def zero_one(learning_rate, freeze_step, kappa, double_every, max_interval, eps=1e-8):
    """0/1 Adam with exact exchanges, worker by worker."""

    def reference(gradient, inner, params, num_workers, num_steps):
        anchor, v, updates, next_variance, last, total = params, zeros(params), 0, 0, 0, 0.0
        workers = [(params, zeros(params), zeros(params)) for _ in range(num_workers)]
        for t in range(num_steps):
            gradients = [gradient(x, t, k) for k, (x, _, _) in enumerate(workers)]
            if t == next_variance and t < freeze_step:
                v = second_moment(v, mean(gradients))
                next_variance, updates = t + 2 ** (updates // kappa), updates + 1
            rate, correction = learning_rate / (1 - B1 ** (t + 1)), 1 - B2**updates
            total += rate
            for k, ((x, m, u), g) in enumerate(zip(workers, gradients, strict=True)):
                m = first_moment(m, g)
                u = jax.tree.map(lambda u, m: u + rate * m, u, m)  # noqa: B023
                workers[k] = (adam_step(x, m, v, rate, correction, eps), m, u)
            doublings = max(t + 1 - freeze_step, 0) // double_every
            if t + 1 - last >= min(2**doublings, max_interval):
                u = mean([u for _, _, u in workers])
                anchor = adam_step(anchor, u, v, 1.0, correction, eps)
                m = jax.tree.map(lambda u: u / total, u)  # noqa: B023
                workers = [(anchor, m, zeros(params))] * num_workers
                last, total = t + 1, 0.0
        return [x for x, _, _ in workers]

    return reference
