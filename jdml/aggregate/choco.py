"""CHOCO: gossip that converges whatever the codec, by sending changes of a public copy."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jdml.aggregate.gossip import GraphOf, check_graph, graph_for
from jdml.communicate import Wire, on_shards, per_worker
from jdml.communicate.codecs import Codec
from jdml.communicate.collectives.all_reduce import Axis
from jdml.communicate.topology import Graph, neighbour_sum
from jdml.communicate.wire import settle

PyTree = Any


class ChocoState(NamedTuple):
    """State of :func:`choco`, per worker, f32.

    Attributes:
      public: What the neighbours know of this worker's model, ``xhat_i``.
      pull: Where what it knows of theirs draws it: ``sum_j W_ij (xhat_j - xhat_i)``. It shrinks as
        the workers agree, and its rounding errors with it; the sum ``sum_j W_ij xhat_j`` in its
        place drifted by 3e-4 within 800 rounds.
    """

    public: PyTree
    pull: PyTree


def choco(
    axis: Axis, graph: GraphOf, codec: Codec | None, gamma: float
) -> optax.GradientTransformationExtraArgs:
    """Mixes the models over a graph through compressed differences; last in the chain.

    ``x <- x + u``; ``q_i = C(x_i - xhat_i)`` goes to the neighbours; ``xhat_j <- xhat_j + q_j``
    at all who hear j; ``x_i <- x_i + gamma sum_j W_ij (xhat_j - xhat_i)``. As the models settle,
    the differences shrink, and with them what the codec loses. One sum of what was heard stands for
    the copies of all neighbours.

    Args:
      axis: The worker axis. ``update`` runs inside a ``shard_map`` in which it is manual.
      graph: Undirected and the same in every round: ``ring(8)``, or ``ring``.
      codec: Any codec; biased ones such as ``top_k(0.01)`` too. ``None`` sends exact differences.
      gamma: Step size of the mixing, in (0, 1]; the coarser the codec, the smaller. With an exact
        codec and 1 this is ``gossip(..., order="adapt_then_combine")``.

    Bytes each worker sends: one payload for each neighbour, see
    :func:`jdml.communicate.topology.mix`.

    State kept: the workers' own models, and two more f32 copies per worker.

    Raises:
      ValueError: ``gamma`` is out of its range; no codec or graph; when traced: the graph is for
        another number of workers, or changes from round to round.

    Reference: Koloskova, Stich & Jaggi, "Decentralized Stochastic Optimization and Gossip
    Algorithms with Compressed Communication", ICML 2019, algorithms 2 and 6.
    """
    if not 0 < gamma <= 1:
        raise ValueError(f"choco(gamma={gamma!r}): expected 0 < gamma <= 1.")
    if not (codec is None or isinstance(codec, Codec)):
        raise ValueError(
            f"choco: codec={codec!r}; expected None or a codec such as top_k(0.01). It feeds back "
            "its own error."
        )
    check_graph("choco", graph)

    def init(params: PyTree) -> ChocoState:
        # All start from the same parameters, which everyone knows.
        known = jax.tree.map(lambda p: jnp.array(p, jnp.float32), params)
        return ChocoState(known, jax.tree.map(jnp.zeros_like, known))

    def update(
        updates: PyTree,
        state: ChocoState,
        params: PyTree | None = None,
        *,
        wire: Wire | None = None,
        **extra: Any,
    ) -> tuple[PyTree, ChocoState]:
        del extra
        if params is None:
            raise ValueError("choco needs the parameters: call tx.update(updates, state, params).")
        over = _graph(graph, axis)
        moved = optax.apply_updates(params, updates)
        key = None if wire is None else wire.key

        def exchange(
            x: PyTree, public: PyTree, pull: PyTree, *key: jax.Array
        ) -> tuple[PyTree, PyTree, PyTree]:
            difference = jax.tree.map(lambda x, p: x.astype(jnp.float32) - p, x, public)
            heard, said = neighbour_sum(
                difference, axis, over, codec=codec, key=key[0] if key else None
            )
            own = jnp.asarray(over.weights.diagonal(), jnp.float32)[jax.lax.axis_index(axis)]
            public = jax.tree.map(jnp.add, public, said)
            pull = jax.tree.map(lambda p, h, s: p + (h - (1 - own) * s), pull, heard, said)
            # Made once: else all of it is read again where the model is mixed. One barrier for each
            # leaf: together (jax 0.10) all would vary as any of them does.
            pull = jax.tree.map(jax.lax.optimization_barrier, pull)
            mixed = jax.tree.map(lambda x, p: (x + gamma * p).astype(x.dtype), x, pull)
            return mixed, public, pull

        trees = per_worker((moved, state.public, state.pull), axis)
        mixed, public, pull = on_shards(
            exchange, wire, trees, () if key is None else (key,), num_outputs=3
        )
        moves = jax.tree.map(lambda m, x, u: (m - x).astype(u.dtype), mixed, params, updates)
        settle(wire, moves, mixed)
        return moves, ChocoState(public, pull)

    return optax.GradientTransformationExtraArgs(init, update)


def _graph(graph: GraphOf, axis: Axis) -> Graph:
    over = graph_for("choco", graph, axis, doubly=True)
    if over.period > 1:
        raise ValueError(
            f"choco: {over} changes from round to round, but what is known of a neighbour is kept "
            "as one weighted sum. Use a graph that stays, such as ring or exponential."
        )
    return over
