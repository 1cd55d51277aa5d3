"""Steps in turns: a method's, and the hand-written one that it is compared with."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.aggregate.cases import CASES, HANDS, OPTIMIZERS
from benchmarks.aggregate.hand import hand_written
from jdml.models import Transformer, TransformerConfig, next_token_loss
from jdml.sharding import make_mesh, no_mesh
from jdml.train import make_step

PyTree = Any
NUM_WORKERS = 8
ALONE = "alone"
TARGETS = {ALONE: 1.05, "exchange": 1.10}


@dataclass(frozen=True)
class Size:
    """The model and the batch.

    Attributes:
      samples: Per worker.
      seq: Tokens of a sample.
      model: The transformer.
    """

    samples: int = 8
    seq: int = 128
    model: TransformerConfig = field(default_factory=TransformerConfig)


class Seconds(NamedTuple):
    """Of one step: on the clock, and of processor time, which a busy machine disturbs less."""

    wall: float
    cpu: float


class Times(NamedTuple):
    """The same step by both, round by round."""

    ours: list[Seconds]
    hand: list[Seconds]

    def summary(self) -> dict[str, float]:
        """Medians over rounds: of wall seconds, of the ratio of these, and of processor time.

        ``"low"`` and ``"high"``: between which the true median of the ratio lies, see
        :func:`bounds`.
        """
        ours, hand = np.array(self.ours), np.array(self.hand)
        ratios = ours / hand
        wall, cpu = np.median(ratios, axis=0)
        low, high = bounds(ratios[:, 0])
        found = {"ours": np.median(ours[:, 0]), "hand": np.median(hand[:, 0])}
        found |= {"ratio": wall, "cpu_ratio": cpu, "low": low, "high": high}
        return {k: float(x) for k, x in found.items()}


def bounds(sample: np.ndarray) -> tuple[float, float]:
    """Two order statistics with the median between them in about 95 of 100 samples.

    Each value lies below the median as a coin falls, whatever the distribution: the ranks are
    ``n/2 -+ 0.98 sqrt(n)``. Below six values, all of them are too few.
    """
    ordered, n = np.sort(sample), len(sample)
    rank = max(int(n / 2 - 0.98 * n**0.5), 0)
    return float(ordered[rank]), float(ordered[n - 1 - rank])


class Bench:
    """The problem, and the hand-written steps, compiled when they are first needed."""

    def __init__(self, size: Size) -> None:
        self.mesh: Mesh = make_mesh({"data": NUM_WORKERS}, devices=jax.devices()[:NUM_WORKERS])

        def model() -> Transformer:
            return Transformer(size.model, rngs=nnx.Rngs(0))

        graphdef = nnx.graphdef(nnx.eval_shape(model))
        self.params = jax.jit(lambda: nnx.to_pure_dict(nnx.state(model())))()
        shape = (NUM_WORKERS * size.samples, size.seq + 1)
        tokens = jax.random.randint(jax.random.key(0), shape, 0, size.model.vocab_size)
        self.batch = jax.device_put(
            {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]},
            NamedSharding(self.mesh, P("data")),
        )

        def loss_fn(params: PyTree, batch: PyTree) -> jax.Array:
            with no_mesh():  # one device a worker
                model = nnx.merge(graphdef, params)
                return next_token_loss(model, batch["inputs"], batch["targets"])

        self.loss_fn = loss_fn

    @functools.cache  # noqa: B019
    def hand(self, phase: str, optimizer: str) -> Callable[[], Any]:
        """A hand-written step, as a function of nothing."""
        init, step = hand_written(self.loss_fn, OPTIMIZERS[optimizer](), HANDS[phase], self.mesh)
        return self._carried(step, init(self.params))

    def method(self, name: str) -> Callable[[], Any]:
        """The step of a method."""

        def loss_fn(params: PyTree, batch: PyTree, key: jax.Array) -> tuple[jax.Array, dict]:
            return self.loss_fn(params, batch), {}

        init, step = make_step(loss_fn, CASES[name].tx(), self.mesh)
        return self._carried(step, init(self.params))

    def measure(self, name: str, rounds: int, most: int = 0) -> dict[str, Times]:
        """Times of a method's steps without exchange (``"alone"``) and of the others.

        Args:
          name: Key of ``CASES``.
          rounds: How often every step of a cycle is timed.
          most: Rounds go on up to so many while a target lies between the bounds of a ratio.
        """
        case = CASES[name]
        run = self.method(name)
        found = {ALONE: Times([], []), "exchange": Times([], [])}
        for number in range(-2, max(rounds, most)):  # the first two warm up
            if number >= rounds and not any(open_between(k, t) for k, t in found.items()):
                break
            for phase in case.phases:
                hand = self.hand(phase, case.optimizer)
                # Who goes first finds the caches as the step before left them.
                pair = (run, hand) if number % 2 else (hand, run)
                seconds = {step: timed(step) for step in pair}
                if number >= 0:
                    times = found[ALONE if phase == ALONE else "exchange"]
                    times.ours.append(seconds[run][0])
                    times.hand.append(seconds[hand][0])
                    check_phase(name, phase, seconds[run][1])
        return {kind: times for kind, times in found.items() if times.ours}

    def _carried(self, step: Callable[..., Any], state: PyTree) -> Callable[[], Any]:
        """The step with its state carried along; returns what is not state."""
        held = [state]

        def run() -> Any:
            held[0], result = step(held[0], self.batch)
            return jax.block_until_ready((held[0], result))[1]

        return run


def open_between(kind: str, times: Times) -> bool:
    """Whether it is not decided yet if the ratio is within its target."""
    if not times.ours:
        return False
    summary = times.summary()
    return summary["low"] <= TARGETS[kind] < summary["high"]


def timed(run: Callable[[], Any]) -> tuple[Seconds, Any]:
    """How long it took, and the result."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = run()
    return Seconds(time.perf_counter() - wall, time.process_time() - cpu), result


def check_phase(name: str, phase: str, metrics: dict[str, jax.Array]) -> None:
    """Raises unless the method says that it exchanged when it should have."""
    # What numbers the graphs of a cycle is no branch between exchanging and not.
    taken = {key.removeprefix("branch."): x for key, x in metrics.items() if "branch." in key}
    branches = [float(x) for name, x in taken.items() if name != "round"]
    if branches and (1 in branches) == (phase == ALONE):
        raise RuntimeError(f"{name}: step {phase!r} took branches {branches}.")
