r"""Who owns what in a sharded parameter server, and how it gets there and back.

Of a leaf ``x`` cut along dim ``d``, worker k of K owns every K-th index, beginning with k:

.. math:: x_k[\ldots, j, \ldots] = x[\ldots, j K + k, \ldots]

Interleaved, and not one run of indices each, because a leaf may be divided over other mesh axes
too: so each device owns a part of the very shard that it holds, whatever the leaf's spec, which
``init`` is not told. A slice has its leaf's rank and its leaf's spec.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

from jdml.communicate import Wire, all_gather, on_shards, reduce_scatter_mean
from jdml.communicate.collectives.all_reduce import Axis, Content
from jdml.communicate.error_feedback import ErrorFeedback
from jdml.communicate.exchange import exchange_mean
from jdml.sharding.paths import leaves_with_paths

PyTree = Any
Flat = dict[str, jax.Array]
"""Leaves by their paths."""


@dataclasses.dataclass(frozen=True)
class Slices:
    """How the leaves of one tree are cut; made and used inside ``shard_map``.

    Attributes:
      axis: The worker axis or axes.
      num_workers: Their size K.
      dims: Which dim of each leaf is cut; ``None`` for a leaf that every worker owns whole.
    """

    axis: Axis
    num_workers: int
    dims: dict[str, int | None]

    def own(self, tree: PyTree, wire: Wire | None = None) -> PyTree:
        """The worker's own slice of each leaf; whole leaves as they are."""

        def take(leaves: Flat, *_: Any) -> tuple[Flat]:
            me = jax.lax.axis_index(self.axis)
            return ({path: self._slice(path, x, me) for path, x in leaves.items()},)

        flat = by_path(tree)
        return _like(tree, flat | self._on_shards(take, wire, (self.cut(flat),))[0])

    def mean_to_owners(
        self, tree: PyTree, residual: PyTree, codec: Content, wire: Wire | None
    ) -> tuple[PyTree, PyTree]:
        """The push: ``(own slices of the mean over the workers, new residual)``.

        Args:
          tree: Each worker's own leaves, in full.
          residual: With error feedback f32, shaped like ``tree``; else ``()``.
          codec: ``None``, a codec or ``error_feedback(codec)``.
          wire: What ``update`` was given, with a key for this exchange alone.
        """
        feedback = isinstance(codec, ErrorFeedback)

        def push(leaves: Flat, *rest: Any) -> tuple[Flat, ...]:
            owed, key = _owed_and_key(rest, feedback)
            owed = owed and {path: self._rows(path, e) for path, e in owed.items()}
            rows = {path: self._rows(path, x) for path, x in leaves.items()}
            said = reduce_scatter_mean(rows, self.axis, codec, key=key, residual=owed)
            means, left = said if feedback else (said, {})
            means = {path: self._own(path, x) for path, x in means.items()}
            return (means, {path: self._joined(path, e) for path, e in left.items()})

        flat, owed = by_path(tree), by_path(residual)
        given = (self.cut(flat), self.cut(owed)) if feedback else (self.cut(flat),)
        means, left = self._on_shards(push, wire, given)
        whole = _without(flat, means)
        if whole:
            kept = _without(owed, means) if feedback else ()
            mean, kept = exchange_mean(whole, kept, self.axis, codec, "two_phase", wire)
            means, left = means | mean, {**left, **(kept if feedback else {})}
        return _like(tree, means), _like(tree, left) if feedback else ()

    def owned_to_all(
        self, owned: PyTree, residual: Flat, codec: Content, wire: Wire | None
    ) -> tuple[PyTree, Flat]:
        """The pull: ``(leaves in full, the same on every worker; new residual)``.

        Args:
          owned: The worker's own slices; whole leaves are on every worker already.
          residual: With error feedback f32, shaped like the slices; else empty.
          codec: As in :meth:`mean_to_owners`.
          wire: Likewise.
        """
        feedback = isinstance(codec, ErrorFeedback)

        def pull(leaves: Flat, *rest: Any) -> tuple[Flat, ...]:
            owed, key = _owed_and_key(rest, feedback)
            owed = owed and {path: self._row(path, e) for path, e in owed.items()}
            rows = {path: self._row(path, x) for path, x in leaves.items()}
            said = all_gather(rows, self.axis, codec, key=key, residual=owed)
            full, left = said if feedback else (said, {})
            full = {path: self._joined(path, x) for path, x in full.items()}
            return (full, {path: self._own(path, e) for path, e in left.items()})

        flat = by_path(owned)
        given = (self.cut(flat), residual) if feedback else (self.cut(flat),)
        full, left = self._on_shards(pull, wire, given)
        return _like(owned, flat | full), left

    def moved(self, owned: PyTree, untold: Flat) -> PyTree:
        """The slices with f32 moves added to those of the same paths, in their own dtypes."""
        flat = by_path(owned)
        moved = {path: (flat[path] + u).astype(flat[path].dtype) for path, u in untold.items()}
        return _like(owned, flat | moved)

    def norm(self, owned: PyTree) -> jax.Array:
        """Euclidean norm, f32 ``[]``, of the leaves in full; the same on every worker."""
        squares = {
            path: jnp.sum(jnp.square(x.astype(jnp.float32))) for path, x in by_path(owned).items()
        }
        parts = self.cut(squares)
        total = sum(_without(squares, parts).values(), start=jnp.zeros(()))
        if parts:
            total = total + jax.lax.psum(sum(parts.values()), self.axis)
        return jnp.sqrt(total)

    def cut(self, flat: Flat) -> Flat:
        """Those of the leaves that are cut."""
        return {path: x for path, x in flat.items() if self.dims[path] is not None}

    def _on_shards(
        self, exchange: Any, wire: Wire | None, trees: tuple[Flat, ...]
    ) -> tuple[Flat, Flat]:
        """``exchange(*trees, *key)`` on local shards: its one result or two."""
        if not trees[0]:
            return {}, {}
        keys = () if wire is None or wire.key is None else (wire.key,)
        out = on_shards(
            lambda *args: exchange(*args)[: len(trees)], wire, trees, keys, num_outputs=len(trees)
        )
        return (out[0], out[1]) if len(out) > 1 else (out[0], {})

    def _apart(self, path: str, x: jax.Array) -> jax.Array:
        """``[n, K, ...]``: the dim that is cut comes first, since TPU fills up short last dims."""
        first = jnp.moveaxis(x, self._dim(path), 0)
        return first.reshape(-1, self.num_workers, *first.shape[1:])

    def _slice(self, path: str, x: jax.Array, me: jax.Array) -> jax.Array:
        own = jax.lax.dynamic_index_in_dim(self._apart(path, x), me, 1, keepdims=False)
        return jnp.moveaxis(own, 0, self._dim(path))

    def _rows(self, path: str, x: jax.Array) -> jax.Array:
        """``[K, n, ...]``: row k is what worker k owns."""
        return jnp.swapaxes(self._apart(path, x), 0, 1)

    def _row(self, path: str, own: jax.Array) -> jax.Array:
        """A slice as one row of that kind: ``[1, n, ...]``."""
        return jnp.moveaxis(own, self._dim(path), 0)[None]

    def _own(self, path: str, row: jax.Array) -> jax.Array:
        """The inverse of :meth:`_row`."""
        return jnp.moveaxis(row[0], 0, self._dim(path))

    def _joined(self, path: str, rows: jax.Array) -> jax.Array:
        """The inverse of :meth:`_rows`."""
        first = jnp.swapaxes(rows, 0, 1).reshape(-1, *rows.shape[2:])
        return jnp.moveaxis(first, 0, self._dim(path))

    def _dim(self, path: str) -> int:
        dim = self.dims[path]
        assert dim is not None, path
        return dim


