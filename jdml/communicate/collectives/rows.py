"""Leaves as rows, one for each worker they go to or come from; small ones share a matrix."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from jdml.communicate.buckets import BUCKET_ELEMENTS, plan
from jdml.communicate.codecs.base import Codec, fill_up
from jdml.communicate.collectives.checks import Content, PyTree, check_call, check_content
from jdml.communicate.collectives.checks import check_names as check_names
from jdml.communicate.collectives.payloads import Axis, Values, key_of
from jdml.communicate.error_feedback import ErrorFeedback
from jdml.communicate.wire import per_worker, varying_axes
from jdml.sharding.paths import leaves_with_paths

Say = Callable[[jax.Array, Codec, jax.Array | None], tuple[jax.Array, jax.Array]]
"""``(rows [R, length], codec, key) -> (rows [R', length], error [R, length])``."""


def exchange_rows(
    name: str,
    x: PyTree,
    axis: Axis,
    codec: Content,
    key: jax.Array | None,
    residual: PyTree | None,
    say: Say,
    *,
    cut: int | None = None,
    join: int | None = None,
) -> PyTree:
    """A collective on every leaf of ``x``, as rows.

    Args:
      name: The caller's, for messages.
      x, axis, codec, key, residual: The caller's.
      say: What is done with rows, f32 with a codec and in the leaf's dtype without. Lone workers
        say it too, without a codec: then it must leave values as they are.
      cut: The dim of each leaf that is cut into one row for each worker; ``None`` for one row.
      join: The dim along which the rows that come back are joined; ``None`` if it is one row, of
        the leaf's own shape.

    Returns:
      The new tree; with ``error_feedback``, ``(tree, residual)``.
    """
    check_names(name, axis)
    check_content(name, codec, reducers=False)
    num_workers = check_call(name, x, axis, codec, key, residual)
    feedback = isinstance(codec, ErrorFeedback)
    inner = codec.codec if isinstance(codec, ErrorFeedback) else codec
    assert inner is None or isinstance(inner, Codec)
    words = Values() if inner is None or num_workers == 1 else inner
    for path, leaf in leaves_with_paths(x):
        _check_dims(name, path, jnp.shape(leaf), num_workers, cut, join)
    leaves, treedef = jax.tree.flatten(jax.tree.map(jnp.asarray, x))
    said = list(leaves)
    if feedback:
        owed = jax.tree.leaves(residual)
        said = [a.astype(jnp.float32) + e for a, e in zip(leaves, owed, strict=True)]
    elif inner is not None:
        said = [a.astype(jnp.float32) for a in leaves]
    num_rows = 1 if cut is None else num_workers
    matrices = [_split(per_worker(a, axis), num_rows, cut or 0) for a in said]
    num_back = 1 if join is None else num_workers
    results, errors = _in_buckets(say, matrices, num_back, words, key)
    out, rest = [], []
    for leaf, result, error in zip(leaves, results, errors, strict=True):
        block = list(leaf.shape)
        if cut is not None:
            block[cut] //= num_workers
        merged = _merge(result, block, cut or 0, join or 0) if block else result.reshape(())
        out.append(merged.astype(leaf.dtype))
        rest.append(_merge(error, block, cut or 0, cut or 0) if block else error.reshape(()))
    tree = jax.tree.unflatten(treedef, out)
    return (tree, jax.tree.unflatten(treedef, rest)) if feedback else tree


def _check_dims(
    name: str,
    path: str,
    shape: tuple[int, ...],
    num_workers: int,
    cut: int | None,
    join: int | None,
) -> None:
    for dim in (cut, join):
        if dim is not None and not 0 <= dim < len(shape):
            instead = f"choose one below {len(shape)}" if shape else "reshape it to (1,)"
            raise ValueError(f"{name}: leaf {path!r} of shape {shape} has no dim {dim}; {instead}.")
    if cut is not None and shape[cut] % num_workers:
        raise ValueError(
            f"{name}: leaf {path!r} of shape {shape} cannot be cut along dim {cut} into one equal "
            f"part for each of {num_workers} workers. Fill it up to a multiple of {num_workers}."
        )


def _split(x: jax.Array, num_rows: int, dim: int) -> jax.Array:
    """``[num_rows, elements]``: equal parts along ``dim``, each with that dim first."""
    return (jnp.moveaxis(x, dim, 0) if x.ndim else x).reshape(num_rows, x.size // num_rows)


def _merge(rows: jax.Array, block: Sequence[int], cut: int, join: int) -> jax.Array:
    """The inverse: each row is a block of that shape, cut along one dim; joined along another."""
    first = [block[cut], *block[:cut], *block[cut + 1 :]]
    blocks = jnp.moveaxis(rows.reshape(len(rows), *first), 1, 1 + cut)
    shape = [*block[:join], len(rows) * block[join], *block[join + 1 :]]
    return jnp.moveaxis(blocks, 0, join).reshape(shape)


def _in_buckets(
    say: Say, matrices: Sequence[jax.Array], num_back: int, codec: Codec, key: jax.Array | None
) -> tuple[list[jax.Array], list[jax.Array]]:
    """Says small matrices side by side: those that vary alike, in one dtype."""
    kinds = [(varying_axes(rows), rows.dtype) for rows in matrices]
    buckets = plan(kinds, [rows.size for rows in matrices], BUCKET_ELEMENTS)
    results = [jnp.zeros((num_back, rows.shape[1]), rows.dtype) for rows in matrices]
    errors = [jnp.zeros(rows.shape, jnp.float32) for rows in matrices]
    for number, members in enumerate(buckets):
        parts = [_fill_up_rows(matrices[i], codec) for i in members]
        joined = parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)
        result, error = say(joined, codec, key_of(key, number))
        start = 0
        for i, part in zip(members, parts, strict=True):
            length = matrices[i].shape[1]
            results[i] = result[:, start : start + length]
            errors[i] = error[:, start : start + length]
            start += part.shape[1]
    return results, errors


def _fill_up_rows(rows: jax.Array, codec: Codec) -> jax.Array:
    length = codec.whole(rows.shape[1])
    return jax.vmap(lambda row: fill_up(row, length, codec.fill))(rows)
