"""Adasum: gradients that agree are averaged, gradients that are orthogonal are added."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jdml.communicate import Wire, on_shards
from jdml.communicate.buckets import BUCKET_ELEMENTS, map_in_buckets
from jdml.communicate.codecs import Codec, identity
from jdml.communicate.codecs.packing import pack, unpack
from jdml.communicate.collectives.all_reduce import Axis, check_exchange
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

    Bytes each worker sends, K workers, d elements: ``2 (K-1)/K 4d``, or ``2 (K-1) c`` with c the
    codec's payload of ``d / K``; and, for the inner products, ``8 (K-1) K`` for each leaf.

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
    wire_format = identity() if codec is None else codec

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
            if jax.lax.axis_size(axis) == 1:
                return (jax.tree.map(lambda g: jax.lax.pmean(g, axis), tree),)
            leaves, treedef = jax.tree.flatten(tree)
            # Joined without regard to the codec's blocks; each element says whose leaf it is of.
            numbers = [jnp.full(leaf.shape, i, jnp.float32) for i, leaf in enumerate(leaves)]

            def combine(number: int, vector: jax.Array, owner: jax.Array) -> tuple[jax.Array, ...]:
                key = jax.random.fold_in(keys[0], number) if keys else None
                num_leaves = 1 if vector.size >= BUCKET_ELEMENTS else len(leaves)
                return _combine(vector, owner, num_leaves, axis, wire_format, key), owner

            sums, _ = map_in_buckets(combine, [leaves, numbers], identity())
            sums = [s.astype(g.dtype) for s, g in zip(sums, leaves, strict=True)]
            return (jax.tree.unflatten(treedef, sums),)

        (out,) = on_shards(exchange, wire, (updates,), () if key is None else (key,))
        return out, state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def _combine(
    vector: jax.Array,
    owner: jax.Array,
    num_leaves: int,
    axis: Axis,
    codec: Codec,
    key: jax.Array | None,
) -> jax.Array:
    """The adaptive sums over ``axis`` of the leaves joined in one f32 vector.

    Args:
      vector: Elements of one leaf, if ``num_leaves`` is 1, or of several.
      owner: The leaf of each element.
      num_leaves: How many there are in all.
      axis: The worker axis.
      codec: Of both phases.
      key: For codecs that draw random numbers.
    """
    num_workers, me = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
    names = (axis,) if isinstance(axis, str) else axis
    size = vector.size
    fill = -size % (num_workers * codec.granularity)
    rows = jnp.concatenate([vector, jnp.zeros(fill, vector.dtype)]).reshape(num_workers, -1)
    length = rows.shape[1]
    key_out = key_back = None
    if key is not None:
        key_out, key_back = jax.random.split(jax.random.fold_in(key, me))

    payload = jax.lax.optimization_barrier(codec.encode_rows(rows, key_out))
    received = jax.lax.all_to_all(pack(payload), axis, 0, 0, tiled=True)
    shares = jax.lax.optimization_barrier(codec.decode_rows(unpack(received, payload), length))

    # Which leaf, as a matrix [num_leaves, length]: sums over leaves are matrix products.
    belongs = jnp.ones((1, length), jnp.float32)
    if num_leaves > 1:
        owner = jnp.concatenate([owner, jnp.zeros(fill, owner.dtype)]).reshape(num_workers, -1)
        mine = jax.lax.dynamic_index_in_dim(owner, me, keepdims=False)
        belongs = (mine == jnp.arange(num_leaves)[:, None]).astype(jnp.float32)
    exact = jax.lax.Precision.HIGHEST
    gram = jnp.stack(
        [jnp.einsum("sl,jl->sj", belongs * share, shares, precision=exact) for share in shares], 1
    )
    # Over the workers' chunks, and over the other axes' shards of the leaves.
    gram = jax.lax.psum(gram, tuple(sorted(varying_axes(gram) | set(names))))
    coefficients = jax.vmap(adasum_coefficients)(gram)
    weights = jnp.einsum("sk,sl->kl", coefficients, belongs, precision=exact)
    chunk = jnp.sum(weights * shares, axis=0, keepdims=True)

    chunk_payload = jax.lax.optimization_barrier(codec.encode_rows(chunk, key_back))
    gathered = jax.lax.all_gather(pack(chunk_payload), axis, tiled=True, to="invarying")
    return codec.decode_rows(unpack(gathered, chunk_payload), length).reshape(-1)[:size]


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
