"""Every aggregation with its dense form: add a method here and the conformance suite runs it.

A reference trains the workers one after the other on one device, as the method's paper writes it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jdml.aggregate import (
    adasum,
    average_params,
    backup_workers,
    choco,
    consensus_admm,
    dgc,
    elastic_average,
    gossip,
    mean_gradients,
    one_bit_adam,
    parameter_server,
    prox_l2,
    push_sum,
    streaming_diloco,
    zero_one_adam,
)
from jdml.communicate import error_feedback
from jdml.communicate.codecs import int8, power_sgd
from jdml.communicate.topology import Graph, exponential, from_edges, one_peer_exponential, ring
from tests.aggregate.optimiser_references import frozen_adam, low_rank, zero_one

Worker = tuple[Any, Any]
"""(params, opt_state) of one worker."""
Gradient = Callable[[Any, int, int], Any]
"""(params, step, worker) -> gradient."""


class Method(NamedTuple):
    """How to build a method, and what it should compute.

    Attributes:
      make: The chain around an inner optimiser.
      reference: ``(gradient, inner, params, num_workers, num_steps) -> params of each worker``.
      tolerance: Greatest difference from the reference: rounding, or what the codec loses.
      lone_worker_is_inner: Whether one worker alone does what the inner optimiser does, no more.
    """

    make: Callable[[optax.GradientTransformation], optax.GradientTransformation]
    reference: Callable[..., list[Any]]
    tolerance: float = 1e-5
    lone_worker_is_inner: bool = True


def mean(trees: list[Any]) -> Any:
    return jax.tree.map(lambda *xs: sum(xs) / len(xs), *trees)


def subtract(a: Any, b: Any) -> Any:
    return jax.tree.map(lambda x, y: x - y, a, b)


def scaled(factor: float) -> Callable[[Any], Any]:
    return lambda tree: jax.tree.map(lambda x: factor * x, tree)


def synchronous(gradient: Gradient, inner: Any, params: Any, num_workers: int, num_steps: int):
    state = inner.init(params)
    for i in range(num_steps):
        g = mean([gradient(params, i, k) for k in range(num_workers)])
        updates, state = inner.update(g, state, params)
        params = optax.apply_updates(params, updates)
    return [params] * num_workers


def with_momentum(gradient: Gradient, inner: Any, params: Any, num_workers: int, num_steps: int):
    inner = optax.chain(optax.trace(0.9), inner)
    return synchronous(gradient, inner, params, num_workers, num_steps)


def local(every: int, outer: Any = None):
    def reference(gradient, inner, params, num_workers, num_steps):
        anchor = params
        outer_state = None if outer is None else outer.init(anchor)
        workers: list[Worker] = [(params, inner.init(params)) for _ in range(num_workers)]
        for i in range(num_steps):
            for k, (params, state) in enumerate(workers):
                updates, state = inner.update(gradient(params, i, k), state, params)
                workers[k] = (optax.apply_updates(params, updates), state)
            if (i + 1) % every == 0:
                average = mean([params for params, _ in workers])
                if outer is not None:
                    delta = subtract(anchor, average)
                    updates, outer_state = outer.update(delta, outer_state, anchor)
                    average = optax.apply_updates(anchor, updates)
                anchor = average
                workers = [(anchor, state) for _, state in workers]
        return [params for params, _ in workers]

    return reference


def without_the_missing(gradient, inner, params, num_workers, num_steps):
    state = inner.init(params)
    for i in range(num_steps):
        missing = i % num_workers if num_workers > 1 else None
        g = mean([gradient(params, i, k) for k in range(num_workers) if k != missing])
        updates, state = inner.update(g, state, params)
        params = optax.apply_updates(params, updates)
    return [params] * num_workers


def one_missing(key, step, num_workers):
    """Worker ``step mod N`` never arrives, unless it is the only one."""
    missing = (jnp.arange(num_workers) == step % num_workers) & (num_workers > 1)
    return jnp.where(missing, jnp.inf, 0.0)


def elastic(every: int, alpha: float):
    def reference(gradient, inner, params, num_workers, num_steps):
        center = params
        workers: list[Worker] = [(params, inner.init(params)) for _ in range(num_workers)]
        for i in range(num_steps):
            pull = scaled(alpha if i % every == 0 else 0.0)
            apart = [pull(subtract(x, center)) for x, _ in workers]
            for k, (x, state) in enumerate(workers):
                updates, state = inner.update(gradient(x, i, k), state, x)
                x = jax.tree.map(lambda x, u, d: x + u - d, x, updates, apart[k])
                workers[k] = (x, state)
            center = jax.tree.map(lambda c, *ds: c + sum(ds), center, *apart)
        return [x for x, _ in workers]

    return reference


def admm(every: int, rho: float, relax: float, strength: float):
    """Consensus ADMM with an L2 penalty."""

    def reference(gradient, inner, params, num_workers, num_steps):
        z = params
        zeros = jax.tree.map(jnp.zeros_like, params)
        workers = [(params, zeros, inner.init(params)) for _ in range(num_workers)]
        for i in range(num_steps):
            for k, (x, u, state) in enumerate(workers):
                g = jax.tree.map(
                    lambda g, x, z, u: g + rho * (x - z + u), gradient(x, i, k), x, z, u
                )
                updates, state = inner.update(g, state, x)
                workers[k] = (optax.apply_updates(x, updates), u, state)
            if (i + 1) % every == 0:
                relaxed = [
                    jax.tree.map(lambda x, z: relax * x + (1 - relax) * z, x, z)
                    for x, _, _ in workers
                ]
                duals = [u for _, u, _ in workers]
                summed = [jax.tree.map(jnp.add, v, u) for v, u in zip(relaxed, duals, strict=True)]
                z = scaled(1 / (1 + strength / (num_workers * rho)))(mean(summed))
                workers = [
                    (x, jax.tree.map(lambda u, v, z: u + v - z, u, v, z), state)
                    for (x, u, state), v in zip(workers, relaxed, strict=True)
                ]
        return [x for x, _, _ in workers]

    return reference


def streaming(every: int, num_fragments: int, delay: int, mixing: float, outer: Any):
    """Leaf i belongs to fragment ``i mod P``."""

    def reference(gradient, inner, params, num_workers, num_steps):
        treedef = jax.tree.structure(params)
        flat = jax.tree.leaves
        anchor = flat(params)
        outer_states = [outer.init(x) for x in anchor]
        leaving = [[jnp.zeros_like(x) for x in anchor] for _ in range(num_workers)]
        workers: list[Worker] = [(params, inner.init(params)) for _ in range(num_workers)]
        for t in range(1, num_steps + 1):
            for k, (x, state) in enumerate(workers):
                updates, state = inner.update(gradient(x, t - 1, k), state, x)
                workers[k] = (optax.apply_updates(x, updates), state)
            for i in range(len(anchor)):
                begin = (i % num_fragments + 1) * every // num_fragments
                if t % every == begin % every and delay == 0:
                    for k, (x, _) in enumerate(workers):
                        leaving[k][i] = anchor[i] - flat(x)[i]
                if t >= begin + delay and t % every == (begin + delay) % every:
                    d = sum(leaving[k][i] for k in range(num_workers)) / num_workers
                    update, outer_states[i] = outer.update(d, outer_states[i], anchor[i])
                    anchor[i] = anchor[i] + update
                    for k, (x, state) in enumerate(workers):
                        leaves = flat(x)
                        leaves[i] = mixing * leaves[i] + (1 - mixing) * anchor[i]
                        workers[k] = (jax.tree.unflatten(treedef, leaves), state)
                if t % every == begin % every and delay > 0:
                    for k, (x, _) in enumerate(workers):
                        leaving[k][i] = anchor[i] - flat(x)[i]
        return [x for x, _ in workers]

    return reference


def downpour(push_every: int, pull_every: int, rate: float):
    """Accrued gradients to the server now and then; plain SGD of one's own between pulls."""

    def reference(gradient, inner, params, num_workers, num_steps):
        server, state = params, inner.init(params)
        models = [params] * num_workers
        accrued = scaled(0.0)(params)
        for t in range(1, num_steps + 1):
            g = [gradient(x, t - 1, k) for k, x in enumerate(models)]
            models = [subtract(x, scaled(rate)(y)) for x, y in zip(models, g, strict=True)]
            accrued = jax.tree.map(jnp.add, accrued, mean(g))
            if t % push_every == 0:
                updates, state = inner.update(accrued, state, server)
                server = optax.apply_updates(server, updates)
                accrued = scaled(0.0)(params)
            if t % pull_every == 0:
                models = [server] * num_workers
        return models

    return reference


