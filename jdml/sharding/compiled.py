"""What a compiled program says on the wire: every collective, its mesh axes, bytes and repetitions.

The compiled text is the only place where the answer stands: the partitioner adds collectives that
nobody wrote, merges and splits others, and a backend may widen a dtype on the way. So bytes per
step are read here, never estimated from the Python that asked for them.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax

from jdml.sharding import hlo
from jdml.sharding.hlo_loops import trip_count
from jdml.sharding.replica_groups import Places, groups_of, longest_chain, slice_groups

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)


@dataclass(frozen=True)
class Collective:
    """One collective of a compiled program, as one device sees it.

    With x = ``payload_bytes``, n = ``group_size``, ``sent_bytes`` is what a device sends under the
    bandwidth-optimal algorithm: 2(n-1)/n·x for all-reduce, (n-1)·x for all-gather (that is (n-1)/n
    of its output), (n-1)/n·x for reduce-scatter and all-to-all, x for permute and broadcast.

    Attributes:
      kind: one of ``KINDS``.
      axes: mesh axes along which the members of a group (or the two ends of a permutation) differ,
        in mesh order; ``()`` if no two devices exchange anything; None if no mesh was given.
      partial: the groups are only part of the product of ``axes``: an exchange within half of an
        axis, or between devices that no product of axes describes.
      dtypes: of each operand, as HLO spells them (``"f32"``, ``"s8"``, ``"u8"``, ``"bf16"``).
      operand_bytes: bytes of each operand on one device, without tile padding.
      group_size: devices that exchange with one another; for a permutation, devices in the longest
        cycle or chain.
      groups: positions in ``mesh.devices.flat`` of each group's members (without a mesh: in the
        program's own device order), or the (source, target) pairs of a permutation; empty for an
        exchange between TPU slices unless ``mesh`` holds their devices.
      loops: trip counts of the enclosing loops, outermost first; None where the text does not tell.
      conditional: stands in a branch, so that it may not run.
      branches: ``(name, index)`` of each named branch around it, outermost first: those of a
        ``cond`` or ``switch`` directly under ``jax.named_scope("branch.NAME")``.
      asynchronous: split into start and done (counted once), so that work may overlap it.
      between_slices: goes over the network between TPU slices, not over a slice's own links.
      name: the instruction, to find it in ``compiled.as_text()``.
    """

    kind: str
    axes: tuple[str, ...] | None
    partial: bool
    dtypes: tuple[str, ...]
    operand_bytes: tuple[int, ...]
    group_size: int
    groups: tuple[tuple[int, ...], ...]
    loops: tuple[int | None, ...]
    conditional: bool
    branches: tuple[tuple[str, int], ...]
    asynchronous: bool
    between_slices: bool
    name: str

    @property
    def dtype(self) -> str:
        """The dtype on the wire; several are joined by a comma (``"f32,s8"``)."""
        return ",".join(dict.fromkeys(self.dtypes))

    @property
    def payload_bytes(self) -> int:
        """Operand bytes per device, each time that it runs."""
        return sum(self.operand_bytes)

    @property
    def whole_bytes(self) -> int:
        """Of the arrays that a device has whole: what is gathered, or summed, or exchanged."""
        return self.payload_bytes * (self.group_size if self.kind == "all-gather" else 1)

    @property
    def sent_bytes(self) -> int:
        """Bytes a device sends each time that it runs, bandwidth-optimal; rounded up."""
        n, x = self.group_size, self.payload_bytes
        if n <= 1:
            return 0
        if self.kind == "all-reduce":
            return -(-2 * (n - 1) * x // n)
        if self.kind == "all-gather":
            return (n - 1) * x
        if self.kind in ("reduce-scatter", "all-to-all"):
            return -(-(n - 1) * x // n)
        return x  # ragged-all-to-all: an upper bound, the sizes are data

    @property
    def count(self) -> int | None:
        """Runs per call of the program: product of ``loops``; None if a loop's is unknown."""
        return None if None in self.loops else math.prod(c for c in self.loops if c is not None)


def collectives(
    compiled: Any, mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh | None = None
) -> list[Collective]:
    """List every collective of a compiled program, callees where they are called.

    Args:
      compiled: ``jax.jit(f).lower(...).compile()``, or its HLO text. CPU, GPU and TPU forms are
        understood, start/done pairs and TPU's fused asynchronous collectives counted once.
      mesh: the mesh the program was compiled for; without it, ``axes`` is None.

    Raises:
      ValueError: not a compiled program, or ``mesh`` holds other devices than the program.
    """
    text = compiled if isinstance(compiled, str) else compiled.as_text()
    if not text:
        raise ValueError("expected a compiled program with HLO text, got one without any text")
    module = hlo.parse(text)
    found = list(_walk(module, hlo.Frame(module.computations[module.entry]), (), False, set()))
    if not found:
        return []
    places = None if mesh is None else Places(module, mesh, _device_order(compiled))
    listed = []
    for frame, this, loops, conditional in found:
        if this.opcode == "send":
            listed.append(_between_slices(frame, this, loops, conditional, places))
        else:
            listed.append(_within(module, frame, this, loops, conditional, places))
    return listed


