"""Every mesh that divides, predicted and ranked; the best few compiled, each in its own process."""

import dataclasses
import math
from collections.abc import Callable, Sequence

from jdml.models import TransformerConfig
from jdml.plan.algorithm import Algorithm
from jdml.plan.apart import Failed, compile_apart
from jdml.plan.candidates import layouts, refusal
from jdml.plan.layout import Layout, schedule_of
from jdml.plan.program import Compiled, DoesNotFit, compile_step, has_libtpu, tpu_mesh
from jdml.plan.roofline import Prediction, predict_step
from jdml.plan.topology import Topology

Found = Compiled | DoesNotFit | Failed


@dataclasses.dataclass(frozen=True)
class Case:
    """What is to be run.

    Attributes:
      config: The model.
      topology: The chips.
      batch: Samples of a step, on all chips together.
      seq: Tokens of a sample.
      algorithm: What the workers exchange.
      schedule: Of pipelines, where layouts are not given: one of ``jdml.plan.layout.SCHEDULES``.
    """

    config: TransformerConfig
    topology: Topology
    batch: int
    seq: int
    algorithm: Algorithm
    schedule: str = "1f1b"

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise ValueError(f"batch must be at least 1, got {self.batch}")
        schedule_of(self.schedule)
        if not 1 <= self.seq <= self.config.max_seq_len:
            raise ValueError(
                f"seq={self.seq}: expected 1 to max_seq_len={self.config.max_seq_len} tokens; "
                "raise max_seq_len in the model's configuration, or take a shorter sequence"
            )

    def refusal(self, layout: Layout) -> str | None:
        """Why the layout cannot be, or None."""
        return refusal(layout, self.config, self.topology, self.batch, self.seq)

    def predict(self, layout: Layout) -> Prediction:
        """One mesh.

        Raises:
          ValueError: it does not divide the model, the batch or the chips.
        """
        reason = self.refusal(layout)
        if reason is not None:
            raise ValueError(f"{layout}: {reason}")
        return predict_step(
            self.config, self.topology, layout, self.batch, self.seq, self.algorithm
        )

    def compile(self, layout: Layout) -> Compiled:
        """One mesh, ahead of time.

        Raises:
          ValueError: this machine cannot compile for the topology.
          DoesNotFit: the compiler found no room.
        """
        mesh = tpu_mesh(self.topology, layout)
        return compile_step(self.config, layout, mesh, self.batch, self.seq, self.algorithm)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What :func:`make_plan` found.

    Attributes:
      case: What was asked.
      ranked: Meshes, those that fit first, then by predicted time; of a pipeline with the number
        of micro-batches that is best.
      compiled: Of the best few: the program, or why there is none.
      note: Why nothing was compiled; empty if something was, or nothing was to be.
    """

    case: Case
    ranked: tuple[Prediction, ...]
    compiled: dict[Layout, Found]
    note: str = ""


def make_plan(
    case: Case,
    num_compiled: int = 0,
    only: Sequence[Layout] = (),
    on_compiled: Callable[[Layout, Found], None] = lambda layout, found: None,
) -> Plan:
    """Ranks every mesh that divides, and compiles the best.

    Args:
      case: What is to be run.
      num_compiled: How many to compile, of those that are predicted to fit.
      only: Meshes to look at; all that divide where empty.
      on_compiled: Called after each.

    Raises:
      ValueError: no mesh divides, or the model fits on none: says how many bytes are missing, and
        what would help.
    """
    candidates = list(only) or layouts(
        case.config, case.topology, case.batch, case.seq, case.schedule
    )
    ranked = sorted(map(case.predict, candidates), key=lambda one: (not one.fits, one.seconds))
    if not only:
        ranked = _one_of_each_mesh(ranked)
    if not ranked[0].fits:
        raise ValueError(fits_nowhere(case, ranked))
    note = ""
    if num_compiled and not case.topology.is_tpu:
        note = "By formula alone: compiling ahead of time knows TPUs only."
    elif num_compiled and not has_libtpu():
        from jdml.plan.program import INSTALL

        note = f"By formula alone: libtpu is not installed. To compile as well: {INSTALL}."
    compiled: dict[Layout, Found] = {}
    for one in ranked[: 0 if note else num_compiled]:
        if one.fits:
            compiled[one.layout] = compile_apart(case, one.layout)
            on_compiled(one.layout, compiled[one.layout])
    return Plan(case, tuple(ranked), compiled, note)


def _one_of_each_mesh(ranked: list[Prediction]) -> list[Prediction]:
    """The first of those that differ in their micro-batches alone."""
    best: dict[Layout, Prediction] = {}
    for one in ranked:
        best.setdefault(dataclasses.replace(one.layout, micro_batches=1), one)
    return list(best.values())


def fits_nowhere(case: Case, ranked: Sequence[Prediction]) -> str:
    """How many bytes are missing on the mesh that needs fewest, and what would help."""
    best = min(ranked, key=lambda one: one.memory.total)
    missing = best.memory.total - best.capacity
    config, memory = case.config, best.memory
    help_: list[str] = []
    if config.remat != "full":
        full = dataclasses.replace(case, config=dataclasses.replace(config, remat="full"))
        saved = memory.total - full.predict(best.layout).memory.total
        if saved > 0:
            help_.append(f"remat='full' (saves {_gigabytes(saved)})")
    parts = best.layout.samples * best.layout.micro_batches
    per_chip = case.batch // parts
    if per_chip > 1:
        half = parts * (per_chip // 2)
        saved = (
            memory.total - dataclasses.replace(case, batch=half).predict(best.layout).memory.total
        )
        if saved > 0:
            help_.append(f"a batch of {half} (saves {_gigabytes(saved)})")
    shorter = dataclasses.replace(case, seq=case.seq // 2) if case.seq > 1 else None
    if shorter is not None and shorter.refusal(best.layout) is None:
        saved = memory.total - shorter.predict(best.layout).memory.total
        if saved > 0:
            help_.append(f"sequences of {case.seq // 2} tokens (saves {_gigabytes(saved)})")
    state = memory.parameters + memory.gradients + memory.optimiser
    help_.append(
        f"more chips (parameters, gradients and optimiser take {_gigabytes(state)} here, and are "
        f"divided over {_dividing(best.layout)})"
    )
    return (
        f"{config.num_params:,} parameters fit on no mesh of {case.topology} with a batch of "
        f"{case.batch} × {case.seq}: {best.layout} needs least, {_gigabytes(memory.total)} a chip, "
        f"{missing:,} bytes more than its {_gigabytes(best.capacity)}. What would help: "
        + "; ".join(help_)
    )


def _dividing(layout: Layout) -> str:
    """The axes that divide a chip's share of the model."""
    names = [name for name in ("stage", "fsdp", "expert", "model") if name in layout.sizes]
    return f"{' × '.join(names)} = {math.prod(layout.sizes[name] for name in names)}"


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.2f} GB"