def mixed(weights: Any, trees: list[Any]) -> list[Any]:
    """``x_i <- sum_j W_ij x_j``."""
    return [
        jax.tree.map(lambda *xs, row=row: sum(w * x for w, x in zip(row, xs, strict=True)), *trees)
        for row in weights
    ]


def gossiping(make_graph: Callable[[int], Graph], adapt_first: bool = False):
    def reference(gradient, inner, params, num_workers, num_steps):
        graph = make_graph(num_workers)
        workers: list[Worker] = [(params, inner.init(params)) for _ in range(num_workers)]
        for i in range(num_steps):
            models = mixed(graph.at(i), [x for x, _ in workers])
            for k, (x, state) in enumerate(workers):
                updates, state = inner.update(gradient(x, i, k), state, x)
                start = x if adapt_first else models[k]
                workers[k] = (optax.apply_updates(start, updates), state)
            if adapt_first:
                models = mixed(graph.at(i), [x for x, _ in workers])
                workers = [(m, state) for m, (_, state) in zip(models, workers, strict=True)]
        return [x for x, _ in workers]

    return reference


def pushing(make_graph: Callable[[int], Graph]):
    def reference(gradient, inner, params, num_workers, num_steps):
        graph = make_graph(num_workers)
        workers: list[Worker] = [(params, inner.init(params)) for _ in range(num_workers)]
        sums, weights = [params] * num_workers, np.ones(num_workers)
        for i in range(num_steps):
            for k, (z, state) in enumerate(workers):
                updates, state = inner.update(gradient(z, i, k), state, z)
                workers[k] = (z, state)
                sums[k] = optax.apply_updates(sums[k], updates)
            sums, weights = mixed(graph.at(i), sums), graph.at(i) @ weights
            workers = [
                (scaled(1 / weights[k])(sums[k]), state) for k, (_, state) in enumerate(workers)
            ]
        return [z for z, _ in workers]

    return reference


