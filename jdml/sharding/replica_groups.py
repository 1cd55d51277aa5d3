"""Which devices talk to each other: HLO's group notations, and the mesh axes behind them.

A program compiled for a mesh numbers its devices by their place in ``mesh.devices.flat``,
whatever their own ids are; all groups here are tuples of such places.
"""

import itertools
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jdml.sharding.hlo import Module

Groups = tuple[tuple[int, ...], ...]


def _ints(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]


def _rows(ids: np.ndarray, num_rows: int) -> list[list[int]]:
    return ids.reshape(num_rows, -1).tolist()


def _iota(dims: str, transpose: str | None) -> np.ndarray:
    ids = np.arange(math.prod(_ints(dims))).reshape(_ints(dims))
    return ids.transpose(_ints(transpose)) if transpose else ids


def _mesh_axes(match: re.Match[str]) -> list[list[int]]:
    """Groups of ``mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a','b':(2)2}``.

    ``'b':(p)s`` is the factor of size s of b that has p positions to its left (major) side.
    """
    sizes = {name: int(size) for name, size in re.findall(r"'?([^',=<>]+)'?=(\d+)", match["mesh"])}
    shape = list(sizes.values())
    if match["iota"]:
        ids = _iota(match["iota"], match["transpose"]).reshape(shape)
    elif match["list"]:
        ids = np.array(_ints(match["list"])).reshape(shape)
    else:
        ids = np.arange(math.prod(shape)).reshape(shape)
    chosen: dict[str, list[tuple[int, int]]] = {}
    for ref in filter(None, (part.strip() for part in match["axes"].split(","))):
        name, _, sub = ref.partition(":(")
        pre, size = _ints(sub) if sub else (1, sizes[name.strip("'")])
        chosen.setdefault(name.strip("'"), []).append((pre, size))
    split: list[int] = []
    grouped: list[int] = []
    for name, size in sizes.items():
        parts = chosen.get(name, [])
        cuts = sorted({1, size, *(p for p, _ in parts), *(p * s for p, s in parts)})
        for low, high in itertools.pairwise(cuts):
            if any(p <= low and high <= p * s for p, s in parts):
                grouped.append(len(split))
            split.append(high // low)
    rest = [d for d in range(len(split)) if d not in grouped]
    num_groups = math.prod(split[d] for d in rest)
    return _rows(ids.reshape(split).transpose(rest + grouped), num_groups)


_LISTS = re.compile(r"\breplica_groups=(\{(?:\{[\d,]*\},?\s*)*\})")
_IOTA = re.compile(r"\breplica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(
    r"\breplica_groups=@?mesh[\[<](?P<mesh>[^\]>]*)[\]>]"
    r"(?:,\s*device_ids=\((?:\[(?P<iota>[\d,]+)\](?:T\((?P<transpose>[\d,]+)\))?|(?P<list>[\d,]+))\))?"
    r"\s*\{(?P<axes>[^}]*)\}"
)


def _written(attributes: str) -> list[list[int]] | None:
    """The groups as numbered in the text; None where it means one group of everything."""
    if match := _MESH.search(attributes):
        return _mesh_axes(match)
    if match := _IOTA.search(attributes):
        return _rows(_iota(match[2], match[3]), _ints(match[1])[0])
    if match := _LISTS.search(attributes):
        groups = [_ints(g) for g in re.findall(r"\{([\d,]+)\}", match[1][1:-1])]
        return groups or None
    if "replica_groups=" in attributes:
        raise ValueError(
            "expected replica_groups as {{0,1},…}, [2,4]<=[8]T(…) or mesh['a'=2,…] {'a'}, got "
            f"{attributes[attributes.index('replica_groups=') :][:80]!r}"
        )
    return None


def _placed(module: Module, attributes: str, ids: list[list[int]] | None, kind: str) -> Groups:
    """Places of the written numbers, which count replicas, partitions or both (HLO semantics)."""
    replicas, partitions = module.num_replicas, module.num_partitions
    if "use_global_device_ids=true" in attributes:
        return tuple(map(tuple, ids or [list(range(replicas * partitions))]))
    if "channel_id=" not in attributes:  # among replicas, for each partition alone
        ids = ids or [list(range(replicas))]
        return tuple(tuple(r * partitions + p for r in g) for g in ids for p in range(partitions))
    if kind in ("all-reduce", "all-gather", "reduce-scatter"):  # replicas and all partitions
        ids = ids or [list(range(replicas))]
        return tuple(tuple(r * partitions + p for r in g for p in range(partitions)) for g in ids)
    ids = ids or [list(range(partitions))]
    return tuple(tuple(r * partitions + p for p in g) for g in ids for r in range(replicas))


def groups_of(module: Module, kind: str, attributes: str) -> Groups:
    """Groups of places that exchange with one another (pairs for ``collective-permute``)."""
    if kind != "collective-permute":
        return _placed(module, attributes, _written(attributes), kind)
    match = re.search(r"\bsource_target_pairs=\{([\d,{}\s]*?)\}(?:,\s*[a-z_]|\s*$|\s)", attributes)
    pairs = [_ints(p) for p in re.findall(r"\{([\d,]+)\}", match[1] + "}")] if match else []
    return _placed(module, attributes, pairs, kind) if pairs else ()


def slice_groups(attributes: str) -> Groups:
    """Groups (or pairs) of an exchange between TPU slices, as device ids: 100000·slice + device.

    The text has ``"{1,2}x{0:15}"`` (each device with its likes in the other slices), lists of ids,
    or ``{a->b}`` pairs.
    """
    target = attributes.partition("_xla_megascale_target=")[2]
    if match := re.match(r'"\{([\d,]+)\}x\{(\d+):(\d+)\}', target):
        devices = range(int(match[2]), int(match[3]) + 1)
        return tuple(tuple(100_000 * s + d for s in _ints(match[1])) for d in devices)
    listed = re.match(r'"?\{((?:\{[\d,>-]+\},?)+)\}', target)
    return (
        tuple(tuple(_ints(g)) for g in re.findall(r"\{([\d,>-]+)\}", listed[1])) if listed else ()
    )


def longest_chain(pairs: Sequence[Sequence[int]]) -> int:
    """Devices in the longest cycle or chain of a permutation; 1 if nobody sends to another."""
    following = {source: target for source, target in pairs if source != target}
    heads = set(following) - set(following.values())
    longest, left = 1, set(following)
    for start in [*heads, *following]:
        length, place = 1, start
        while place in left:
            left.remove(place)
            place = following[place]
            length += place != start
        longest = max(longest, length)
    return longest


class Places:
    """Coordinates on a mesh of the places that a program numbers.

    Args:
      module: the program.
      mesh: the mesh it was compiled for.
      order: the devices in the program's order where known; they may lie otherwise in ``mesh``.
    """

    def __init__(self, module: Module, mesh: Any, order: Sequence[jax.Device] | None = None):
        self.names = tuple(mesh.axis_names)
        self.sizes = tuple(mesh.shape[name] for name in self.names)
        num_devices = module.num_replicas * module.num_partitions
        places = np.arange(math.prod(self.sizes))
        devices = list(mesh.devices.flat) if isinstance(mesh, jax.sharding.Mesh) else None
        if devices is not None and order is not None:
            if set(order) != set(devices):
                raise ValueError(
                    f"expected the mesh that the program was compiled for, got a mesh of "
                    f"{len(devices)} devices {devices[:2]}… for a program on {len(order)} devices "
                    f"{list(order)[:2]}…; pass that program's own mesh"
                )
            index = {device: i for i, device in enumerate(devices)}
            places = np.array([index[device] for device in order])
        slices = np.array([getattr(d, "slice_index", None) or 0 for d in devices or []])
        if num_devices * len(set(slices.tolist())) == places.size > num_devices:
            # On TPU each slice runs a program of its own, which numbers the slice's devices.
            places = places[slices[places] == slices[places[0]]]
        if places.size != num_devices:
            raise ValueError(
                f"expected a mesh of {num_devices} devices, as many as the program runs on, got "
                f"{dict(zip(self.names, self.sizes, strict=True))} = {places.size}"
            )
        self.places = places.tolist()
        self._known: dict[tuple[Groups, bool], tuple[tuple[str, ...], bool]] = {}
        self.by_id = {device.id: i for i, device in enumerate(devices or [])}

    def of_ids(self, ids: Groups) -> Groups:
        """Positions in ``mesh.devices.flat`` of device ids; empty if it does not hold them."""
        if not all(i in self.by_id for group in ids for i in group):
            return ()
        return tuple(tuple(self.by_id[i] for i in group) for group in ids)

    def of_places(self, groups: Groups) -> Groups:
        """Positions in ``mesh.devices.flat`` of the places that the program numbers."""
        return tuple(tuple(self.places[i] for i in group) for group in groups)

    def axes(self, positions: Groups, *, product: bool) -> tuple[tuple[str, ...], bool]:
        """Axes along which members of a group differ; and whether they are only part of those.

        ``product=False`` for the pairs of a permutation, which never fill their axes.
        """
        if (positions, product) not in self._known:  # a step repeats few groups many times
            differs = np.zeros(len(self.names), bool)
            for group in positions:
                points = np.stack(np.unravel_index(list(group), self.sizes))
                differs |= (points != points[:, :1]).any(axis=1)
            axes = tuple(name for name, d in zip(self.names, differs, strict=True) if d)
            full = math.prod(s for s, d in zip(self.sizes, differs, strict=True) if d)
            partial = product and any(len(group) != full for group in positions)
            self._known[positions, product] = axes, partial
        return self._known[positions, product]
