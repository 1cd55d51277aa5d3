"""A network divided at random: narrower networks of the same depth, around a backbone.

Of every hidden layer the units of the *backbone* are on all workers; the others are dealt out, each
to one worker. A worker's network has the edges between units that it has: those between units of
different workers are cut, until units are dealt out again. Where layers (pipeline) or slices of
every layer (tensor) are divided, activations cross the cut at every step; here nothing does, and
what is lost is what the cut edges would have said.

References: Yuan et al., "Distributed Learning of Deep Neural Networks using Independent Subnet
Training", 2022 (arXiv:1910.02120; no backbone); a part that everyone has beside a part drawn at
random: Sun et al., "Slim-DP", 2018 (which draws what is exchanged).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jdml.sharding.paths import leaves_with_paths

PyTree = Any
Names = tuple[str | None, ...]


class Subnets(NamedTuple):
    """Which units each worker has, of every hidden layer.

    Attributes:
      units: By layer, int32 ``[workers, kept]``: the backbone first, then the worker's own.
      scales: By layer, f32 ``[kept]``: one over the share of workers that have the unit, 1 in the
        backbone and ``workers`` elsewhere. Outputs of hidden units times these have in expectation
        over the draw the sum that the whole network has.
    """

    units: dict[str, jax.Array]
    scales: dict[str, jax.Array]


def num_kept(size: int, num_workers: int, backbone: float) -> tuple[int, int]:
    """``(backbone, own)`` units of one worker in a layer of ``size`` units.

    The backbone is ``backbone * size``, and as many more units as cannot be dealt out evenly.
    """
    own = math.floor((1 - backbone) * size / num_workers + 1e-9)
    return size - own * num_workers, own


def draw_subnets(
    key: jax.Array, sizes: Mapping[str, int], num_workers: int, backbone: float = 0.0
) -> Subnets:
    """Deals out the units of every hidden layer; equal keys give equal subnets everywhere.

    The backbone is the first units of a layer, always the same ones.

    Args:
      key: Typed key.
      sizes: Units of each hidden layer, by its name.
      num_workers: K; 1 has the whole network.
      backbone: Share of each layer's units that all workers have, 0 to 1.

    Raises:
      ValueError: a share outside [0, 1], fewer than one worker, or a layer of which a worker would
        have nothing.
    """
    if not 0 <= backbone <= 1:
        raise ValueError(f"draw_subnets: backbone={backbone!r}; expected a share from 0 to 1.")
    if num_workers < 1:
        raise ValueError(f"draw_subnets: num_workers={num_workers!r}; expected at least 1.")
    units, scales = {}, {}
    for number, (name, size) in enumerate(sorted(sizes.items())):
        shared, own = num_kept(size, num_workers, backbone)
        if own == 0 and backbone < 1 and num_workers > 1:
            raise ValueError(
                f"draw_subnets: layer {name!r} has {size} units, of which {num_workers} workers "
                f"share {backbone:.0%}; none is left for a worker of its own. Expected at least "
                "one each: take fewer workers, a wider layer, or backbone=1."
            )
        dealt = shared + jax.random.permutation(jax.random.fold_in(key, number), size - shared)
        common = jnp.broadcast_to(jnp.arange(shared), (num_workers, shared))
        both = [common, dealt.reshape(num_workers, own)]
        units[name] = jnp.concatenate(both, axis=1).astype(jnp.int32)
        scale = jnp.repeat(jnp.array([1.0, num_workers]), jnp.array([shared, own]),
                           total_repeat_length=shared + own)  # fmt: skip
        scales[name] = scale
    return Subnets(units, scales)


def cut(params: PyTree, names: PyTree, units: Mapping[str, jax.Array]) -> PyTree:
    """One worker's parameters: of every named dim the rows of its units.

    Args:
      params: The whole network.
      names: For each leaf the names of its dims, a tuple; None or a name that is no hidden layer's
        for a dim that stays whole.
      units: By layer, int32 ``[kept]``: one row of :class:`Subnets`' units.

    Raises:
      ValueError: a leaf with another number of dims than names, or a hidden layer named nowhere.
    """
    named = _names_of(params, names, units)

    def one(x: jax.Array, dims: Names) -> jax.Array:
        for dim, name in enumerate(dims):
            if name is not None and name in units:
                x = jnp.take(x, units[name], axis=dim)
        return x

    return _map(one, named, params)


def join(params: PyTree, names: PyTree, subnets: Sequence[PyTree], units: PyTree) -> PyTree:
    """The whole network with what the workers made of their parts of it.

    What one worker has is taken from it; what all have (the backbone's own edges, and leaves with
    no hidden dim) is their mean; what was cut stays as it was.

    Args:
      params: The whole network before.
      names: As in :func:`cut`.
      subnets: The parts, stacked: leaves ``[workers, ...]``.
      units: By layer, int32 ``[workers, kept]``.
    """
    named = _names_of(params, names, units)

    def one(x: jax.Array, dims: Names, parts: jax.Array) -> jax.Array:
        def indices(k: Any) -> tuple[jax.Array, ...]:
            rows = [
                units[name][k] if name in units else jnp.arange(size)
                for name, size in zip(dims, x.shape, strict=True)
            ]
            return jnp.ix_(*rows) if rows else ()

        def add(k: Any, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            total, count = carry
            where = indices(k)
            return total.at[where].add(parts[k]), count.at[where].add(1.0)

        zeros = jnp.zeros_like(x), jnp.zeros(x.shape, jnp.float32)
        total, count = jax.lax.fori_loop(0, parts.shape[0], add, zeros)
        mean = total / jnp.maximum(count, 1.0).astype(total.dtype)
        return jnp.where(count > 0, mean, x)

    return _map(one, named, params, subnets)


def _names_of(params: PyTree, names: PyTree, units: Mapping[str, Any]) -> list[Names]:
    leaves = leaves_with_paths(params)
    found = jax.tree.leaves(names, is_leaf=lambda x: isinstance(x, tuple))
    if len(leaves) != len(found):
        raise ValueError(
            f"names has {len(found)} leaves and params {len(leaves)}; expected a tuple of names "
            "for each leaf, in the same tree."
        )
    for (path, x), dims in zip(leaves, found, strict=True):
        if len(dims) != x.ndim:
            raise ValueError(
                f"params leaf {path!r} has {x.ndim} dims and the names {dims}; expected a name or "
                "None for each dim."
            )
    missing = set(units) - {name for dims in found for name in dims}
    if missing:
        raise ValueError(
            f"no dim of params is named {sorted(missing)}; expected every hidden layer."
        )
    return found


def _map(f: Any, named: list[Names], params: PyTree, *rest: PyTree) -> PyTree:
    names = jax.tree.unflatten(jax.tree.structure(params), named)
    return jax.tree.map(f, params, names, *rest)
