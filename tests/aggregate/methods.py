"""Every aggregation with its dense form: add a method here and the conformance suite runs it.

A reference trains the workers one after the other on one device, as the method's paper writes it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

from jdml.aggregate import average_params, mean_gradients
from jdml.communicate import error_feedback
from jdml.communicate.codecs import int8

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
    """

    make: Callable[[optax.GradientTransformation], optax.GradientTransformation]
    reference: Callable[..., list[Any]]
    tolerance: float = 1e-5


def mean(trees: list[Any]) -> Any:
    return jax.tree.map(lambda *xs: sum(xs) / len(xs), *trees)


def synchronous(gradient: Gradient, inner: Any, params: Any, num_workers: int, num_steps: int):
    state = inner.init(params)
    for i in range(num_steps):
        g = mean([gradient(params, i, k) for k in range(num_workers)])
        updates, state = inner.update(g, state, params)
        params = optax.apply_updates(params, updates)
    return [params] * num_workers


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
                    delta = jax.tree.map(lambda a, b: a - b, anchor, average)
                    updates, outer_state = outer.update(delta, outer_state, anchor)
                    average = optax.apply_updates(anchor, updates)
                anchor = average
                workers = [(anchor, state) for _, state in workers]
        return [params for params, _ in workers]

    return reference


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
    ),
    "DiLoCo int8": Method(
        lambda inner: optax.chain(inner, average_params("data", 2, nesterov(), int8(16))),
        local(2, nesterov()),
        2e-2,
    ),
}
