"""What the workers compute: the minimum of their own part and the penalty."""

from typing import Any

import jax
import numpy as np
import optax

from experiments.admm.convex import Problem
from jdml.communicate.pace import Task, Towards


class Minimise(Task):
    """``argmin_x f_k(x) + rho/2 |x - c|^2``, from the worker's last x, by L-BFGS without a state.

    One step of it is a whole minimisation, as the method takes it: f64, a fixed number of steps
    with the step size 1, full batches.
    """

    def __init__(self, problem: Problem, num_workers: int, num_steps: int) -> None:
        self._shares = {
            k: v.reshape(num_workers, -1, *v.shape[1:]) for k, v in problem.batch.items()
        }
        solver = optax.lbfgs(1.0, memory_size=num_steps, linesearch=None)

        @jax.jit
        def minimum(params: Any, batch: Any, towards: Towards) -> Any:
            def value(x: Any) -> jax.Array:
                loss, _ = problem.loss_fn(x, batch, None)
                squares = jax.tree.map(lambda a, c: ((a - c) ** 2).sum(), x, towards.centre)
                return loss + towards.rho / 2 * jax.tree.reduce(lambda a, b: a + b, squares)

            def step(carry: Any, _: Any) -> Any:
                x, state = carry
                gradient = jax.grad(value)(x)
                move, state = solver.update(gradient, state, x)
                return (optax.apply_updates(x, move), state), None

            (x, _), _ = jax.lax.scan(step, (params, solver.init(params)), length=num_steps)
            return x, value(x)

        self._minimum = minimum

    def share(self, worker: int) -> dict[str, np.ndarray]:
        """A worker's samples."""
        return {k: v[worker] for k, v in self._shares.items()}

    def init(self, worker: int, params: Any) -> Any:
        return ()

    def step(
        self, worker: int, params: Any, state: Any, index: int, towards: Towards | None = None
    ) -> tuple[Any, Any, Any]:
        assert towards is not None
        x, value = self._minimum(params, self.share(worker), towards)
        return jax.tree.map(lambda a, b: np.asarray(a) - b, x, params), state, float(value)
