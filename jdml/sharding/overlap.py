"""What a compiled program computes while its collectives are under way, read off its schedule.

The compiled text of a scheduled program lists the instructions in the order in which they are
issued. A collective that is split into a start and a done leaves the links busy while whatever
stands between the two is computed; one that is not split holds everything up.
"""

import dataclasses
from typing import Any

import jax

from jdml.sharding import hlo
from jdml.sharding.compiled import Collective, chain_of, collectives
from jdml.sharding.hlo_flops import flops, flops_of

ASYNCHRONOUS_ON_TPU = {
    "xla_tpu_enable_async_all_to_all": "true",
    "xla_enable_async_all_reduce": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_reduce": "true",
    "xla_jf_crs_combiner_threshold_in_bytes": "1",
}
"""Compiler options with which TPU programs split all-to-alls and all-reduces into start and done.

By default libtpu (0.0.50.1, v5e) splits collective-permutes and all-gathers alone. All-reduces are
split one by one only, so that the last option keeps the compiler from joining them; those of small
leaves are joined by the library. Nothing tried split a reduce-scatter. For ``make_step(...,
compiler_options=)`` and ``lower(...).compile(compiler_options)``.
"""

_IDLE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "after-all",
    "partition-id",
    "replica-id",
    *(f"{kind}-{end}" for kind in ("copy", "slice", "async") for end in ("start", "done")),
    "async-update",
}
"""Opcodes that take no time of the core's, or next to none."""


@dataclasses.dataclass(frozen=True)
class Overlap:
    """A collective, and what stands between its start and its done.

    Attributes:
      collective: Which; its ``count`` is how often it runs.
      start: Name of the instruction that starts it; that of the whole collective if not split.
      done: Name of the one that waits for it.
      between: ``(name, flops)`` of each instruction that computes between the two, in scheduled
        order, collectives left out; flops of matrix products and convolutions, 0 for others and
        for kernels. Of fused asynchronous collectives (TPU) these are the fusions that carry them.
    """

    collective: Collective
    start: str
    done: str
    between: tuple[tuple[str, int], ...]

    @property
    def flops(self) -> int:
        """Of all that stands between, each time that it runs."""
        return sum(count for _, count in self.between)


def overlap(
    compiled: Any, mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh | None = None
) -> list[Overlap]:
    """For every collective of a program what is computed while it is under way, in their order.

    Args:
      compiled: ``jax.jit(f).lower(...).compile()``, or its HLO text.
      mesh: As for :func:`jdml.sharding.collectives`.

    Raises:
      ValueError: not a compiled program, or its text is in no scheduled order.
    """
    text = compiled if isinstance(compiled, str) else compiled.as_text()
    listed = collectives(compiled, mesh)
    if not listed:
        return []
    if "is_scheduled=true" not in text.partition("\n")[0]:
        raise ValueError(
            "overlap: the program's text is not in scheduled order (its first line lacks "
            "is_scheduled=true), so that what stands between two instructions means nothing. Pass "
            "jitted.lower(...).compile() or its whole as_text()."
        )
    module = hlo.parse(text)
    places = {
        name: computation
        for computation in module.computations.values()
        for name in computation.instructions
    }
    callers = {
        name: (hlo.Frame(computation), this)
        for computation in module.computations.values()
        for this, name, role in hlo.calls(module, hlo.Frame(computation))
        if role in ("fusion", "call")
    }
    return [_around(module, item, places, callers) for item in listed]


def program_flops(compiled: Any) -> int:
    """Of the matrix products and convolutions that one device does in a call of the program."""
    text = compiled if isinstance(compiled, str) else compiled.as_text()
    module = hlo.parse(text)
    return flops_of(module, hlo.Frame(module.computations[module.entry]))


def _around(
    module: hlo.Module,
    item: Collective,
    places: dict[str, hlo.Computation],
    callers: dict[str, tuple[hlo.Frame, hlo.Instruction]],
) -> Overlap:
    frame = hlo.Frame(places[item.name])
    start = frame.look_up(item.name)
    chain = chain_of(start)
    if item.asynchronous and (chain is not None or not start.opcode.endswith(("-start", "send"))):
        # In a fusion, or in a computation of its own, of which the caller is the start.
        frame, start = callers[frame.computation.name]
    order = list(frame.computation.instructions.values())
    first = order.index(start)
    last = _done(module, order, first, chain) if item.asynchronous else first
    between = tuple(
        (this.name, flops(module, frame, this))
        for this in order[first + 1 : last]
        if this.opcode not in _IDLE and not _is_collective(module, this)
    )
    return Overlap(item, start.name, order[last].name, between)


def _done(module: hlo.Module, order: list[hlo.Instruction], first: int, chain: str | None) -> int:
    """Where the wait stands for what ``order[first]`` starts; ``first`` if it is not found."""
    names = {order[first].name}
    for place, this in enumerate(order[first + 1 :], first + 1):
        if chain is None:
            if not names & set(this.operands):
                continue
            if this.opcode.endswith("-done"):
                # What is sent to the host's runtime comes back by a receive of its own.
                return place
            if this.opcode.endswith("-update"):
                names.add(this.name)
        elif chain in _chains(module, this) and _calls_target(module, this, "AsyncCollectiveDone"):
            return place
    return first


def _inside(module: hlo.Module, this: hlo.Instruction) -> list[hlo.Instruction]:
    if this.opcode != "fusion":
        return []
    return [
        i for name in this.refers("calls") for i in module.computations[name].instructions.values()
    ]


def _chains(module: hlo.Module, this: hlo.Instruction) -> set[str]:
    return {chain for i in _inside(module, this) if (chain := chain_of(i)) is not None}


def _calls_target(module: hlo.Module, this: hlo.Instruction, target: str) -> bool:
    return any(f'custom_call_target="{target}"' in i.attributes for i in _inside(module, this))


def _is_collective(module: hlo.Module, this: hlo.Instruction) -> bool:
    """Another collective, its start or its done; a fusion that computes beside one is none."""
    kinds = ("all-", "collective-", "reduce-scatter", "ragged-all-to-all", "send", "recv")
    return this.opcode.startswith(kinds) or any(
        _calls_target(module, this, f"AsyncCollective{end}") for end in ("Start", "Done")
    )
