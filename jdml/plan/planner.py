"""Every mesh that divides, predicted and ranked; the best few compiled."""

import dataclasses
from collections.abc import Callable, Sequence

from jdml.models import TransformerConfig
from jdml.plan.algorithm import Algorithm
from jdml.plan.layout import Layout, layouts, refusal
from jdml.plan.program import Compiled, DoesNotFit, compile_step, has_libtpu, tpu_mesh
from jdml.plan.roofline import Prediction, predict_step
from jdml.plan.topology import Topology


@dataclasses.dataclass(frozen=True)
class Case:
    """What is to be run.

    Attributes:
      config: The model.
      topology: The chips.
      batch: Samples of a step, on all chips together.
      seq: Tokens of a sample.
      algorithm: What the workers exchange.
    """

    config: TransformerConfig
    topology: Topology
    batch: int
    seq: int
    algorithm: Algorithm

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise ValueError(f"batch must be at least 1, got {self.batch}")
        if not 1 <= self.seq <= self.config.max_seq_len:
            raise ValueError(
                f"seq={self.seq}: expected 1 to max_seq_len={self.config.max_seq_len} tokens; "
                "raise max_seq_len in the model's configuration, or take a shorter sequence"
            )

    def predict(self, layout: Layout) -> Prediction:
        """One mesh.

        Raises:
          ValueError: it does not divide the model, the batch or the chips.
        """
        reason = refusal(layout, self.config, self.topology, self.batch)
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
        return compile_step(self.config, mesh, self.batch, self.seq, self.algorithm)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What :func:`make_plan` found.

    Attributes:
      case: What was asked.
      ranked: Meshes, those that fit first, then by predicted time.
      compiled: Of the best few: the program, or why there is none.
      note: Why nothing was compiled; empty if something was, or nothing was to be.
    """

    case: Case
    ranked: tuple[Prediction, ...]
    compiled: dict[Layout, Compiled | DoesNotFit]
    note: str = ""


def make_plan(
    case: Case,
    num_compiled: int = 0,
    only: Sequence[Layout] = (),
    on_compiled: Callable[[Layout, Compiled | DoesNotFit], None] = lambda layout, found: None,
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
    candidates = list(only) or layouts(case.config, case.topology, case.batch)
    ranked = sorted(map(case.predict, candidates), key=lambda one: (not one.fits, one.seconds))
    if not ranked[0].fits:
        raise ValueError(fits_nowhere(case, ranked))
    note = ""
    if num_compiled and not case.topology.is_tpu:
        note = "By formula alone: compiling ahead of time knows TPUs only."
    elif num_compiled and not has_libtpu():
        from jdml.plan.program import INSTALL

        note = f"By formula alone: libtpu is not installed. To compile as well: {INSTALL}."
    compiled: dict[Layout, Compiled | DoesNotFit] = {}
    for one in ranked[: 0 if note else num_compiled]:
        if one.fits:
            try:
                compiled[one.layout] = case.compile(one.layout)
            except DoesNotFit as error:
                compiled[one.layout] = error
            on_compiled(one.layout, compiled[one.layout])
    return Plan(case, tuple(ranked), compiled, note)


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
    per_chip = case.batch // (best.layout.data * best.layout.fsdp)
    if per_chip > 1:
        half = best.layout.data * best.layout.fsdp * (per_chip // 2)
        saved = (
            memory.total - dataclasses.replace(case, batch=half).predict(best.layout).memory.total
        )
        if saved > 0:
            help_.append(f"a batch of {half} (saves {_gigabytes(saved)})")
    if case.seq > 1:
        saved = (
            memory.total
            - dataclasses.replace(case, seq=case.seq // 2).predict(best.layout).memory.total
        )
        if saved > 0:
            help_.append(f"sequences of {case.seq // 2} tokens (saves {_gigabytes(saved)})")
    state = memory.parameters + memory.gradients + memory.optimiser
    help_.append(
        f"more chips (parameters, gradients and optimiser take {_gigabytes(state)} here, and are "
        f"divided over fsdp × model = {best.layout.fsdp * best.layout.model})"
    )
    return (
        f"{config.num_params:,} parameters fit on no mesh of {case.topology} with a batch of "
        f"{case.batch} × {case.seq}: {best.layout} needs least, {_gigabytes(memory.total)} a chip, "
        f"{missing:,} bytes more than its {_gigabytes(best.capacity)}. What would help: "
        + "; ".join(help_)
    )


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.2f} GB"
