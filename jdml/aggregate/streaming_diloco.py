"""Streaming DiLoCo: the model in fragments that are averaged in turn, and used some steps late."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jdml.communicate import Wire
from jdml.communicate.branch import branch, choose, first_branch
from jdml.communicate.collectives.all_reduce import Axis, Content, check_exchange
from jdml.communicate.exchange import exchange_mean, init_exchange
from jdml.communicate.frequency import check_every
from jdml.communicate.wire import settle

PyTree = Any


class StreamingDiLoCoState(NamedTuple):
    """State of :func:`streaming_diloco`.

    Attributes:
      steps: int32, local steps taken.
      anchor: The agreed parameters, the same on every worker.
      outer: State of the outer optimiser for each fragment, the same on every worker.
      leaving: How far the worker had moved when a fragment's round began, per worker; ``()``
        without a delay.
      residual: What each fragment's exchange keeps; of ``()`` if nothing.
      metrics: Which fragments were exchanged in the last step.
    """

    steps: jax.Array
    anchor: PyTree
    outer: tuple[Any, ...]
    leaving: PyTree
    residual: tuple[PyTree, ...]
    metrics: dict[str, jax.Array]


class _Fragment(NamedTuple):
    """What a step makes of one fragment: its leaves in their places, none in the others'."""

    moves: PyTree
    params: PyTree
    anchor: PyTree
    outer: Any
    residual: PyTree


def streaming_diloco(
    axis: Axis,
    every: int,
    num_fragments: int,
    outer: optax.GradientTransformation,
    *,
    delay: int = 0,
    mixing: float = 0.0,
    fragment_of: Callable[[PyTree], PyTree] | None = None,
    codec: Content = None,
    topology: str = "two_phase",
) -> optax.GradientTransformationExtraArgs:
    """DiLoCo one fragment at a time; last in the chain.

    The leaves are divided into P fragments. Every ``every / P`` steps the next one's round begins:
    each worker notes how far it moved from the anchor, ``d_k = a - x_k``; ``delay`` steps later
    ``a <- a + outer(mean_k d_k)`` and ``x_k <- mixing x_k + (1 - mixing) a`` for that fragment.
    With one fragment, no delay and ``mixing=0`` it is ``average_params(axis, every, outer)``.

    Args:
      axis: The worker axis. ``update`` runs inside a ``shard_map`` in which it is manual.
      every: H, steps between two rounds of the same fragment.
      num_fragments: P, ``1 <= P <= every``.
      outer: Optax optimiser for the anchor, such as ``optax.sgd(0.7, momentum=0.9,
        nesterov=True)``.
      delay: tau, ``0 <= tau < every``: steps that a round may take.
      mixing: How much of its own value a worker keeps, in ``[0, 1)``; the paper takes 0.5 with a
        delay.
      fragment_of: ``params -> tree of int``, the fragment of each leaf; ``None`` divides the leaves
        in order, about equal in size.
      codec: ``None``, a codec (the paper sends ``e3m0()``), or ``error_feedback(codec)``.
      topology: See :func:`jdml.communicate.all_reduce_mean`; the bytes of one fragment, once in
        ``every / P`` steps: the same in sum as DiLoCo, the peak P times less.

    State kept: the workers' own models; one more copy of the parameters and the outer optimiser's
    state, shared; with a delay one more copy per worker; with error feedback an f32 residual.

    Raises:
      ValueError: an argument is out of its range; more fragments than leaves.

    Reference: Douillard et al., "Streaming DiLoCo with overlapping communication", 2025.
    """
    _check(every, num_fragments, delay, mixing)
    check_exchange("streaming_diloco", axis, codec, topology)
    optimizer = optax.with_extra_args_support(outer)

    def fragments(params: PyTree) -> list[int]:
        tree = _balanced(params, num_fragments) if fragment_of is None else fragment_of(params)
        ids = [int(i) for i in jax.tree.leaves(tree)]
        if len(ids) != len(jax.tree.leaves(params)) or set(ids) != set(range(num_fragments)):
            raise ValueError(
                f"streaming_diloco: fragment_of gave {ids} for {len(jax.tree.leaves(params))} "
                f"leaves; expected one of 0…{num_fragments - 1} for each, and each at least once."
            )
        return ids

    def init(params: PyTree) -> StreamingDiLoCoState:
        ids = fragments(params)
        parts = [_part(params, ids, p) for p in range(num_fragments)]
        return StreamingDiLoCoState(
            steps=jnp.zeros((), jnp.int32),
            anchor=jax.tree.map(jnp.copy, params),  # the parameters' own buffers are donated
            outer=tuple(optimizer.init(part) for part in parts),
            leaving=jax.tree.map(jnp.zeros_like, params) if delay else (),
            residual=tuple(init_exchange(codec, part) for part in parts),
            metrics={k: v for p in range(num_fragments) for k, v in first_branch(_name(p)).items()},
        )

    def update(
        updates: PyTree,
        state: StreamingDiLoCoState,
        params: PyTree | None = None,
        *,
        wire: Wire | None = None,
        **extra: Any,
    ) -> tuple[PyTree, StreamingDiLoCoState]:
        if params is None:
            raise ValueError(
                "streaming_diloco needs the parameters: call tx.update(updates, state, params)."
            )
        ids = fragments(params)
        steps: jax.Array = optax.safe_increment(state.steps)
        moved = optax.apply_updates(params, updates)

        # All that is of use in few steps only stands in their branches: others pass it by.
        def _distance(p: int, anchor: PyTree) -> PyTree:
            return jax.tree.map(lambda a, x: a - x, anchor, _moved(p))

        def _moved(p: int) -> PyTree:
            return _part(moved, ids, p)

        def _round(p: int) -> _Fragment:
            anchor = _part(state.anchor, ids, p)
            sent = _part(state.leaving, ids, p) if delay else _distance(p, anchor)
            mean, residual = exchange_mean(sent, state.residual[p], axis, codec, topology, wire)
            step, outer_state = optimizer.update(mean, state.outer[p], anchor, **extra)
            anchor = optax.apply_updates(anchor, step)
            mixed = anchor
            if mixing:
                mixed = jax.tree.map(
                    lambda x, a: (mixing * x + (1 - mixing) * a).astype(x.dtype), _moved(p), anchor
                )
            moves = jax.tree.map(
                lambda y, x, u: (y - x).astype(u.dtype),
                mixed,
                _part(params, ids, p),
                _part(updates, ids, p),
            )
            return _Fragment(moves, mixed, anchor, outer_state, residual)

        def _alone(p: int) -> _Fragment:
            return _Fragment(
                _part(updates, ids, p),
                _moved(p),
                _part(state.anchor, ids, p),
                state.outer[p],
                state.residual[p],
            )

        results: list[_Fragment] = []
        leaving: list[PyTree] = []
        metrics: dict[str, jax.Array] = {}
        for p in range(num_fragments):
            end = _begin(p, True) + delay
            due = (steps % every == end % every) & (steps >= end)
            result, metric = choose(_name(p), due, (partial(_alone, p), partial(_round, p)))
            if delay:  # less than a period, so that a fragment does not leave as it arrives
                leaving.append(
                    branch(
                        steps % every == _begin(p),
                        partial(_distance, p, result.anchor),
                        partial(_part, state.leaving, ids, p),
                    )
                )
            results.append(result)
            metrics |= metric
        moves, news, anchors, outers, residuals = zip(*results, strict=True)
        joined = _joined(updates, ids, moves)
        settle(wire, joined, _joined(params, ids, news))
        return joined, StreamingDiLoCoState(
            steps,
            _joined(state.anchor, ids, anchors),
            outers,
            _joined(state.leaving, ids, tuple(leaving)) if delay else (),
            residuals,
            metrics,
        )

    def _begin(p: int, first: bool = False) -> int:
        """Step, modulo ``every``, at which fragment p's rounds begin; or the first such step."""
        step = (p + 1) * every // num_fragments
        return step if first else step % every

    return optax.GradientTransformationExtraArgs(init, update)