def one_way(num_workers: int) -> Graph:
    """Directed and not doubly stochastic: a cycle with a short cut."""
    if num_workers < 3:
        return exponential(num_workers)
    cycle = [(i, (i + 1) % num_workers) for i in range(num_workers)]
    return from_edges(num_workers, [*cycle, (0, 2)], directed=True)


def adaptive_sum(gradient, inner, params, num_workers, num_steps):
    def pair(a, b):
        dot, aa, bb = (jnp.sum(x * y) for x, y in ((a, b), (a, a), (b, b)))
        safe = [jnp.where(n > 0, dot / jnp.where(n > 0, 2 * n, 1), 0) for n in (aa, bb)]
        return (1 - safe[0]) * a + (1 - safe[1]) * b

    state = inner.init(params)
    for i in range(num_steps):
        g = [gradient(params, i, k) for k in range(num_workers)]
        while len(g) > 1:
            g = [jax.tree.map(pair, a, b) for a, b in zip(g[::2], g[1::2], strict=True)]
        updates, state = inner.update(g[0], state, params)
        params = optax.apply_updates(params, updates)
    return [params] * num_workers


def alternate(num_fragments: int):
    def fragment_of(params: Any) -> Any:
        leaves, treedef = jax.tree.flatten(params)
        return jax.tree.unflatten(treedef, [i % num_fragments for i in range(len(leaves))])

    return fragment_of


