"""One process of the links benchmark: takes means over the link, and counts time and bytes.

Started by `benchmarks.links`, once per namespace. Prints one line of JSON:
``{method: {"seconds": [...], "sent_bytes": [...], "relative_error": ...}}``, one entry per round.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.namespaces import sent_bytes

AXIS = "data"


@dataclass(frozen=True)
class Job:
    """What one process is told."""

    coordinator: str
    num_workers: int
    worker: int
    num_elements: int
    """f32 elements that each worker holds."""
    num_rounds: int
    num_warm_up: int
    blocks: list[int] = field(default_factory=list)
    """Block sizes of the int8 codec; empty measures the exact psum alone."""


def _methods(job: Job) -> dict[str, Callable[[jax.Array], jax.Array]]:
    methods = {"exact": lambda x: jax.lax.psum(x, AXIS) / job.num_workers}
    if job.blocks:
        from jdml.communicate import all_reduce_mean
        from jdml.communicate.codecs import int8

        for block in job.blocks:
            codec = int8(block=block)
            methods[f"int8 block={block}"] = lambda x, codec=codec: all_reduce_mean(
                x, AXIS, codec=codec
            )
    return methods


def measure(job: Job) -> dict[str, dict]:
    """Alternates the methods round by round, so that a slow spell of the machine hits all."""
    mesh = jax.make_mesh((job.num_workers,), (AXIS,), axis_types=(AxisType.Auto,))
    per_worker = NamedSharding(mesh, P(AXIS))

    def on_every_worker(method):
        return jax.jit(
            jax.shard_map(lambda x: method(x[0]), mesh=mesh, in_specs=P(AXIS), out_specs=P())
        )

    def values(worker: int) -> np.ndarray:
        return np.random.default_rng(worker).standard_normal(job.num_elements, dtype=np.float32)

    x = jax.make_array_from_process_local_data(per_worker, values(job.worker)[None])
    expected = sum(values(i).astype(np.float64) for i in range(job.num_workers)) / job.num_workers
    functions = {name: on_every_worker(method) for name, method in _methods(job).items()}

    token = jax.make_array_from_process_local_data(per_worker, np.ones((1,), np.float32))
    meet = jax.jit(
        jax.shard_map(
            lambda t: jax.lax.psum(jnp.sum(t), AXIS), mesh=mesh, in_specs=P(AXIS), out_specs=P()
        )
    )

    result: dict[str, dict] = {}
    for name, function in functions.items():
        got = np.asarray(function(x).addressable_data(0), dtype=np.float64)
        error = float(np.linalg.norm(got - expected) / np.linalg.norm(expected))
        result[name] = {"seconds": [], "sent_bytes": [], "relative_error": error}
    for i in range(job.num_warm_up + job.num_rounds):
        for name, function in functions.items():
            meet(token).block_until_ready()
            sent, start = sent_bytes(), time.perf_counter()
            function(x).block_until_ready()
            seconds = time.perf_counter() - start
            meet(token).block_until_ready()  # the others are done: so is what they asked of me
            if i >= job.num_warm_up:
                result[name]["seconds"].append(seconds)
                result[name]["sent_bytes"].append(sent_bytes() - sent)
    return result


def main(job: Job) -> None:
    """Joins the other processes, measures, prints."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 1)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        job.coordinator, job.num_workers, job.worker, initialization_timeout=60
    )
    result = measure(job)
    jax.distributed.shutdown()
    print(json.dumps(result))
    sys.stdout.flush()


if __name__ == "__main__":
    main(tyro.cli(Job))
