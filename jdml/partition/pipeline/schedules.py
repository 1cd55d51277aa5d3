"""The schedules: GPipe, 1F1B, interleaved 1F1B, zero-bubble (ZB-H1)."""

from dataclasses import dataclass
from typing import ClassVar

from jdml.partition.pipeline.schedule import Kind, Op, Orders, Schedule


@dataclass(frozen=True)
class GPipe(Schedule):
    """See :func:`gpipe`."""

    @property
    def name(self) -> str:
        return "GPipe"

    def orders(self, num_stages: int, micro_batches: int) -> Orders:
        self.check(num_stages, micro_batches)
        every = range(micro_batches)
        return [[Op("F", m) for m in every] + [Op("B", m) for m in every]] * num_stages

    def bubble(
        self, num_stages: int, micro_batches: int, t_f: float, t_b: float, t_w: float
    ) -> float:
        return (num_stages - 1) / (micro_batches + num_stages - 1)

    def peak_activations(self, num_stages: int, micro_batches: int) -> list[int]:
        return [micro_batches] * num_stages


@dataclass(frozen=True)
class OneFOneB(Schedule):
    """See :func:`one_f_one_b`."""

    @property
    def name(self) -> str:
        return "1F1B"

    def orders(self, num_stages: int, micro_batches: int) -> Orders:
        self.check(num_stages, micro_batches)
        forward = [Op("F", m) for m in range(micro_batches)]
        backward = [Op("B", m) for m in range(micro_batches)]
        return [
            _alternating(forward, backward, num_stages - 1 - stage) for stage in range(num_stages)
        ]

    def bubble(
        self, num_stages: int, micro_batches: int, t_f: float, t_b: float, t_w: float
    ) -> float:
        return (num_stages - 1) / (micro_batches + num_stages - 1)

    def peak_activations(self, num_stages: int, micro_batches: int) -> list[int]:
        return [min(num_stages - stage, micro_batches) for stage in range(num_stages)]


@dataclass(frozen=True)
class Interleaved(Schedule):
    """See :func:`interleaved`."""

    @property
    def name(self) -> str:
        return f"interleaved 1F1B, {self.chunks} chunks"

    def check(self, num_stages: int, micro_batches: int) -> None:
        super().check(num_stages, micro_batches)
        if micro_batches % num_stages:
            down = micro_batches // num_stages * num_stages
            raise ValueError(
                f"{self.name}: {micro_batches} micro-batches for {num_stages} stages; they go "
                f"round in groups of {num_stages}. Use {down} or {down + num_stages}."
            )

    def orders(self, num_stages: int, micro_batches: int) -> Orders:
        self.check(num_stages, micro_batches)
        # A group of num_stages micro-batches goes through all chunks, then the next group.
        forward, backward = (
            [
                Op(kind, start + i, chunk)
                for start in range(0, micro_batches, num_stages)
                for chunk in chunks
                for i in range(num_stages)
            ]
            for kind, chunks in _there_and_back(self.chunks)
        )
        return [
            _alternating(forward, backward, self._ahead(num_stages, stage))
            for stage in range(num_stages)
        ]

    def _ahead(self, num_stages: int, stage: int) -> int:
        return (self.chunks - 1) * num_stages + 2 * (num_stages - 1 - stage)

    def bubble(
        self, num_stages: int, micro_batches: int, t_f: float, t_b: float, t_w: float
    ) -> float:
        return (num_stages - 1) / (micro_batches * self.chunks + num_stages - 1)

    def peak_activations(self, num_stages: int, micro_batches: int) -> list[int]:
        most = micro_batches * self.chunks
        return [min(self._ahead(num_stages, s) + 1, most) for s in range(num_stages)]


@dataclass(frozen=True)
class ZeroBubble(Schedule):
    """See :func:`zero_bubble`."""

    splits_backward: ClassVar[bool] = True

    @property
    def name(self) -> str:
        return "ZB-H1"

    def orders(self, num_stages: int, micro_batches: int) -> Orders:
        self.check(num_stages, micro_batches)
        orders: Orders = []
        for stage in range(num_stages):
            ahead = num_stages - 1 - stage
            order = [Op("F", m) for m in range(ahead)]
            for m in range(micro_batches):
                order += [Op("F", m + ahead)] if m + ahead < micro_batches else []
                order += [Op("B", m)]
                # With ``stage`` of them put off, every stage holds as much as stage 0 does.
                order += [Op("W", m - stage)] if m >= stage else []
            orders.append(order + [Op("W", m) for m in range(micro_batches - stage, micro_batches)])
        return orders

    def bubble(
        self, num_stages: int, micro_batches: int, t_f: float, t_b: float, t_w: float
    ) -> float:
        waiting = (num_stages - 1) * (t_f + t_b - t_w)
        return waiting / (micro_batches * (t_f + t_b + t_w) + waiting)

    def peak_activations(self, num_stages: int, micro_batches: int) -> list[int]:
        return [num_stages] * num_stages


def gpipe() -> Schedule:
    """All micro-batches forward, then all backward.

    A stage holds the activations of all M micro-batches, and waits ``(S-1) / (M+S-1)`` of the time.

    Reference: Huang et al., "GPipe: efficient training of giant neural networks using pipeline
    parallelism", 2019.
    """
    return GPipe()


def one_f_one_b() -> Schedule:
    """Forward and backward in turns, after as many forward as there are stages behind.

    Stage s holds the activations of ``S - s`` micro-batches, however many there are, and waits as
    long as with GPipe.

    Reference: Narayanan et al., "Memory-efficient pipeline-parallel DNN training"
    (PipeDream-Flush), 2021.
    """
    return OneFOneB()


def interleaved(chunks: int = 2) -> Schedule:
    """1F1B in which each stage holds ``chunks`` parts of the model, S parts apart.

    A micro-batch goes round the stages ``chunks`` times. The time spent waiting falls by
    ``chunks``, ``(S-1) / (M chunks + S-1)``; activations travel ``chunks`` times as often, and
    stage 0 holds ``(chunks-1) S + 2 (S-1) + 1`` of them, each of ``1/chunks`` of its layers.

    Args:
      chunks: Parts of the model on each stage, at least 2.

    Raises:
      ValueError: fewer than 2 chunks.

    Reference: Narayanan et al., "Efficient large-scale language model training on GPU clusters
    using Megatron-LM", 2021.
    """
    if not isinstance(chunks, int) or chunks < 2:
        raise ValueError(
            f"interleaved: chunks={chunks!r}; expected an int of at least 2 (with 1 it is "
            "one_f_one_b())."
        )
    return Interleaved(chunks)


def zero_bubble() -> Schedule:
    """ZB-H1: the parameters' gradients, for which nobody waits, fill what 1F1B leaves empty.

    At most S micro-batches lie between F and W on any stage, the peak of 1F1B; a stage waits
    ``(S-1)(t_f + t_b - t_w)`` in all, with equal times a third of 1F1B's.

    Reference: Qi et al., "Zero bubble pipeline parallelism", 2023, section 2.3 (ZB-H1).
    """
    return ZeroBubble()


def _there_and_back(chunks: int) -> list[tuple[Kind, list[int]]]:
    return [("F", list(range(chunks))), ("B", list(reversed(range(chunks))))]


def _alternating(forward: list[Op], backward: list[Op], ahead: int) -> list[Op]:
    """``ahead`` forward ones, then forward and backward in turns, then what is left."""
    ahead = min(ahead, len(forward))
    order = forward[:ahead]
    for i, op in enumerate(backward):
        order += [*forward[ahead + i : ahead + i + 1], op]
    return order
