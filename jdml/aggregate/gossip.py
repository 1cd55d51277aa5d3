"""Gossip: every worker has a model of its own and mixes it with its neighbours' alone."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jdml.communicate import Wire, on_shards, per_worker
from jdml.communicate.branch import choose, first_branch
from jdml.communicate.codecs import Codec
from jdml.communicate.collectives.all_reduce import Axis
from jdml.communicate.frequency import Every, check_every, is_due
from jdml.communicate.topology import Graph, mix
from jdml.communicate.topology.mix import round_taken
from jdml.communicate.wire import settle

PyTree = Any
GraphOf = Graph | Callable[[int], Graph]
"""A graph, or what makes one for a number of workers: ``ring(8)``, or ``ring``."""


class GossipState(NamedTuple):
    """State of :func:`gossip`.

    Attributes:
      steps: int32, local steps taken.
      last: int32, ``steps`` as it was at the last round.
      rounds: int32, rounds of mixing so far.
      metrics: Whether the workers mixed in the last step, unless they always do; and over which
        round of the graph, if that changes.
    """

    steps: jax.Array
    last: jax.Array
    rounds: jax.Array
    metrics: dict[str, jax.Array]


def gossip(
    axis: Axis,
    graph: GraphOf,
    every: Every = 1,
    order: Literal["combine_then_adapt", "adapt_then_combine"] = "combine_then_adapt",
    codec: Codec | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Mixes the models over a graph; last in the chain.

    With W the graph's mixing matrix and u the optimiser's update: ``x_i <- sum_j W_ij x_j + u_i``
    (D-PSGD, combine then adapt), or ``x_i <- sum_j W_ij (x_j + u_j)`` (adapt then combine: a little
    nearer to consensus; but the exchange must wait for the gradients, which the first form need
    not). The workers' mean moves by the mean of their updates, as if they all talked to all.

    Args:
      axis: The worker axis. ``update`` runs inside a ``shard_map`` in which it is manual.
      graph: ``ring(8)``; or ``ring``, which is then made for the axis. Doubly stochastic; for
        directed graphs that are not, see :func:`jdml.aggregate.push_sum`. It may change from round
        to round (``one_peer_exponential``, ``random_pairs``).
      every: Steps between rounds.
      order: When the workers mix.
      codec: ``None`` for exact values, or a quantiser: the mean is kept, but the workers agree no
        better than to the codec's error. Codecs that leave elements out are refused: use
        :func:`jdml.aggregate.choco`.

    Bytes each worker sends a round: one payload for each neighbour, see
    :func:`jdml.communicate.topology.mix`.

    State kept: the workers' own models; counters.

    Raises:
      ValueError: an argument is unknown; when traced: the graph is for another number of workers.

    Reference: Lian et al., "Can Decentralized Algorithms Outperform Centralized Algorithms?"
    (D-PSGD), NeurIPS 2017; Cattivelli & Sayed 2010 (the two orders); Boyd et al. 2006 (random
    pairs).
    """
    check_every("gossip", every)
    if order not in ("combine_then_adapt", "adapt_then_combine"):
        raise ValueError(
            f"gossip(order={order!r}): expected 'combine_then_adapt' or 'adapt_then_combine'."
        )
    check_graph("gossip", graph)
    check_keeps_elements("gossip", codec)

    def init(params: PyTree) -> GossipState:
        del params
        zero = jnp.zeros((), jnp.int32)
        taken = round_taken(graph_for("gossip", graph, axis, doubly=True), zero)
        return GossipState(zero, zero, zero, taken | ({} if every == 1 else first_branch("gossip")))

    def update(
        updates: PyTree,
        state: GossipState,
        params: PyTree | None = None,
        *,
        wire: Wire | None = None,
        **extra: Any,
    ) -> tuple[PyTree, GossipState]:
        del extra
        if params is None:
            raise ValueError("gossip needs the parameters: call tx.update(updates, state, params).")
        over = graph_for("gossip", graph, axis, doubly=True)
        adapted = optax.apply_updates(params, updates)

        def exchange() -> tuple[PyTree, PyTree]:
            if order == "adapt_then_combine":
                mixed = mix_shards(adapted, axis, over, state.rounds, codec, wire)
            else:
                mixed = mix_shards(params, axis, over, state.rounds, codec, wire)
                # The updates, as they are in ``adapted``: no further copy of them is kept for this.
                mixed = jax.tree.map(lambda y, m, x: y + (m - x), adapted, mixed, params)
            moves = jax.tree.map(lambda m, x, u: (m - x).astype(u.dtype), mixed, params, updates)
            return moves, mixed

        steps: jax.Array = optax.safe_increment(state.steps)
        taken = round_taken(over, state.rounds)
        if every == 1:
            (moves, mixed), last, rounds = exchange(), steps, state.rounds + 1
        else:
            due = is_due(every, steps, state.last)
            (moves, mixed), metrics = choose("gossip", due, (lambda: (updates, adapted), exchange))
            taken |= metrics
            last = jnp.where(due, steps, state.last)
            rounds = state.rounds + due.astype(jnp.int32)
        settle(wire, moves, mixed)
        return moves, GossipState(steps, last, rounds, taken)

    return optax.GradientTransformationExtraArgs(init, update)


