"""Small problems in NumPy for the tests of the pace: f64, nothing to compile."""

import numpy as np

from jdml.communicate.pace import SgdWorker, Task


class Quadratic(Task):
    """``f_k(w) = (1/2) sum_i a_ki (w_i - t_ki)^2``, and noise that depends on worker and step."""

    def __init__(self, num_workers, size=3, learning_rate=0.1, noise=0.0, gradients=False, seed=0):
        draws = np.random.default_rng(seed)
        self.curvature = 0.5 + draws.random((num_workers, size))
        self.target = draws.standard_normal((num_workers, size))
        self.learning_rate, self.noise, self.gradients = learning_rate, noise, gradients
        self.num_steps_taken = 0

    def init(self, worker, params):
        return ()

    def gradient(self, worker, w, index):
        g = self.curvature[worker] * (w - self.target[worker])
        if self.noise:
            g = g + self.noise * np.random.default_rng([worker, index]).standard_normal(g.shape)
        return g

    def step(self, worker, params, state, index, towards=None):
        self.num_steps_taken += 1
        w = params["w"]
        g = self.gradient(worker, w, index)
        if towards is not None:
            g = g + towards.rho * (w - towards.centre["w"])
        update = g if self.gradients else -self.learning_rate * g
        return {"w": update}, state, 0.5 * float(g @ g)

    @property
    def optimum(self):
        """Of the mean of the workers' losses."""
        return (self.curvature * self.target).sum(0) / self.curvature.sum(0)


def start(size=3):
    return {"w": np.zeros(size)}


def sgd_workers(task, num_workers, **options):
    return [SgdWorker(k, task, **options) for k in range(num_workers)]