def bytes_per_axis(
    listed: Iterable[Collective],
    *,
    unknown_count: int | None = None,
    taken: Mapping[str, int] | None = None,
) -> dict[tuple[str, ...] | None, int]:
    """Sum ``sent_bytes · count`` for each set of mesh axes: bytes one device sends per call.

    Collectives in branches are counted as if every branch ran, but for those that ``taken`` rules
    out; permutations as if this device sent in each. A key holds all axes of one exchange: the mean
    over data and fsdp at once is under ``("data", "fsdp")``. Without a mesh everything is under
    None.

    Args:
      listed: what ``collectives`` returned, or a selection of it.
      unknown_count: what to take for a loop whose trip count the text does not tell.
      taken: which branch was taken, by name (see ``Collective.branches``).

    Raises:
      ValueError: a trip count is unknown and ``unknown_count`` is not given.
    """
    total: dict[tuple[str, ...] | None, int] = {}
    for item in listed:
        if any((taken or {}).get(name, index) != index for name, index in item.branches):
            continue
        count = item.count
        if count is None:
            if unknown_count is None:
                raise ValueError(
                    f"expected a known trip count for {item.kind} {item.name!r} over {item.axes}, "
                    f"got loops {item.loops}: the loop ends on data; pass unknown_count=N, or "
                    "leave out collectives whose count is None"
                )
            count = math.prod(unknown_count if c is None else c for c in item.loops)
        total[item.axes] = total.get(item.axes, 0) + item.sent_bytes * count
    return total


# --- Finding them -----------------------------------------------------------------------------

_Found = tuple[hlo.Frame, hlo.Instruction, tuple[int | None, ...], bool]


def _kind(opcode: str) -> str | None:
    opcode = opcode.removesuffix("-start")
    return opcode if opcode in KINDS else None


def _communicates(this: hlo.Instruction) -> bool:
    if this.opcode == "send":
        return "_xla_megascale_transfer_type" in this.attributes
    # A start that names a computation stands for the collective in it, which is met there.
    return _kind(this.opcode) is not None and not (
        this.opcode.endswith("-start") and this.refers("calls")
    )


def _walk(
    module: hlo.Module,
    frame: hlo.Frame,
    loops: tuple[int | None, ...],
    conditional: bool,
    started: set[str],  # shared by all frames: a chain may start before a loop and go on inside
) -> Iterator[_Found]:
    called: dict[str, list[tuple[str, str]]] = {}
    for this, name, role in hlo.calls(module, frame):
        called.setdefault(this.name, []).append((name, role))
    for this in frame.computation.instructions.values():
        if _communicates(this):
            yield frame, this, loops, conditional
        for name, role in called.get(this.name, []):
            inner = hlo.Frame(module.computations[name], frame, this)
            turns = loops
            if role in ("body", "condition"):
                trips = trip_count(module, frame, this)
                if role == "condition" and trips is not None:
                    trips += 1  # tested once more than it runs
                turns = (*loops, trips)
            for item in _walk(module, inner, turns, conditional or role == "branch", started):
                key = chain_of(item[1])
                if role == "fusion" and key is not None and not _is_first(inner, key, started):
                    continue
                yield item


def chain_of(this: hlo.Instruction) -> str | None:
    """What the copies of one of TPU's fused asynchronous collectives have in common."""
    if "async_collective_fusion_config" not in this.attributes:
        return None
    channel = re.search(r"channel_id=\d+", this.attributes)
    chain = re.search(r'chain_id="\d+"', this.attributes)
    return " ".join(m[0] for m in (channel, chain) if m) + " " + this.opcode


def _is_first(inner: hlo.Frame, key: str, started: set[str]) -> bool:
    """Whether this copy stands for the chain: the one that starts it, or the first one met.

    TPU repeats the collective in the fusion that starts it, in each fusion that computes
    meanwhile, and in the one that waits for it.
    """
    starts = any(
        'custom_call_target="AsyncCollectiveStart"' in i.attributes
        for i in inner.computation.instructions.values()
    )
    first = starts or key not in started
    started.add(key)
    return first


# --- What each one is -------------------------------------------------------------------------


def _operands(frame: hlo.Frame, this: hlo.Instruction) -> list[hlo.Array]:
    inline = hlo.arrays(this.arguments)
    if inline:
        return inline
    return [a for name in this.operands for a in hlo.arrays(frame.look_up(name).type)]