def mix_shards(
    tree: PyTree,
    axis: Axis,
    graph: Graph,
    number: jax.Array,
    codec: Codec | None,
    wire: Wire | None,
) -> PyTree:
    """:func:`jdml.communicate.topology.mix` of round ``number``, on local shards."""
    key = None if wire is None else wire.key

    def on_shard(x: PyTree, number: jax.Array, *key: jax.Array) -> tuple[PyTree]:
        return (mix(x, axis, graph, number, codec, key[0] if key else None),)

    extras = (number,) if key is None else (number, key)
    (mixed,) = on_shards(on_shard, wire, (per_worker(tree, axis),), extras)
    return mixed


def consensus_distance(tree: PyTree, axis: Axis | None = None) -> jax.Array:
    """How far the workers are apart: ``sqrt(mean_k |x_k - mean_j x_j|^2)``, an f32 scalar.

    Args:
      tree: Parameters: with a leading worker dim (``state.params`` outside a step), or, with
        ``axis``, one worker's own inside a ``shard_map``, where this costs an exact all-reduce.
      axis: The worker axis, inside a ``shard_map``.
    """
    total = jnp.zeros((), jnp.float32)
    for x in jax.tree.leaves(tree):
        x = x.astype(jnp.float32)
        if axis is None:
            squares = jnp.square(x - jnp.mean(x, axis=0, keepdims=True))
            total += jnp.sum(squares) / x.shape[0]
        else:
            total += jax.lax.pmean(jnp.sum(jnp.square(x - jax.lax.pmean(x, axis))), axis)
    return jnp.sqrt(total)


def check_graph(name: str, graph: GraphOf) -> None:
    """Raises unless ``graph`` is a graph or makes one."""
    if not (isinstance(graph, Graph) or callable(graph)):
        raise ValueError(
            f"{name}: graph={graph!r}; expected a graph such as ring(8), or a function of the "
            "number of workers such as ring."
        )


def graph_for(name: str, graph: GraphOf, axis: Axis, *, doubly: bool) -> Graph:
    """The graph for the workers on ``axis``; raises if it does not fit."""
    num_workers = int(jax.lax.axis_size(axis))
    made = graph if isinstance(graph, Graph) else graph(num_workers)
    if not isinstance(made, Graph) or made.num_workers != num_workers:
        raise ValueError(
            f"{name}: {made} does not fit axis {axis!r} of {num_workers} workers. Make it for "
            f"{num_workers}, or pass the factory itself, such as graph=ring."
        )
    if doubly and not made.doubly_stochastic:
        raise ValueError(
            f"{name}: {made} is column-stochastic alone: mixing over it does not lead to the mean. "
            "Use push_sum, or a graph with doubly stochastic weights."
        )
    return made


def check_keeps_elements(name: str, codec: Codec | None) -> None:
    """Raises unless ``codec`` says something of every element: a model is mixed, not a change."""
    if codec is None:
        return
    if not isinstance(codec, Codec):
        raise ValueError(
            f"{name}: codec={codec!r}; expected None or a quantiser such as int8(). Error feedback "
            "between neighbours takes the form of choco(...)."
        )
    if codec.leaves_out:
        raise ValueError(
            f"{name}: {codec} leaves elements out, so that workers would never agree on them. Use "
            "choco(...), which sends differences from what is known and remembers the rest."
        )
