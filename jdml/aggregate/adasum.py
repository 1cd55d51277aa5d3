"""Adasum: gradients that agree are averaged, gradients that are orthogonal are added."""

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jdml.communicate import Wire, on_shards
from jdml.communicate.buckets import BUCKET_ELEMENTS, plan
from jdml.communicate.codecs import Codec
from jdml.communicate.collectives.all_reduce import Axis, check_exchange
from jdml.communicate.collectives.payloads import Values, gather, in_chunks, scatter
from jdml.communicate.wire import varying_axes

PyTree = Any


def adasum(axis: Axis, codec: Codec | None = None) -> optax.GradientTransformationExtraArgs:
    """Replaces each worker's gradient with the adaptive sum of all; first in the chain.

    Of two: ``(1 - ab / 2|a|^2) a + (1 - ab / 2|b|^2) b``, leaf by leaf: the mean if they are equal,
    the sum if they are orthogonal. Of K: pairwise, in a binary tree over the workers in order.

    The result is a combination of the K gradients whose coefficients follow from their inner
    products. So every worker takes one chunk of all gradients (all-to-all), the inner products of
    the chunks are summed (K^2 numbers a leaf), each worker combines its chunk, and an all-gather
    ends it: as many bytes as a ring all-reduce, and no more rounds for more workers.

    Args:
      axis: The worker axis. ``update`` runs inside a ``shard_map`` in which it is manual.
      codec: ``None`` for exact values, or a codec, for both phases. Error feedback is refused: the
        sum is not linear in what each worker says.

    State kept: none.

    Bytes each worker sends, K workers, d elements (each leaf filled up to a multiple of K):
    ``2 (K-1)/K 4d``, or ``2 (K-1) c`` with c the codec's payload of ``d / K``; and, for the inner
    products, ``8 (K-1) K`` for each leaf.

    Raises:
      ValueError: ``codec`` is not a codec.

    Reference: Maleki et al., "Scaling Distributed Training with Adaptive Summation", MLSys 2021.
    """
    check_exchange("adasum", axis, codec, "two_phase")
    if codec is not None and not isinstance(codec, Codec):
        raise ValueError(
            f"adasum: codec={codec!r}; the adaptive sum is not linear, so there is no error to "
            "feed back. Use a codec alone, such as int8()."
        )
    wire_format = Values() if codec is None else codec

    def update(
        updates: PyTree,
        state: optax.EmptyState,
        params: PyTree | None = None,
        *,
        wire: Wire | None = None,
        **extra: Any,
    ) -> tuple[PyTree, optax.EmptyState]:
        del params, extra
        key = None if wire is None else wire.key

        def exchange(tree: PyTree, *keys: jax.Array) -> tuple[PyTree]:
            num_workers = jax.lax.axis_size(axis)
            if num_workers == 1:
                return (jax.tree.map(lambda g: jax.lax.pmean(g, axis), tree),)
            leaves, treedef = jax.tree.flatten(tree)
            kinds = [varying_axes(leaf) for leaf in leaves]
            sums = [jnp.zeros_like(leaf) for leaf in leaves]
            buckets = plan(kinds, [leaf.size for leaf in leaves], BUCKET_ELEMENTS)
            for number, members in enumerate(buckets):
                key = jax.random.fold_in(keys[0], number) if keys else None
                # Each leaf is cut into K chunks by itself, so that all workers' chunks are divided
                # over the leaves in the same way.
                parts = [in_chunks(_vector(leaves[i]), num_workers, Values()) for i in members]
                combined = _combine(parts, axis, wire_format, key)
                for i, part in zip(members, combined, strict=True):
                    whole = part.reshape(-1)[: leaves[i].size].reshape(leaves[i].shape)
                    sums[i] = whole.astype(leaves[i].dtype)
            return (jax.tree.unflatten(treedef, sums),)

        (out,) = on_shards(exchange, wire, (updates,), () if key is None else (key,))
        return out, state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def _combine(
    parts: Sequence[jax.Array], axis: Axis, codec: Codec, key: jax.Array | None
) -> list[jax.Array]:
    """The adaptive sums over ``axis``, leaf by leaf.

    Args:
      parts: Leaves, each f32 ``[K, chunk]``.
      axis: The worker axis.
      codec: Of both phases.
      key: For codecs that draw random numbers.

    Returns:
      The sums, shaped like ``parts``.
    """
    me = jax.lax.axis_index(axis)
    names = (axis,) if isinstance(axis, str) else axis
    ends = list(itertools.accumulate(part.shape[1] for part in parts))
    rows = parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)
    rows = jnp.pad(rows, ((0, 0), (0, codec.whole(rows.shape[1]) - rows.shape[1])))
    length = rows.shape[1]
    key_out = key_back = None
    if key is not None:
        key_out, key_back = jax.random.split(jax.random.fold_in(key, me))

    payload = jax.lax.optimization_barrier(codec.encode_rows(rows, key_out))
    received = scatter(payload, axis)
    shares = jax.lax.optimization_barrier(codec.decode_rows(received, length))

    by_leaf = jnp.split(shares[:, : ends[-1]], ends[:-1], axis=1)
    exact = jax.lax.Precision.HIGHEST
    gram = jnp.stack([jnp.matmul(x, x.T, precision=exact) for x in by_leaf])
    # Over the workers' chunks, and over the other axes' shards of the leaves.
    gram = jax.lax.psum(gram, tuple(sorted(varying_axes(gram) | set(names))))
    coefficients = jax.vmap(adasum_coefficients)(gram)
    sums = [jnp.matmul(c, x, precision=exact) for c, x in zip(coefficients, by_leaf, strict=True)]
    chunk = jnp.pad(jnp.concatenate(sums), (0, length - ends[-1]))[None]

    chunk_payload = jax.lax.optimization_barrier(codec.encode_rows(chunk, key_back))
    means = codec.decode_rows(gather(chunk_payload, axis), length)
    return jnp.split(means[:, : ends[-1]], ends[:-1], axis=1)


def _vector(leaf: jax.Array) -> jax.Array:
    return leaf.astype(jnp.float32).reshape(-1)


def adasum_coefficients(gram: jax.Array) -> jax.Array:
    """What each of K vectors weighs in their adaptive sum.

    Args:
      gram: Inner products, ``[K, K]``.

    Returns:
      ``[K]``, with which ``sum_k c_k g_k`` is the sum.
    """
    num = gram.shape[0]
    sums = list(jnp.eye(num, dtype=gram.dtype))
    while len(sums) > 1:
        pairs = [_pair(a, b, gram) for a, b in zip(sums[::2], sums[1::2], strict=False)]
        sums = pairs + sums[len(sums) // 2 * 2 :]
    return sums[0]


def _pair(a: jax.Array, b: jax.Array, gram: jax.Array) -> jax.Array:
    dot, norm_a, norm_b = a @ gram @ b, a @ gram @ a, b @ gram @ b

    def weight(norm: jax.Array) -> jax.Array:
        return 1 - jnp.where(norm > 0, dot / jnp.where(norm > 0, 2 * norm, 1), 0)

    return weight(norm_a) * a + weight(norm_b) * b