def _is_scattered(frame: hlo.Frame, this: hlo.Instruction) -> bool:
    """An all-reduce of which each device keeps its slice, fused: TPU's form of reduce-scatter."""
    if this.opcode != "all-reduce" or frame.call is None or frame.call.opcode != "fusion":
        return False
    users = [i for i in frame.computation.instructions.values() if this.name in i.operands]
    return bool(users) and all(i.opcode == "dynamic-slice" for i in users)


def _within(
    module: hlo.Module,
    frame: hlo.Frame,
    this: hlo.Instruction,
    loops: tuple[int | None, ...],
    conditional: bool,
    places: Places | None,
) -> Collective:
    kind = _kind(this.opcode)
    assert kind is not None
    attributes = re.sub(r'"(?:[^"\\]|\\.)*"', '""', this.attributes)
    operands = _operands(frame, this)
    if kind == "ragged-all-to-all" or "slice_sizes=" in attributes:
        operands = operands[:1]  # the others are the output buffer, offsets and sizes
    groups = groups_of(module, kind, attributes)
    permutes = kind == "collective-permute"
    axes, partial = None, False
    if places is not None:
        groups = places.of_places(groups)
        axes, partial = places.axes(groups, product=not permutes)
    wrapped = frame.call is not None and frame.call.opcode == "async-start"
    return Collective(
        kind="reduce-scatter" if _is_scattered(frame, this) else kind,
        axes=axes,
        partial=partial,
        dtypes=tuple(a.dtype for a in operands),
        operand_bytes=tuple(a.num_bytes for a in operands),
        group_size=longest_chain(groups) if permutes else max(map(len, groups), default=1),
        groups=groups,
        loops=loops,
        conditional=conditional,
        branches=_branches(frame, this),
        asynchronous=wrapped or this.opcode.endswith("-start") or chain_of(this) is not None,
        between_slices=False,
        name=this.name,
    )


def _between_slices(
    frame: hlo.Frame,
    this: hlo.Instruction,
    loops: tuple[int | None, ...],
    conditional: bool,
    places: Places | None,
) -> Collective:
    """TPU's exchange between slices: a send to the host's runtime, for a whole collective."""
    transfer = re.search(r'_xla_megascale_transfer_type="(\w+)"', this.attributes)
    kind = transfer[1].lower().replace("_", "-") if transfer else "send"
    kind = "collective-permute" if kind == "one-to-one" else kind
    permutes = kind == "collective-permute"
    ids = slice_groups(this.attributes)
    groups = () if places is None else places.of_ids(ids)
    axes, partial = None, False
    if places is not None and groups:
        axes, partial = places.axes(groups, product=not permutes)
    operand = hlo.arrays(frame.look_up(this.operands[0]).type)[:1]
    return Collective(
        kind=kind,
        axes=axes,
        partial=partial,
        dtypes=tuple(a.dtype for a in operand),
        operand_bytes=tuple(a.num_bytes for a in operand),
        group_size=longest_chain(ids) if permutes else max(map(len, ids), default=1),
        groups=groups,
        loops=loops,
        conditional=conditional,
        branches=_branches(frame, this),
        asynchronous=True,
        between_slices=True,
        name=this.name,
    )


_BRANCH = re.compile(r"\bbranch\.([\w.\-]+)/cond/branch_(\d+)_fun")


def _branches(frame: hlo.Frame, this: hlo.Instruction) -> tuple[tuple[str, int], ...]:
    """Where JAX says that the instruction comes from, or what runs it: XLA's own have no name."""
    found = _BRANCH.findall(this.attributes)
    while not found and frame.call is not None and frame.parent is not None:
        found = _BRANCH.findall(_name_of_branch(frame) or frame.call.attributes)
        frame = frame.parent
    return tuple((name, int(index)) for name, index in found)


def _name_of_branch(frame: hlo.Frame) -> str | None:
    """What JAX calls instructions of the frame, if it is a branch with a name."""
    call = frame.call
    if call is None or call.opcode != "conditional":
        return None
    name = re.search(r'op_name="([^"]*\bbranch\.[\w.\-]+/cond)"', call.attributes)
    numbered = call.refers("branch_computations")
    ways = numbered or call.refers("false_computation", "true_computation")
    return name and f"{name[1]}/branch_{ways.index(frame.computation.name)}_fun"


def _device_order(compiled: Any) -> list[jax.Device] | None:
    """Devices in the order in which the program numbers them, where a sharding tells."""
    for attribute in ("input_shardings", "output_shardings"):
        for sharding in jax.tree.leaves(getattr(compiled, attribute, None)):
            mesh = getattr(sharding, "mesh", None)
            if isinstance(mesh, jax.sharding.Mesh):
                return list(mesh.devices.flat)
    return None