def slices_of(tree: PyTree, axis: Axis) -> Slices:
    """Cuts each leaf along its first dim that can be cut on every device, whatever its spec.

    That dim is a multiple of K times the number of devices on the other, automatic mesh axes,
    between which its shards may be divided. A leaf without such a dim stays whole, as all do on a
    lone worker.

    Raises:
      ValueError: the axis is not bound here.
    """
    try:
        num_workers = int(jax.lax.axis_size(axis))
    except NameError as error:
        raise ValueError(
            f"parameter_server: axis {axis!r} is not bound here. A worker takes its own slice "
            "already in tx.init: call both init and update inside a jax.shard_map over a mesh with "
            f"the axis {axis!r}, as make_step(..., workers={axis!r}) does."
        ) from error
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    others = [mesh.shape[name] for name, kind in kinds if kind != AxisType.Manual]
    multiple = num_workers * math.prod(others)

    def dim_of(shape: tuple[int, ...]) -> int | None:
        if num_workers == 1 or 0 in shape:
            return None
        return next((dim for dim, size in enumerate(shape) if size % multiple == 0), None)

    dims = {path: dim_of(jnp.shape(leaf)) for path, leaf in leaves_with_paths(tree)}
    return Slices(axis, num_workers, dims)


def by_path(tree: PyTree) -> Flat:
    """The leaves by their paths, by which ``on_shards`` knows their specs."""
    return dict(leaves_with_paths(tree))


def _like(tree: PyTree, flat: Flat) -> PyTree:
    """``flat`` in the containers of ``tree``."""
    leaves = [flat[path] for path, _ in leaves_with_paths(tree)]
    return jax.tree.unflatten(jax.tree.structure(tree), leaves)


def _without(flat: Flat, others: Flat) -> Flat:
    return {path: x for path, x in flat.items() if path not in others}


def _owed_and_key(rest: tuple[Any, ...], feedback: bool) -> tuple[Flat | None, jax.Array | None]:
    """What follows the leaves: a residual if errors are fed back, a key if there is one."""
    owed, keys = (rest[0], rest[1:]) if feedback else (None, rest)
    return owed, (keys[0] if keys else None)
