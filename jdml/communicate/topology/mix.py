"""A round of mixing over a graph: ``x_i <- sum_j W_ij x_j`` by ``ppermute``."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jdml.communicate.buckets import BUCKET_ELEMENTS, map_in_buckets
from jdml.communicate.codecs.base import Codec
from jdml.communicate.codecs.packing import pack, unpack
from jdml.communicate.permute import Axis, permute
from jdml.communicate.topology.graph import Graph
from jdml.communicate.topology.permutations import Permutation
from jdml.communicate.wire import per_worker, varies
from jdml.sharding.paths import leaves_with_paths

PyTree = Any

ROUND = "round"
SMALL = 1 << 16
"""Exact values of longer leaves travel alone: all that joining them would do is copy them."""


def mix(
    x: PyTree,
    axis: Axis,
    graph: Graph,
    step: int | jax.Array | None = None,
    codec: Codec | None = None,
    key: jax.Array | None = None,
) -> PyTree:
    """One round over the graph; inside a ``shard_map`` in which ``axis`` is manual.

    ``x_i <- sum_j W_ij x_j``. With a codec C, over the neighbours j::

        x_i <- x_i - (1 - W_ii) C(x_i) + sum_j W_ij C(x_j)

    What a worker gives away is what the others read of it, so **the workers' sum, and mean, is kept
    whatever the codec loses**. But how far they stay apart settles at the codec's error in ``x``
    itself: to agree, take an exact codec, or send differences that shrink (CHOCO, on
    :func:`neighbour_sum`).

    Args:
      x: Array or pytree of float arrays of any shape, as each device holds them.
      axis: The worker axis, or a tuple of axes, whose positions in row-major order are the workers.
      graph: As many workers as ``axis`` has positions.
      step: Number of the round, the same on every worker; needed if ``graph.period > 1``. An int
        compiles that round alone, an array all of a period, to choose from.
      codec: What payloads are encoded with; ``None`` sends f32.
      key: PRNG key, the same on every worker; needed by codecs that draw random numbers.

    Returns:
      Like ``x``, varying over ``axis``; accumulated in f32.

    Raises:
      ValueError: a leaf is not floating; ``axis`` is not bound or has another size than the graph;
        an argument is missing, or no graph or codec.

    Bytes each worker sends: as many payloads as it has neighbours that hear it, each of
    ``codec.payload_bytes`` of the joined leaves (4 per element without codec). One
    ``collective-permute`` per permutation of ``graph.permutations`` and bucket of leaves.

    Reference: Xiao & Boyd 2004; Lian et al. 2017 (D-PSGD); Koloskova et al. 2019 (why compressed
    differences).
    """
    heard, said = neighbour_sum(x, axis, graph, step, codec, key)
    own = _own_weight(graph, axis, step)

    def combine(x: jax.Array, heard: jax.Array, said: jax.Array) -> jax.Array:
        mine = x.astype(jnp.float32)
        mine = own * mine if codec is None else mine - (1 - own) * said
        return (mine + heard).astype(x.dtype)

    return jax.tree.map(combine, x, heard, said)


def neighbour_sum(
    x: PyTree,
    axis: Axis,
    graph: Graph,
    step: int | jax.Array | None = None,
    codec: Codec | None = None,
    key: jax.Array | None = None,
) -> tuple[PyTree, PyTree]:
    """What the neighbours said, weighted, and what this worker said, as the others read it.

    ``(sum over neighbours j of W_ij C(x_j), C(x_i))``, f32. Arguments, errors and bytes as for
    :func:`mix`. CHOCO's ``s_i = sum_j W_ij xhat_j`` moves by ``heard + W_ii said`` and its
    ``xhat_i`` by ``said``, with ``x`` the difference ``x_i - xhat_i``.
    """
    _check(x, axis, graph, step, codec, key)
    x = per_worker(x, axis)
    leaves, treedef = jax.tree.flatten(x)
    if graph.num_workers == 1:
        said = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), x)
        return jax.tree.map(jnp.zeros_like, said), said
    me = jax.lax.axis_index(axis)

    def exchange(number: int, vector: jax.Array, _: jax.Array) -> tuple[jax.Array, jax.Array]:
        payload: Any = vector
        if codec is not None:
            draws = None
            if codec.needs_key:
                assert key is not None
                draws = jax.random.fold_in(jax.random.fold_in(key, number), me)
            payload = codec.encode_rows(vector[None], draws)
        # Barrier: fused into its users, the payload would be computed once for each of them.
        payload = jax.lax.optimization_barrier(payload)
        buffer = payload if codec is None else pack(payload)

        def read(buffer: jax.Array) -> jax.Array:
            if codec is None:
                return buffer
            return codec.decode_rows(unpack(buffer, payload), vector.size)[0]

        def carried_by(permutations: tuple[Permutation, ...]) -> jax.Array:
            total = per_worker(jnp.zeros_like(vector), axis)
            for permutation in permutations:
                received = permute(buffer, axis, permutation.pairs)
                weight = jnp.asarray(permutation.weights, jnp.float32)[me]
                share = weight * read(received)
                if not np.all(permutation.weights):
                    # Nothing was received: a payload of zero bytes may decode to anything.
                    share = jnp.where(weight > 0, share, 0)
                total = total + share
            return total

        rounds = graph.permutations
        if graph.period == 1:
            heard = carried_by(rounds[0])
        elif isinstance(step, (int, np.integer)):
            heard = carried_by(rounds[step % graph.period])
        else:
            assert step is not None
            branches = [lambda r=r: carried_by(r) for r in rounds]
            with jax.named_scope(f"branch.{ROUND}"):
                heard = jax.lax.switch(step % graph.period, branches)
        said = payload if codec is None else codec.decode_rows(payload, vector.size)[0]
        return heard, said

    # Two results per bucket, so two lists of leaves.
    limit = SMALL if codec is None else BUCKET_ELEMENTS
    heard, said = map_in_buckets(exchange, [leaves, leaves], codec or _Whole(), limit)
    return jax.tree.unflatten(treedef, heard), jax.tree.unflatten(treedef, said)


def round_taken(graph: Graph, number: jax.Array) -> dict[str, jax.Array]:
    """Which of its rounds a graph that changes is in, to put among the state's metrics.

    By it ``jdml.sharding.bytes_per_axis(..., taken=...)`` counts what that round sends, and not all
    of them; see :func:`jdml.communicate.branch.choose`. ``{}`` for a constant graph.
    """
    if graph.period == 1:
        return {}
    return {f"branch.{ROUND}": (number % graph.period).astype(jnp.float32)}


def _own_weight(graph: Graph, axis: Axis, step: int | jax.Array | None) -> jax.Array:
    """``W_ii`` of this round, f32 ``[]``."""
    table = jnp.asarray([np.diag(m) for m in graph.matrices], jnp.float32)
    return table[0 if graph.period == 1 else step % graph.period, jax.lax.axis_index(axis)]  # type: ignore[operator]


@dataclasses.dataclass(frozen=True)
class _Whole(Codec):
    """Stands for no codec where leaves are joined."""

    @property
    def granularity(self) -> int:
        return 1

    def encode_rows(self, rows: jax.Array, key: jax.Array | None = None) -> jax.Array:
        raise NotImplementedError

    def decode_rows(self, payload: jax.Array, length: int) -> jax.Array:
        raise NotImplementedError

    def payload_bytes(self, length: int) -> int:
        return 4 * length


def _check(
    x: PyTree,
    axis: Axis,
    graph: Graph,
    step: int | jax.Array | None,
    codec: Codec | None,
    key: jax.Array | None,
) -> None:
    if not isinstance(graph, Graph):
        raise ValueError(
            f"mix: graph={graph!r} is not a Graph; expected one such as ring(8). Did you forget to "
            "call the factory?"
        )
    if not (codec is None or isinstance(codec, Codec)):
        raise ValueError(
            f"mix: codec={codec!r} is not a codec; expected None or a codec such as int8(). Error "
            "feedback between neighbours takes another form: send differences, as CHOCO does."
        )
    if codec is not None and codec.needs_key and key is None:
        raise ValueError(
            f"mix: {codec} draws random numbers; pass key=, the same on every worker and different "
            "each round."
        )
    for path, leaf in leaves_with_paths(x):
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(
                f"mix: leaf {path!r} has dtype {dtype}; values are mixed in floating point. Cast "
                "it, or leave it out of the tree."
            )
    try:
        size = int(jax.lax.axis_size(axis))
    except NameError as error:
        raise ValueError(
            f"mix: axis {axis!r} is not bound here. Call it inside a jax.shard_map over a mesh "
            f"with the axis {axis!r}."
        ) from error
    if size != graph.num_workers:
        raise ValueError(
            f"mix: {graph} has {graph.num_workers} workers but axis {axis!r} has {size} positions; "
            f"make the graph for {size}."
        )
    if graph.period > 1 and step is None:
        raise ValueError(f"mix: {graph} changes from round to round; pass step=.")
    if isinstance(step, jax.Array) and varies(step, axis):
        raise ValueError(
            f"mix: step varies over axis {axis!r}; all workers must be in the same round. Keep one "
            "counter that depends on nothing of a worker's own."
        )
