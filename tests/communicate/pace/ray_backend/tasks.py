"""What workers compute in their own processes, and what servers note there."""

import json
import os
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jdml.communicate.pace import OptaxTask, SgdWorker
from tests.communicate.pace.problems import Quadratic


class Timed(Quadratic):
    """Takes some wall time for a step, more of some workers."""

    def __init__(self, num_workers, seconds):
        super().__init__(num_workers, noise=0.1)
        self.seconds = seconds

    def step(self, worker, *args):
        time.sleep(self.seconds[worker])
        return super().step(worker, *args)


class TimedWorkers:
    """``number -> Worker``."""

    def __init__(self, seconds):
        self.seconds = seconds

    def __call__(self, number):
        return SgdWorker(number, Timed(len(self.seconds), self.seconds))


class Failing(Quadratic):
    """Worker 1 raises at its step 3."""

    def step(self, worker, params, state, index, towards=None):
        if worker == 1 and index == 3:
            raise FloatingPointError("the loss is no number")
        return super().step(worker, params, state, index, towards)


def failing_worker(number):
    return SgdWorker(number, Failing(2))


def wrong_worker(number):
    return SgdWorker(7, Quadratic(8))


class Note:
    """Writes every update that a server applies to a file of its process."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __call__(self, applied):
        with open(f"{self.folder}/{os.getpid()}.jsonl", "a") as file:
            file.write(json.dumps([time.monotonic(), *applied]) + "\n")


class TwoDevices(OptaxTask):
    """A linear model whose batch lies on both devices of the process."""

    def __init__(self):
        assert jax.device_count() == 2
        mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
        rows = NamedSharding(mesh, P("data"))
        x = np.random.default_rng(0).standard_normal((8, 3)).astype(np.float32)
        batch = jax.device_put((x, x @ np.array([1.0, -2.0, 3.0], np.float32)), rows)

        def loss(params, batch, key):
            x, y = batch
            return jnp.mean((x @ params["w"] - y) ** 2), {}

        super().__init__(loss, optax.sgd(0.1), lambda worker, index: batch)


def spmd_worker(number):
    return SgdWorker(number, TwoDevices())
