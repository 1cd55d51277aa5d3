"""All-reduce of a mean, exact or compressed, for use inside any ``shard_map``."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp

from jdml.communicate.buckets import map_in_buckets
from jdml.communicate.codecs import Codec
from jdml.communicate.codecs.reducer import Reducer
from jdml.communicate.collectives.two_phase import two_phase
from jdml.communicate.error_feedback import ErrorFeedback
from jdml.sharding.paths import leaves_with_paths

PyTree = Any
Axis = str | tuple[str, ...]
Content = Codec | ErrorFeedback | Reducer | None
"""What workers may say to each other: everything, codes, codes with their error fed back, …"""
AllReduce = Callable[
    [jax.Array, Axis, Codec, jax.Array | None, ErrorFeedback | None],
    tuple[jax.Array, jax.Array | None],
]
"""``(f32 vector, axis, codec, key, feedback) -> (mean, what it still owes or None)``.

The residuals that a topology returns, averaged over the workers, are what the mean still owes.
"""

TOPOLOGIES: Mapping[str, AllReduce] = MappingProxyType({"two_phase": two_phase})


def all_reduce_mean(
    x: PyTree,
    axis: Axis,
    codec: Content = None,
    topology: str = "two_phase",
    *,
    key: jax.Array | None = None,
    residual: PyTree | None = None,
) -> PyTree:
    """The mean of ``x`` over a mesh axis, equal on every worker; inside ``shard_map``.

    Without a codec: the exact mean, accumulated in f32. With one, in two phases: the vector is cut
    into one chunk per worker; (1) all-to-all of the encoded chunks, each worker averages the chunk
    it owns in f32, its own share uncompressed; (2) all-gather of the encoded averages. Every worker
    decodes the same bytes, so the results are equal bit for bit. Small leaves share a vector.

    Args:
      x: Array or pytree of float arrays of any shape, as each device holds them.
      axis: Name of the worker axis, bound by the surrounding ``shard_map``.
      codec: ``None``, a codec, ``error_feedback(codec)``, or a reducer such as ``power_sgd(4)``.
      topology: How the workers are connected: ``"two_phase"``.
      key: PRNG key, the same on every worker; needed by codecs that draw random numbers.
      residual: With ``error_feedback``: f32, shaped like ``x`` (zeros at first), per worker. With
        a reducer: its state, ``codec.init(x)`` at first; without it the round stands alone.

    Returns:
      The mean, in the dtypes of ``x``, unvarying over ``axis``. With ``residual``: ``(mean,
      residual for the next round)``.

    Raises:
      ValueError: a leaf is not floating; the axis is not bound; an argument is missing or unknown.

    Bytes each worker sends, K workers, d elements: exact ``2 (K-1)/K 4d`` (ring); with a codec
    ``2 (K-1) c`` where c is ``codec.payload_bytes`` of a chunk of ``d / K``, padded to whole
    blocks.
    """
    num_workers = _check(x, axis, codec, topology, key, residual)
    if isinstance(codec, Reducer):
        state = codec.init(x) if residual is None else residual
        mean, state = codec.reduce_mean(x, state, axis, key)
        return mean if residual is None else (mean, state)
    feedback = codec if isinstance(codec, ErrorFeedback) else None
    inner = codec.codec if isinstance(codec, ErrorFeedback) else codec
    leaves, treedef = jax.tree.flatten(x)
    owed = jax.tree.leaves(residual)
    if inner is None or num_workers == 1:
        means = [_exact_mean(leaf, axis) for leaf in leaves]
        # A lone worker says nothing, so it owes nothing: what it still owed is paid now.
        if feedback:
            means = [
                _exact_mean(a.astype(jnp.float32) + e, axis).astype(a.dtype)
                for a, e in zip(leaves, owed, strict=True)
            ]
            rest = [jnp.zeros_like(e) for e in owed]
    else:

        def exchange(number: int, *vectors: jax.Array) -> tuple[jax.Array, ...]:
            bucket_key = None if key is None else jax.random.fold_in(key, number)
            vector = vectors[0] + vectors[1] if feedback else vectors[0]
            mean, error = TOPOLOGIES[topology](vector, axis, inner, bucket_key, feedback)
            return (mean,) if error is None else (mean, error)

        results = map_in_buckets(exchange, [leaves, owed] if feedback else [leaves], inner)
        means = [m.astype(leaf.dtype) for m, leaf in zip(results[0], leaves, strict=True)]
        rest = results[-1]
    mean = jax.tree.unflatten(treedef, means)
    return (mean, jax.tree.unflatten(treedef, rest)) if feedback else mean


def check_exchange(name: str, axis: Axis, codec: Content, topology: str) -> None:
    """Raises unless these can describe an all-reduce; ``name`` is the caller's, for the message."""
    names = (axis,) if isinstance(axis, str) else axis
    if not isinstance(names, tuple) or not names or not all(isinstance(a, str) for a in names):
        raise ValueError(
            f"{name}: axis={axis!r}; expected the name of a mesh axis, or a tuple of names."
        )
    if topology not in TOPOLOGIES:
        raise ValueError(f"{name}: topology={topology!r} is not one of {tuple(TOPOLOGIES)}.")
    if not (codec is None or isinstance(codec, (Codec, ErrorFeedback, Reducer))):
        raise ValueError(
            f"{name}: codec={codec!r} is not a codec. Expected None, a codec such as int8(), or "
            "error_feedback(int8()); did you forget to call the factory?"
        )


def _exact_mean(x: jax.Array, axis: Axis) -> jax.Array:
    return jax.lax.pmean(x.astype(jnp.float32), axis).astype(x.dtype)


def _check(
    x: PyTree,
    axis: Axis,
    codec: Content,
    topology: str,
    key: jax.Array | None,
    residual: PyTree | None,
) -> int:
    """Raises on what cannot work; returns the number of workers."""
    check_exchange("all_reduce_mean", axis, codec, topology)
    for path, leaf in leaves_with_paths(x):
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(
                f"all_reduce_mean: leaf {path!r} has dtype {dtype}; a mean is exchanged in "
                "floating point. Cast it, or leave it out of the tree."
            )
    inner = codec.codec if isinstance(codec, ErrorFeedback) else codec
    if inner is not None and inner.needs_key and key is None:
        raise ValueError(
            f"all_reduce_mean: {inner} draws random numbers; pass key=, the same on every worker "
            "and different each step."
        )
    if isinstance(codec, ErrorFeedback):
        shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(x)]
        if residual is None or [jnp.shape(e) for e in jax.tree.leaves(residual)] != shapes:
            raise ValueError(
                "all_reduce_mean: error feedback needs residual=, f32 and shaped like x; start "
                "from zeros and pass the returned residual to the next round."
            )
    elif residual is not None and not isinstance(codec, Reducer):
        raise ValueError("all_reduce_mean: residual= is used only with codec=error_feedback(...).")
    try:
        return int(jax.lax.axis_size(axis))
    except NameError as error:
        raise ValueError(
            f"all_reduce_mean: axis {axis!r} is not bound here. Call it inside a jax.shard_map "
            f"over a mesh with the axis {axis!r}."
        ) from error
