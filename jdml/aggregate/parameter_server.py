"""A parameter server sharded over the workers: each owns a slice of the optimiser. ZeRO-1."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jdml.aggregate.parameter_server_inner import check_elementwise, clipped
from jdml.aggregate.parameter_server_slices import by_path, slices_of
from jdml.communicate import Wire
from jdml.communicate.branch import choose, first_branch
from jdml.communicate.codecs.reducer import Reducer
from jdml.communicate.collectives.all_reduce import Axis, Content, check_exchange
from jdml.communicate.collectives.payloads import key_of
from jdml.communicate.error_feedback import ErrorFeedback
from jdml.communicate.wire import settle

PyTree = Any

_PUSH, _PULL = "parameter_server.push", "parameter_server.pull"


class ServerResidual(NamedTuple):
    """What error feedback still owes in a :class:`ParameterServerState`.

    Attributes:
      push: Of the gradients, at the worker that sent them: f32, in full; ``()`` without feedback.
      pull: Of the updates, at their owner: f32 slices by path; ``{}`` without feedback.
    """

    push: PyTree
    pull: dict[str, jax.Array]


class ParameterServerState(NamedTuple):
    """State of :func:`parameter_server`.

    Attributes:
      steps: int32, steps taken.
      inner: State of the inner optimiser, for the worker's own slices.
      accrued: f32, per worker, sum of its gradients since the last push; ``()`` if it pushes in
        every step.
      pending: f32 slices, what the owner's parameters have moved since the last pull; ``()`` if all
        pull in every step.
      anchor: The parameters as they were last pulled; ``()`` unless the workers move between pulls.
      local: State of the local optimiser, per worker; ``()`` without one.
      residual: What error feedback still owes.
      metrics: Whether the workers pushed, and pulled, in the last step; ``{}`` if they always do.
    """

    steps: jax.Array
    inner: Any
    accrued: PyTree
    pending: PyTree
    anchor: PyTree
    local: Any
    residual: ServerResidual
    metrics: dict[str, jax.Array]


def parameter_server(
    inner: optax.GradientTransformation,
    axis: Axis,
    push: Content = None,
    pull: Content = None,
    push_every: int = 1,
    pull_every: int = 1,
    *,
    local: optax.GradientTransformation | None = None,
    clip_norm: float | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Runs ``inner`` on slices: each worker is the server of its part of every leaf.

    With ``[k]`` worker k's slice of a leaf, in every step::

        a_k <- a_k + g_k                                        # accrued gradients
        every push_every steps:
            G = mean_j a_j[k]                                   # push: reduce-scatter
            u, inner_k <- inner(G, inner_k, w[k]);  w[k] <- w[k] + u;  a_k <- 0
        every pull_every steps:  x_j <- (w[1], ..., w[K])       # pull: all-gather
        else:                    x_j <- x_j + local(g_j)        # nothing without ``local``

    ``w`` are the server's parameters and ``x_j`` those of worker j. A pull says what ``w`` has
    moved since the last one, which is small and compresses well. Where the two differ in that the
    pull lost something, error feedback keeps it at the owner: then ``w = x + residual``.

    Push and pull in every step, exact, are ``chain(mean_gradients(axis), inner)`` with 1/K of its
    state. ``push_every=n`` alone is a step on the sum of n gradients. With ``local=optax.sgd(lr)``
    it is Downpour SGD in lockstep: accrued gradients are added, not averaged, over the steps, and a
    worker's own steps last until its next pull, as in the paper; but a push is the mean over the
    workers, in place of one update for each. With ``inner`` the same ``optax.sgd(lr)`` and
    ``push_every = pull_every = H`` that is local SGD, ``average_params(axis, H)``.

    A leaf is cut along its first dim that is a multiple of K times the number of devices on the
    other mesh axes; one that has no such dim (a scalar, a short vector) is exchanged by
    ``all_reduce_mean`` with the codec of the push, and its state stays whole on every worker.

    Args:
      inner: Optax optimiser, elementwise. It sees slices of the leaves, of the same ranks at the
        same paths.
      axis: The worker axis or axes. ``init`` and ``update`` run inside a ``shard_map`` in which
        they are manual.
      push: ``None`` for the exact mean, a codec, or ``error_feedback(codec)``.
      pull: The same for the updates.
      push_every: Steps between pushes, an int >= 1.
      pull_every: Steps between pulls, an int >= 1. Without ``local``, a pull with no push since the
        last one is left out.
      local: What a worker does alone between pulls, such as ``optax.sgd(lr)``; ``None`` to compute
        gradients at the parameters that it pulled last. Needs ``pull_every > 1``.
      clip_norm: Scales the mean gradient down to this global norm, as
        ``optax.clip_by_global_norm`` would if it saw it whole; one more f32 is summed.

    State kept: that of ``inner``, 1/K of it on each worker. With error feedback on push an f32
    residual per worker in full, on pull a slice. With ``push_every > 1`` the accrued gradients in
    full, per worker; with ``pull_every > 1`` one slice; with ``local`` one more copy of the
    parameters, shared, besides the workers' own.

    Bytes each of K workers sends: a push ``(K-1) c`` and a pull ``(K-1) c``, c the payload of a
    slice: without codecs those of one ring all-reduce.

    A checkpoint resumes on as many workers, bit for bit on the same mesh, and beside other axes as
    long as each leaf is cut along the same dim. On another number of workers
    ``Checkpointer.restore`` refuses it and names the leaves: slices of K workers are none of K'
    workers'. There a run can begin with the saved parameters and a new state.

    Raises:
      ValueError: a codec is none or has no payload (a reducer), an argument is out of its range;
        when traced: ``inner`` is not elementwise, or the axis is not bound.

    Reference: Dean et al., "Large Scale Distributed Deep Networks", NIPS 2012 (Downpour SGD, with
    ``n_push`` and ``n_fetch``); Li et al., "Scaling Distributed Machine Learning with the Parameter
    Server", OSDI 2014; Rajbhandari et al., "ZeRO", SC 2020 (stage 1).
    """
    _check(axis, push, pull, push_every, pull_every, local, clip_norm)
    optimizer = optax.with_extra_args_support(inner)
    alone = None if local is None else optax.with_extra_args_support(local)

    def init(params: PyTree) -> ParameterServerState:
        slices = slices_of(params, axis)
        owned = slices.own(params)
        if slices.num_workers > 1:
            check_elementwise(optimizer, owned)
        zeros = _zeros(params)
        owed = slices.cut(by_path(_zeros(owned))) if isinstance(pull, ErrorFeedback) else {}
        return ParameterServerState(
            steps=jnp.zeros((), jnp.int32),
            inner=optimizer.init(owned),
            accrued=() if push_every == 1 else zeros,
            pending=() if pull_every == 1 else _zeros(owned),
            anchor=() if alone is None else jax.tree.map(jnp.copy, params),
            local=() if alone is None else alone.init(params),
            residual=ServerResidual(zeros if isinstance(push, ErrorFeedback) else (), owed),
            metrics=(first_branch(_PUSH) if push_every > 1 else {})
            | (first_branch(_PULL) if pull_every > 1 else {}),
        )

    def update(
        updates: PyTree,
        state: ParameterServerState,
        params: PyTree | None = None,
        *,
        wire: Wire | None = None,
        **extra: Any,
    ) -> tuple[PyTree, ParameterServerState]:
        if params is None:
            raise ValueError(
                "parameter_server needs the parameters: call tx.update(updates, state, params)."
            )
        slices = slices_of(updates, axis)
        steps: jax.Array = optax.safe_increment(state.steps)
        known = params if alone is None else state.anchor
        debts, metrics = state.residual, dict[str, jax.Array]()
        accrued = updates
        if push_every > 1:
            accrued = jax.tree.map(lambda a, g: a + g.astype(a.dtype), state.accrued, updates)

        def serve() -> tuple[PyTree, Any, PyTree, PyTree]:
            """A push: ``(owner's moves, inner state, accrued, what the push owes)``."""
            mean, owed = slices.mean_to_owners(accrued, debts.push, push, _with_key(wire, 0))
            mean = jax.tree.map(lambda m, g: m.astype(g.dtype), mean, updates)
            if clip_norm is not None:
                mean = clipped(mean, slices.norm(mean), clip_norm)
            owned = slices.own(known, wire)
            for untold in (by_path(state.pending), debts.pull):
                owned = slices.moved(owned, untold)
            moves, inner_state = optimizer.update(mean, state.inner, owned, wire=wire, **extra)
            return moves, inner_state, _zeros(state.accrued), owed

        if pull_every == 1:

            def exchange() -> tuple[PyTree, PyTree, Any, PyTree, ServerResidual]:
                moves, inner_state, rest, owed = serve()
                said, left = slices.owned_to_all(moves, debts.pull, pull, _with_key(wire, 1))
                new = _sum(params, said)
                return _in_dtypes(said, updates), new, inner_state, rest, ServerResidual(owed, left)

            def wait() -> tuple[PyTree, PyTree, Any, PyTree, ServerResidual]:
                return _no_move(updates), params, state.inner, accrued, debts

            if push_every == 1:
                moves, new, inner_state, accrued, debts = exchange()
                accrued = ()
            else:
                (moves, new, inner_state, accrued, debts), metrics = choose(
                    _PUSH, steps % push_every == 0, (wait, exchange)
                )
            settle(wire, moves, new)
            return moves, ParameterServerState(
                steps, inner_state, accrued, (), (), (), debts, metrics
            )

        def serve_and_keep() -> tuple[PyTree, Any, PyTree, PyTree]:
            moves, *rest = serve()
            pending = jax.tree.map(lambda p, u: p + u.astype(p.dtype), state.pending, moves)
            return pending, *rest

        if push_every == 1:
            pending, inner_state, accrued, owed = serve_and_keep()
        else:
            (pending, inner_state, accrued, owed), metrics = choose(
                _PUSH,
                steps % push_every == 0,
                (lambda: (state.pending, state.inner, accrued, debts.push), serve_and_keep),
            )

        mine, local_state = _no_move(updates), ()
        if alone is not None:
            mine, local_state = alone.update(updates, state.local, params, wire=wire, **extra)
            mine = _in_dtypes(mine, updates)

        def fetch() -> tuple[PyTree, PyTree, PyTree, PyTree, dict[str, jax.Array]]:
            said, left = slices.owned_to_all(pending, debts.pull, pull, _with_key(wire, 1))
            anchor: PyTree = ()
            new = _sum(params if alone is None else state.anchor, said)
            if alone is not None:
                anchor = new
                said = jax.tree.map(lambda a, x: a - x, anchor, params)
            return _in_dtypes(said, updates), new, anchor, _zeros(pending), left

        # Nothing new since the last pull: nothing to say, and nothing to undo.
        pull_due = steps % pull_every == 0
        if alone is None:
            pull_due &= steps // push_every > (steps - pull_every) // push_every
        gone = params if alone is None else optax.apply_updates(params, mine)
        (moves, new, anchor, pending, left), pulled = choose(
            _PULL, pull_due, (lambda: (mine, gone, state.anchor, pending, debts.pull), fetch)
        )
        settle(wire, moves, new)
        return moves, ParameterServerState(
            steps,
            inner_state,
            accrued if push_every > 1 else (),
            pending,
            anchor,
            local_state,
            ServerResidual(owed, left),
            metrics | pulled,
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _with_key(wire: Wire | None, number: int) -> Wire | None:
    """The same, with a key for one exchange of the step."""
    return None if wire is None else dataclasses.replace(wire, key=key_of(wire.key, number))


def _zeros(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda x: jnp.zeros_like(x, dtype=jnp.float32), tree)


def _no_move(updates: PyTree) -> PyTree:
    """Zeros that are known to be the same on every worker."""
    return jax.tree.map(lambda u: jnp.zeros(u.shape, u.dtype), updates)


def _in_dtypes(tree: PyTree, like: PyTree) -> PyTree:
    return jax.tree.map(lambda x, y: x.astype(y.dtype), tree, like)


def _sum(params: PyTree, moves: PyTree) -> PyTree:
    """f32 moves added, in the dtypes of the parameters."""
    return jax.tree.map(lambda x, u: (x + u).astype(x.dtype), params, moves)


def _check(
    axis: Axis,
    push: Content,
    pull: Content,
    push_every: int,
    pull_every: int,
    local: optax.GradientTransformation | None,
    clip_norm: float | None,
) -> None:
    for way, codec in (("push", push), ("pull", pull)):
        if isinstance(codec, Reducer):
            raise ValueError(
                f"parameter_server({way}={codec}): it takes means of its own and has no payload "
                "that goes to an owner. Use a codec here, such as int8() or top_k with "
                f"error_feedback; optax.chain(mean_gradients(axis, codec), inner) takes {codec}."
            )
        check_exchange(f"parameter_server({way}=...)", axis, codec, "two_phase")
    for way, every in (("push_every", push_every), ("pull_every", pull_every)):
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            raise ValueError(
                f"parameter_server({way}={every!r}): expected an int >= 1, in steps (1: in every "
                "step)."
            )
    if local is not None and pull_every == 1:
        raise ValueError(
            "parameter_server(local=..., pull_every=1): a local step lasts until the next pull, "
            "which is in the same step. Choose pull_every > 1, or leave local out."
        )
    if clip_norm is not None and not 0 < clip_norm < math.inf:
        raise ValueError(
            f"parameter_server(clip_norm={clip_norm!r}): expected None, or a norm > 0 in the "
            "gradient's units."
        )
