"""Push-sum: gossip over directed graphs, where what is heard and what is said need not balance."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jdml.aggregate.gossip import GraphOf, check_graph, check_keeps_elements, graph_for, mix_shards
from jdml.communicate import Wire, per_worker
from jdml.communicate.codecs import Codec
from jdml.communicate.collectives.all_reduce import Axis
from jdml.communicate.topology import mix, one_peer_exponential
from jdml.communicate.topology.mix import round_taken
from jdml.communicate.wire import settle

PyTree = Any


class PushSumState(NamedTuple):
    """State of :func:`push_sum`.

    Attributes:
      rounds: int32, rounds so far.
      weight: f32 ``[]``, the push-sum weight, per worker; the weights of all sum to K.
      metrics: Which round of the graph the last step had, if that changes.
    """

    rounds: jax.Array
    weight: jax.Array
    metrics: dict[str, jax.Array]


def push_sum(
    axis: Axis, graph: GraphOf = one_peer_exponential, codec: Codec | None = None
) -> optax.GradientTransformationExtraArgs:
    """Stochastic gradient push; last in the chain.

    With P column-stochastic: ``x_i <- sum_j P_ij (x_j + u_j)``, ``w_i <- sum_j P_ij w_j``, and the
    model that is trained and used is ``z_i = x_i / w_i``. Only who sends must know how much it
    gives away, so any strongly connected directed graph will do.

    Args:
      axis: The worker axis. ``update`` runs inside a ``shard_map`` in which it is manual.
      graph: Column-stochastic, directed or not, constant or changing from round to round; the
        default sends to one worker a round, ``2^k`` places on.
      codec: ``None`` for exact values, or a quantiser; see :func:`jdml.aggregate.gossip`. Weights
        are exact in any case.

    Bytes each worker sends: one payload, and 4 bytes of weight, for each worker that hears it.

    State kept: the workers' own models, and one number each.

    Raises:
      ValueError: no codec or graph; when traced: the graph is for another number of workers.

    Reference: Assran et al., "Stochastic Gradient Push for Distributed Deep Learning", ICML 2019;
    Kempe, Dobra & Gehrke 2003 (push-sum).
    """
    check_graph("push_sum", graph)
    check_keeps_elements("push_sum", codec)

    def init(params: PyTree) -> PushSumState:
        del params
        zero = jnp.zeros((), jnp.int32)
        taken = round_taken(graph_for("push_sum", graph, axis, doubly=False), zero)
        return PushSumState(zero, jnp.ones((), jnp.float32), taken)

    def update(
        updates: PyTree,
        state: PushSumState,
        params: PyTree | None = None,
        *,
        wire: Wire | None = None,
        **extra: Any,
    ) -> tuple[PyTree, PushSumState]:
        del extra
        if params is None:
            raise ValueError(
                "push_sum needs the parameters: call tx.update(updates, state, params)."
            )
        over = graph_for("push_sum", graph, axis, doubly=False)
        numerator = jax.tree.map(
            lambda z, u: state.weight * z.astype(jnp.float32) + u, params, updates
        )
        mixed = mix_shards(numerator, axis, over, state.rounds, codec, wire)
        weight = mix(per_worker(state.weight, axis), axis, over, state.rounds)
        ratio = jax.tree.map(lambda x: x / weight, mixed)
        moves = jax.tree.map(lambda y, z, u: (y - z).astype(u.dtype), ratio, params, updates)
        settle(wire, moves, ratio)
        return moves, PushSumState(state.rounds + 1, weight, round_taken(over, state.rounds))

    return optax.GradientTransformationExtraArgs(init, update)