def nesterov() -> optax.GradientTransformation:
    return optax.sgd(0.7, momentum=0.9, nesterov=True)


FEEDBACK = error_feedback(int8(16))

METHODS = {
    "mean_gradients": Method(lambda inner: optax.chain(mean_gradients("data"), inner), synchronous),
    "mean_gradients int8": Method(
        lambda inner: optax.chain(mean_gradients("data", int8(16)), inner), synchronous, 2e-2
    ),
    "mean_gradients int8 with error feedback": Method(
        lambda inner: optax.chain(mean_gradients("data", FEEDBACK), inner), synchronous, 2e-2
    ),
    "average_params H=1": Method(
        lambda inner: optax.chain(inner, average_params("data", 1)), local(1)
    ),
    "average_params H=2": Method(
        lambda inner: optax.chain(inner, average_params("data", 2)), local(2)
    ),
    "average_params int8 with error feedback": Method(
        lambda inner: optax.chain(inner, average_params("data", 2, codec=FEEDBACK)),
        local(2),
        2e-2,
    ),
    "DiLoCo": Method(
        lambda inner: optax.chain(inner, average_params("data", 2, outer=nesterov())),
        local(2, nesterov()),
        lone_worker_is_inner=False,
    ),
    "DiLoCo int8": Method(
        lambda inner: optax.chain(inner, average_params("data", 2, nesterov(), int8(16))),
        local(2, nesterov()),
        2e-2,
        lone_worker_is_inner=False,
    ),
    "adasum": Method(lambda inner: optax.chain(adasum("data"), inner), adaptive_sum),
    "backup_workers, one missing": Method(
        lambda inner: optax.chain(backup_workers("data", 0, one_missing), inner),
        without_the_missing,
    ),
    "backup_workers with error feedback": Method(
        lambda inner: optax.chain(backup_workers("data", 0, one_missing, FEEDBACK), inner),
        without_the_missing,
        5e-2,
    ),
    "EASGD": Method(
        lambda inner: optax.chain(inner, elastic_average("data", 2, 0.2)),
        elastic(2, 0.2),
        lone_worker_is_inner=False,
    ),
    "EASGD int8": Method(
        lambda inner: optax.chain(inner, elastic_average("data", 1, 0.2, int8(16))),
        elastic(1, 0.2),
        2e-2,
        lone_worker_is_inner=False,
    ),
    "consensus_admm": Method(
        lambda inner: consensus_admm(
            inner, "data", rho=0.5, every=2, prox=prox_l2(0.1), over_relaxation=1.5
        ),
        admm(2, 0.5, 1.5, 0.1),
        lone_worker_is_inner=False,
    ),
    "consensus_admm int8 with error feedback": Method(
        lambda inner: consensus_admm(inner, "data", rho=0.5, every=1, codec=FEEDBACK),
        admm(1, 0.5, 1.0, 0.0),
        2e-2,
        lone_worker_is_inner=False,
    ),
    "streaming DiLoCo": Method(
        lambda inner: optax.chain(
            inner, streaming_diloco("data", 2, 2, nesterov(), fragment_of=alternate(2))
        ),
        streaming(2, 2, 0, 0.0, nesterov()),
        lone_worker_is_inner=False,
    ),
    "streaming DiLoCo, delayed and mixed": Method(
        lambda inner: optax.chain(
            inner,
            streaming_diloco(
                "data", 3, 2, nesterov(), delay=1, mixing=0.5, fragment_of=alternate(2)
            ),
        ),
        streaming(3, 2, 1, 0.5, nesterov()),
        lone_worker_is_inner=False,
    ),
    "parameter_server": Method(lambda inner: parameter_server(inner, "data"), synchronous),
    "parameter_server int8 with error feedback": Method(
        lambda inner: parameter_server(inner, "data", FEEDBACK, FEEDBACK), synchronous, 2e-2
    ),
    "parameter_server, Downpour": Method(
        lambda inner: parameter_server(
            inner, "data", push_every=2, pull_every=3, local=optax.sgd(0.05)
        ),
        downpour(2, 3, 0.05),
        lone_worker_is_inner=False,
    ),
    "gossip": Method(lambda inner: optax.chain(inner, gossip("data", ring)), gossiping(ring)),
    "gossip, adapt then combine, one peer": Method(
        lambda inner: optax.chain(
            inner, gossip("data", one_peer_exponential, order="adapt_then_combine")
        ),
        gossiping(one_peer_exponential, adapt_first=True),
    ),
    "gossip int8": Method(
        lambda inner: optax.chain(inner, gossip("data", ring, codec=int8(16))),
        gossiping(ring),
        5e-2,
    ),
    "choco": Method(
        lambda inner: optax.chain(inner, choco("data", ring, None, 1.0)),
        gossiping(ring, adapt_first=True),
    ),
    "choco int8": Method(
        lambda inner: optax.chain(inner, choco("data", ring, int8(16), 1.0)),
        gossiping(ring, adapt_first=True),
        2e-2,
    ),
    "push_sum": Method(
        lambda inner: optax.chain(inner, push_sum("data")), pushing(one_peer_exponential)
    ),
    "push_sum, directed": Method(
        lambda inner: optax.chain(inner, push_sum("data", one_way)), pushing(one_way)
    ),
    "mean_gradients PowerSGD": Method(
        lambda inner: optax.chain(mean_gradients("data", power_sgd(2, min_ratio=1)), inner),
        low_rank(2),
        1e-4,
    ),
    "average_params PowerSGD": Method(
        lambda inner: optax.chain(
            inner, average_params("data", 2, codec=power_sgd(4, min_ratio=0))
        ),
        local(2),
        5e-2,
    ),
    "one_bit_adam, exact": Method(
        lambda inner: one_bit_adam("data", 3e-2, 2, codec=None),
        frozen_adam(3e-2, 2),
        lone_worker_is_inner=False,
    ),
    # A large eps: an element of little variance moves by what the codec lost over its root.
    "one_bit_adam int8 with error feedback": Method(
        lambda inner: one_bit_adam("data", 3e-2, 2, eps=0.1, codec=FEEDBACK),
        frozen_adam(3e-2, 2, eps=0.1),
        2e-3,
        lone_worker_is_inner=False,
    ),
    "zero_one_adam, exact": Method(
        lambda inner: zero_one_adam(
            "data", 3e-2, 2, kappa=1, double_every=1, max_interval=2, codec=None
        ),
        zero_one(3e-2, 2, 1, 1, 2),
        lone_worker_is_inner=False,
    ),
    "zero_one_adam int8 with error feedback": Method(
        lambda inner: zero_one_adam("data", 3e-2, 3, max_interval=1, eps=0.1, codec=FEEDBACK),
        zero_one(3e-2, 3, 16, 1, 1, eps=0.1),
        2e-3,
        lone_worker_is_inner=False,
    ),
    "dgc, all sent": Method(
        lambda inner: optax.chain(dgc("data", 0), inner), with_momentum, lone_worker_is_inner=False
    ),
    "dgc": Method(
        lambda inner: optax.chain(dgc("data", 0.9, warmup_steps=4), inner),
        with_momentum,
        0.1,  # what is held back; test_dgc.py has the algorithm to the last digit
        lone_worker_is_inner=False,
    ),
}
