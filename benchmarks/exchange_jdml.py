"""One worker that takes means with jdml's collectives: started in a namespace, asked what to run.

``benchmarks.links`` and ``benchmarks.wire_audit`` ask it (see ``benchmarks.crew``).
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.crew import serve
from benchmarks.methods import NUM_MATRICES, Method, method
from benchmarks.namespaces import sent_bytes
from jdml.communicate import (
    ErrorFeedback,
    all_gather,
    all_reduce_mean,
    all_to_all,
    broadcast,
    reduce_scatter_mean,
)
from jdml.communicate.codecs import Codec
from jdml.communicate.codecs.reducer import Reducer
from jdml.communicate.exchange import init_exchange

_COLLECTIVES: dict[str, Callable[..., Any]] = {
    "reduce_scatter": reduce_scatter_mean,
    "gather": all_gather,
    "all_to_all": all_to_all,
    "broadcast": broadcast,
}


@dataclasses.dataclass(frozen=True)
class Job:
    """What one process is told when it starts."""

    coordinator: str
    num_workers: int
    worker: int
    side: int
    """Each worker holds the values of four side × side matrices."""
    seed: int = 0


def values(worker: int, side: int, seed: int) -> np.ndarray:
    """What a worker has to say: normal values, f32 ``[4 · side²]``."""
    draw = np.random.default_rng((seed, worker))
    return draw.standard_normal(NUM_MATRICES * side * side, dtype=np.float32)


def relative_error(mean: np.ndarray, num_workers: int, side: int, seed: int) -> float:
    """``|mean - exact| / |exact|`` in f64."""
    exact = sum(values(i, side, seed).astype(np.float64) for i in range(num_workers)) / num_workers
    return float(np.linalg.norm(mean - exact) / np.linalg.norm(exact))


def workers_mesh(pattern: str, devices: Any) -> Mesh:
    """The mesh over which a pattern exchanges, all of its axes being the workers'.

    ``hierarchical`` sees two groups of workers.
    """
    devices = np.asarray(devices)
    shape, names = (devices.size,), ("data",)
    if pattern == "hierarchical":
        shape, names = (2, devices.size // 2), ("group", "member")
    return Mesh(devices.reshape(shape), names, axis_types=(AxisType.Auto,) * len(names))


class Exchange(NamedTuple):
    """Functions of one method, not yet compiled; ``x`` and all of the state have a worker dim.

    Attributes:
      init: ``x -> state``.
      round: ``(x, state, seed) -> (result, state)``.
    """

    init: Callable[..., Any]
    round: Callable[..., Any]


def exchange(this: Method, mesh: Mesh, side: int) -> Exchange:
    """What a method does among the workers of a mesh.

    Reducers see four matrices, since low rank means nothing for a vector; everything else sees the
    vector that they make up.
    """
    content, axes = this.content(), mesh.axis_names
    axis = axes[0] if len(axes) == 1 else axes
    reduces = isinstance(content, Reducer)
    shape = (NUM_MATRICES, side, side) if reduces else (-1,)
    collective = _COLLECTIVES.get(this.pattern)

    def local(x: jax.Array) -> list[jax.Array]:
        x = x[0].reshape(shape)
        return [x[i] for i in range(NUM_MATRICES)] if reduces else [x]

    def init(x: jax.Array) -> Any:
        return jax.tree.map(lambda s: s[None], init_exchange(content, local(x)))

    def one_round(x: jax.Array, state: Any, seed: jax.Array) -> tuple[jax.Array, Any]:
        held = jax.tree.map(lambda s: s[0], state)
        # A reducer's state may be empty, and is wanted all the same.
        kept = {"residual": held} if reduces or jax.tree.leaves(state) else {}
        key = jax.random.key(seed)
        if collective is None:
            result = all_reduce_mean(local(x), axis, content, this.pattern, key=key, **kept)
        else:
            result = collective(local(x), axis, content, key=key, **kept)
        if kept:
            result, held = result
        flat = jnp.concatenate([m.reshape(-1) for m in result]) if reduces else result[0]
        return flat, jax.tree.map(lambda s: s[None], held)

    workers = P(axis)
    out = workers if this.pattern in ("reduce_scatter", "all_to_all") else P()
    return Exchange(
        jax.shard_map(init, mesh=mesh, in_specs=workers, out_specs=workers),
        jax.shard_map(
            one_round, mesh=mesh, in_specs=(workers, workers, P()), out_specs=(out, workers)
        ),
    )


class Worker:
    """Compiled methods with their states, ready to run in turns."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.states: dict[str, Any] = {}
        self.inputs: dict[str, jax.Array] = {}
        self.compiled: dict[str, Any] = {}
        mesh = workers_mesh("two_phase", jax.devices())
        self.token = self._place(np.ones((1,), np.float32), mesh)
        self.meet = jax.jit(
            jax.shard_map(
                lambda t: jax.lax.psum(jnp.sum(t), "data"),
                mesh=mesh,
                in_specs=P("data"),
                out_specs=P(),
            )
        )

    def _place(self, local: np.ndarray, mesh: Mesh) -> jax.Array:
        axes = mesh.axis_names
        sharding = NamedSharding(mesh, P(axes))
        return jax.make_array_from_process_local_data(sharding, local)

    def prepare(self, name: str) -> dict[str, Any]:
        """Compiles a method and runs it once; says how wrong its first mean is."""
        this, job = method(name), self.job
        mesh = workers_mesh(this.pattern, jax.devices())
        x = self._place(values(job.worker, job.side, job.seed)[None], mesh)
        init, one_round = exchange(this, mesh, job.side)
        state = jax.jit(init)(x)
        compiled = jax.jit(one_round).lower(x, state, np.int32(0)).compile()
        result, state = jax.block_until_ready(compiled(x, state, np.int32(0)))
        self.inputs[name], self.states[name], self.compiled[name] = x, state, compiled
        if this.pattern in _COLLECTIVES:  # no mean of everything
            return {"relative_error": None}
        mean = np.asarray(result.addressable_data(0), np.float64)
        return {"relative_error": relative_error(mean, job.num_workers, job.side, job.seed)}

    def round(self, name: str, number: int) -> dict[str, float]:
        """One mean: when it began and ended (a clock that all processes share), bytes sent."""
        run, x, state = self.compiled[name], self.inputs[name], self.states[name]
        seed = np.int32(number)

        def once() -> None:
            _, self.states[name] = jax.block_until_ready(run(x, state, seed))

        return self._measured(once)

    def latency(self, rounds: int) -> float:
        """Seconds of a hop: a sum of one number, which takes 2 (K-1) of them."""
        hops = 2 * (self.job.num_workers - 1)
        seconds = []
        for _ in range(rounds):
            start = time.perf_counter()
            self.meet(self.token).block_until_ready()
            seconds.append((time.perf_counter() - start) / hops)
        return statistics.median(seconds)

    def codec_rate(self, name: str, rounds: int) -> float | None:
        """Bytes of f32 that this process encodes per second, or decodes, the others doing so too.

        None without a codec.
        """
        content = method(name).content()
        codec = content.codec if isinstance(content, ErrorFeedback) else content
        if not isinstance(codec, Codec):
            return None
        num_rows = self.job.num_workers
        mine = values(self.job.worker, self.job.side, self.job.seed)
        length = mine.size // num_rows // codec.granularity * codec.granularity
        rows = jnp.asarray(mine[: num_rows * length].reshape(num_rows, length))

        @jax.jit
        def there_and_back(rows: jax.Array, seed: jax.Array) -> jax.Array:
            payload = codec.encode_rows(rows, jax.random.key(seed))
            return codec.decode_rows(jax.lax.optimization_barrier(payload), length)

        there_and_back(rows, np.int32(0)).block_until_ready()
        seconds = []
        for i in range(rounds):
            self.meet(self.token).block_until_ready()
            start = time.perf_counter()
            there_and_back(rows, np.int32(i)).block_until_ready()
            seconds.append(time.perf_counter() - start)
        return 2 * rows.nbytes / statistics.median(seconds)

    def quiet(self) -> dict[str, float]:
        """A round of nothing: what the barriers around each round send."""
        return self._measured(lambda: None)

    def _measured(self, once: Callable[[], None]) -> dict[str, float]:
        self.meet(self.token).block_until_ready()
        sent, start = sent_bytes(), time.perf_counter()
        once()
        end = time.perf_counter()
        self.meet(self.token).block_until_ready()  # the others are done: so is what they asked
        return {"start": start, "end": end, "sent": sent_bytes() - sent}


def main(job: Job) -> None:
    """Joins the other processes and answers questions."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 1)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        job.coordinator, job.num_workers, job.worker, initialization_timeout=120
    )
    worker = Worker(job)
    questions = ("prepare", "round", "quiet", "latency", "codec_rate")
    serve({name: getattr(worker, name) for name in questions})
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(tyro.cli(Job))
