"""All-reduce of a mean, exact or compressed, for use inside any ``shard_map``."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp

from jdml.communicate.buckets import map_in_buckets
from jdml.communicate.codecs import Codec
from jdml.communicate.codecs.reducer import Reducer
from jdml.communicate.collectives.checks import Content as Content
from jdml.communicate.collectives.checks import check_call, check_content, check_names
from jdml.communicate.collectives.gather_sum import gather_sum
from jdml.communicate.collectives.hierarchical import hierarchical
from jdml.communicate.collectives.payloads import Axis as Axis
from jdml.communicate.collectives.payloads import Values
from jdml.communicate.collectives.ring import ring
from jdml.communicate.collectives.tree import tree
from jdml.communicate.collectives.two_phase import two_phase
from jdml.communicate.error_feedback import ErrorFeedback
from jdml.communicate.joined import joined_mean
from jdml.communicate.tiles import in_tiles

PyTree = Any
AllReduce = Callable[
    [jax.Array, Axis, Codec, jax.Array | None, ErrorFeedback | None],
    tuple[jax.Array, jax.Array | None],
]
"""``(f32 vector, axis, codec, key, feedback) -> (mean, what it still owes or None)``.

The residuals that a topology returns, averaged over the workers, are what the mean still owes.
"""

TOPOLOGIES: Mapping[str, AllReduce] = MappingProxyType(
    {
        "two_phase": two_phase,
        "ring": ring,
        "tree": tree,
        "hierarchical": hierarchical,
        "all_gather": gather_sum,
    }
)

SMALL = 1 << 16
"""Exact means of shorter leaves are taken together.

XLA joins the all-reduces of one program, but its CPU back end still sends each array by itself:
100 leaves of 1,000 elements took 0.79 s among four processes, joined 4 ms (Gloo, jax 0.10.2).
"""


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

    Without a codec, in the default topology: ``jax.lax.pmean``, in f32. Else by the topology named,
    on vectors that small leaves share; sums are f32, and results equal bit for bit on all workers:

    - ``"two_phase"``: all-to-all of encoded chunks, each worker averages its own and says that.
    - ``"ring"``: partial sums travel from neighbour to neighbour, encoded again at each hop.
    - ``"tree"``: recursive doubling; few messages, of the whole vector.
    - ``"hierarchical"``: ``axis=("slow", "fast")``; exact along the last axis, two-phase along the
      others on what is left.
    - ``"all_gather"``: everyone says everything to all: for very sparse codecs, such as ``top_k``.

    Args:
      x: Array or pytree of float arrays of any shape, as each device holds them.
      axis: Name of the worker axis, or names of several, bound by the surrounding ``shard_map``.
      codec: ``None``, a codec, ``error_feedback(codec)``, or a reducer such as ``power_sgd(4)``,
        which has a way of its own and takes no topology.
      topology: How the workers are connected.
      key: PRNG key, the same on every worker; needed by codecs that draw random numbers.
      residual: With ``error_feedback``: f32, shaped like ``x`` (zeros at first), per worker. With
        a reducer: its state, ``codec.init(x)`` at first; without it the round stands alone.

    Returns:
      The mean, in the dtypes of ``x``, unvarying over ``axis``. With ``residual``: ``(mean,
      residual for the next round)``.

    Raises:
      ValueError: a leaf is not floating; the axis is not bound; an argument is missing or unknown.

    Bytes the busiest of K workers sends of d elements, where c(n) is ``codec.payload_bytes`` of n
    elements rounded up to whole blocks (4 n without a codec):

    - exact, two-phase and ring ``2 (K-1) c(d/K)``; all-gather ``(K-1) c(d)``;
    - tree ``m c(d)`` with ``m = log2 K``; one more where K is no power of two, m rounded down;
    - hierarchical ``2 (S-1) c(d/K)`` along S slow places, ``2 (F-1)/F 4 d`` along F fast ones.

    :func:`jdml.communicate.predict` says them, and the time they take, for a link.
    """
    check_exchange("all_reduce_mean", axis, codec, topology)
    num_workers = check_call("all_reduce_mean", x, axis, codec, key, residual)
    if isinstance(codec, Reducer):
        state = codec.init(x) if residual is None else residual
        mean, state = codec.reduce_mean(x, state, axis, key)
        return mean if residual is None else (mean, state)
    feedback = codec if isinstance(codec, ErrorFeedback) else None
    inner = codec.codec if isinstance(codec, ErrorFeedback) else codec
    leaves, treedef = jax.tree.flatten(x)
    owed = jax.tree.leaves(residual)
    if num_workers == 1 or (inner is None and topology == "two_phase"):
        # A lone worker says nothing, so it owes nothing: what it still owed is paid now.
        said = leaves
        if feedback:
            said = [a.astype(jnp.float32) + e for a, e in zip(leaves, owed, strict=True)]
        means = joined_mean([a.astype(jnp.float32) for a in said], axis, SMALL)
        rest = [jnp.zeros_like(e) for e in owed]
    else:
        words = inner or Values()

        def exchange(number: int, *vectors: jax.Array) -> tuple[jax.Array, ...]:
            bucket_key = None if key is None else jax.random.fold_in(key, number)
            vector = vectors[0] + vectors[1] if feedback else vectors[0]
            mean, error = in_tiles(TOPOLOGIES[topology])(vector, axis, words, bucket_key, feedback)
            return (mean,) if error is None else (mean, error)

        results = map_in_buckets(exchange, [leaves, owed] if feedback else [leaves], words)
        means, rest = results[0], results[-1]
    means = [m.astype(leaf.dtype) for m, leaf in zip(means, leaves, strict=True)]
    mean = jax.tree.unflatten(treedef, means)
    return (mean, jax.tree.unflatten(treedef, rest)) if feedback else mean


def check_exchange(name: str, axis: Axis, codec: Content, topology: str) -> None:
    """Raises unless these can describe an all-reduce; ``name`` is the caller's, for the message."""
    check_names(name, axis)
    if topology not in TOPOLOGIES:
        raise ValueError(f"{name}: topology={topology!r} is not one of {tuple(TOPOLOGIES)}.")
    if topology == "hierarchical" and (isinstance(axis, str) or len(axis) < 2):
        raise ValueError(
            f'{name}: topology="hierarchical" needs slow axes and a fast one, got axis={axis!r}. '
            'Name them in a tuple, the fast one last: axis=("slow", "fast"), on a mesh such as '
            'make_mesh({"slow": 2, "fast": 4}).'
        )
    check_content(name, codec, reducers=True)
    if isinstance(codec, Reducer) and topology != "two_phase":
        raise ValueError(
            f"{name}: {codec} exchanges in a way of its own, not by topology={topology!r}. Leave "
            "topology out, or use a codec such as int8()."
        )
