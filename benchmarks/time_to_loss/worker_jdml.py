"""One worker that trains with jdml: started in a namespace, asked what to do."""

from __future__ import annotations

import dataclasses
import json
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.crew import serve
from benchmarks.methods import method
from benchmarks.namespaces import sent_bytes
from benchmarks.time_to_loss.problem import (
    BETAS,
    CLIP,
    EPSILON,
    ONE_BIT_ADAM,
    WEIGHT_DECAY,
    Problem,
    Shape,
    is_decayed,
    one_bit_warm_up,
)
from jdml.aggregate import mean_gradients, one_bit_adam
from jdml.models import Transformer, TransformerConfig, next_token_loss
from jdml.sharding import make_mesh, no_mesh, presets
from jdml.sharding.paths import path_str
from jdml.train import make_evaluate, make_step

PyTree = Any
ALONE = "alone"
"""The step without its exchange, each worker for itself."""


@dataclasses.dataclass(frozen=True)
class Job:
    """What one process is told when it starts."""

    coordinator: str
    num_workers: int
    worker: int
    problem: str
    shape: str
    """JSON of a ``Shape``."""


def tree_of(weights: dict[str, np.ndarray]) -> PyTree:
    """Nested dicts of a table of leaf paths."""
    tree: dict[str, Any] = {}
    for name, array in weights.items():
        *folders, last = name.split("/")
        place = tree
        for folder in folders:
            place = place.setdefault(folder, {})
        place[last] = array
    return tree


def loss_of(shape: Shape) -> Any:
    """``(params, batch, key) -> (loss, {})`` of int32 tokens [rows, seq_len + 1]."""
    with no_mesh():
        config = TransformerConfig(**dataclasses.asdict(shape))
        graphdef = nnx.graphdef(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))

    def loss_fn(params: PyTree, batch: jax.Array, key: Any) -> Any:
        model = nnx.merge(graphdef, params)
        return next_token_loss(model, batch[:, :-1], batch[:, 1:], key=key), {}

    return loss_fn


def optimizer(rates: np.ndarray, params: PyTree) -> optax.GradientTransformation:
    """Clipping and AdamW; ``rates``: the learning rate of each step."""
    table = jnp.asarray(rates)
    decayed = jax.tree_util.tree_map_with_path(lambda path, _: is_decayed(path_str(path)), params)
    return optax.chain(
        optax.clip_by_global_norm(CLIP),
        optax.adamw(
            lambda count: table[count],
            b1=BETAS[0],
            b2=BETAS[1],
            eps=EPSILON,
            weight_decay=WEIGHT_DECAY,
            mask=decayed,
        ),
    )


def chain(name: str, rates: np.ndarray, params: PyTree) -> optax.GradientTransformation:
    """What a method does with gradients."""
    if name == ALONE:
        return optimizer(rates, params)
    if name == ONE_BIT_ADAM:
        table = jnp.asarray(rates)
        # It decays the norms' scales too, and clips before the exchange: it has no inside to reach.
        return optax.chain(
            optax.clip_by_global_norm(CLIP),
            one_bit_adam(
                "data",
                lambda count: table[count],
                one_bit_warm_up(len(rates)),
                *BETAS,
                eps=EPSILON,
                weight_decay=WEIGHT_DECAY,
            ),
        )
    this = method(name)
    means = mean_gradients("data", this.content(), this.pattern)
    return optax.chain(means, optimizer(rates, params))


class Worker:
    """A compiled step and its state."""

    def __init__(self, job: Job) -> None:
        self.problem = Problem(job.problem, job.worker, job.num_workers)
        self.params = tree_of(self.problem.weights)
        self.mesh, self.rules = make_mesh({"data": job.num_workers}), presets.data_parallel()
        self.loss_fn = loss_of(Shape(**json.loads(job.shape)))
        self.evaluate = make_evaluate(self.loss_fn, self.mesh, self.rules)
        self.is_first = job.worker == 0
        self.made: dict[str, Any] = {}
        self.state: Any = None
        self.step: Any = None
        self.number = 0

    def _place(self, local: np.ndarray) -> jax.Array:
        return jax.make_array_from_process_local_data(NamedSharding(self.mesh, P("data")), local)

    def start(self, name: str) -> dict[str, Any]:
        """Back to the initial weights, with this method."""
        if name not in self.made:
            tx = chain(name, self.problem.rates, self.params)
            self.made[name] = make_step(self.loss_fn, tx, self.mesh, rules=self.rules)
        init, self.step = self.made[name]
        self.state = init(jax.tree.map(jnp.asarray, self.params), 0)
        self.number = 0
        return {"num_params": sum(x.size for x in self.problem.weights.values())}

    def train(self, steps: int) -> dict[str, Any]:
        """The next steps: losses, when each ended (a clock that all share), bytes sent."""
        losses, ends = [], []
        sent, begin = sent_bytes(), time.perf_counter()
        for _ in range(steps):
            batch = self._place(self.problem.train[self.number])
            self.state, metrics = jax.block_until_ready(self.step(self.state, batch))
            losses.append(float(metrics["loss"]))
            ends.append(time.perf_counter())
            self.number += 1
        return {"losses": losses, "begin": begin, "ends": ends, "sent": sent_bytes() - sent}

    def validate(self) -> float:
        """Mean loss on the held-out text."""
        params, _ = self.step.consensus(self.state)
        batches = (self._place(rows) for rows in self.problem.valid)
        return self.evaluate(params, batches)["val_loss"]

    def gradient(self, path: str) -> float:
        """Writes the mean gradient of step 0 at the initial weights; returns the loss there."""
        first = self._place(self.problem.train[0])
        whole = jax.jit(lambda x: x, out_shardings=NamedSharding(self.mesh, P()))(first)
        batch = np.asarray(whole.addressable_data(0))
        with no_mesh():
            value_and_grad = jax.jit(jax.value_and_grad(lambda p: self.loss_fn(p, batch, None)[0]))
            loss, gradient = value_and_grad(self.params)
        if self.is_first:
            named = jax.tree_util.tree_leaves_with_path(gradient)
            np.savez(path, **{path_str(where): np.asarray(x) for where, x in named})
        return float(loss)


def main(job: Job) -> None:
    """Joins the other processes and answers questions."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 1)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        job.coordinator, job.num_workers, job.worker, initialization_timeout=120
    )
    worker = Worker(job)
    questions = ("start", "train", "validate", "gradient")
    serve({name: getattr(worker, name) for name in questions})
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(tyro.cli(Job))