def _name(p: int) -> str:
    return f"streaming_diloco.{p}"


def _balanced(params: PyTree, num_fragments: int) -> PyTree:
    """Leaves in order, cut where the size so far passes the next share of the whole."""
    leaves, treedef = jax.tree.flatten(params)
    if num_fragments > len(leaves):
        raise ValueError(
            f"streaming_diloco: {num_fragments} fragments, but only {len(leaves)} leaves, which "
            "are not cut. Take fewer fragments."
        )
    total, done = sum(x.size for x in leaves), 0
    ids: list[int] = []
    for i, x in enumerate(leaves):
        by_size = int((done + x.size / 2) * num_fragments / max(total, 1))
        # No fragment is left out, and enough leaves are left for those that follow.
        previous = ids[-1] if ids else -1
        latest = num_fragments - (len(leaves) - i)
        ids.append(min(max(by_size, previous, latest), previous + 1, num_fragments - 1))
        done += x.size
    return jax.tree.unflatten(treedef, ids)


def _part(tree: PyTree, ids: list[int], p: int) -> PyTree:
    """The leaves of fragment p in their places; ``None``, which is no leaf, in all others."""
    leaves, treedef = jax.tree.flatten(tree)
    return jax.tree.unflatten(
        treedef, [x if i == p else None for x, i in zip(leaves, ids, strict=True)]
    )


def _joined(like: PyTree, ids: list[int], parts: tuple[PyTree, ...]) -> PyTree:
    sources = [iter(jax.tree.leaves(part)) for part in parts]
    return jax.tree.unflatten(jax.tree.structure(like), [next(sources[i]) for i in ids])


def _check(every: int, num_fragments: int, delay: int, mixing: float) -> None:
    check_every("streaming_diloco", every, schedules=False)
    if not isinstance(num_fragments, int) or not 1 <= num_fragments <= every:
        raise ValueError(
            f"streaming_diloco(num_fragments={num_fragments!r}): expected 1 <= P <= every={every}."
        )
    if not isinstance(delay, int) or not 0 <= delay < every:
        raise ValueError(
            f"streaming_diloco(delay={delay!r}): expected 0 <= delay < every={every}; a fragment's "
            "round must end before its next one begins."
        )
    if not 0 <= mixing < 1:
        raise ValueError(
            f"streaming_diloco(mixing={mixing!r}): expected 0 <= mixing < 1; at 1 the workers "
            "would never hear of each other."
        )
