"""Deep gradient compression: sparse gradients with momentum kept where it belongs."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jdml.communicate import Wire, error_feedback
from jdml.communicate.branch import choose, first_branch
from jdml.communicate.codecs import Codec, top_k
from jdml.communicate.codecs.sparse import check_values
from jdml.communicate.collectives.all_reduce import Axis, Content, check_exchange
from jdml.communicate.exchange import exchange_mean

PyTree = Any

_TOPOLOGY = "all_gather"


class DgcResidual(NamedTuple):
    """What a worker has not said, f32, shaped like the gradients; both are linear in them.

    Attributes:
      velocity: u, its momentum.
      unsent: v, the velocities that were added up since an element was last sent.
    """

    velocity: PyTree
    unsent: PyTree


class DgcState(NamedTuple):
    """State of :func:`dgc`.

    Attributes:
      steps: int32, steps taken.
      residual: What each worker holds back.
      metrics: Which phase of the warm-up the last step was in; ``{}`` without a warm-up.
    """

    steps: jax.Array
    residual: DgcResidual
    metrics: dict[str, jax.Array]


def dgc(
    axis: Axis,
    sparsity: float = 0.999,
    momentum: float = 0.9,
    nesterov: bool = False,
    clip_norm: float | None = None,
    warmup_steps: int = 0,
    values: Codec | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Sends the largest of the velocities each worker has added up; in place of momentum SGD.

    On every worker, M marking the elements of largest ``|v|``::

        g <- g min(1, clip_norm / (sqrt(K) ||g||))        local clipping, if asked
        u <- momentum u + g                               momentum correction
        v <- v + u                                        (nesterov: v + g + momentum u)
        say v M;  v <- v (1 - M);  u <- u (1 - M)         momentum factor masking

    and the update is ``(1/K) sum_k v_k M_k``: chain ``optax.sgd(lr)``, without momentum, after it.
    ``dgc("data")`` keeps an element's velocity growing on its worker until it is sent, so that the
    sum of what is sent has momentum's discount, and drops it then, since it is stale. Where nothing
    is held back (sparsity 0, or one worker) nothing is masked: synchronous momentum SGD.

    Which elements: the largest of each bucket of leaves, as each device holds them. Leaves shorter
    than 2**20 elements share buckets, biases and scales among them, and compete there; a longer
    one is a bucket. (The paper has a threshold for each leaf.)

    Args:
      axis: The worker axis or axes. ``update`` runs inside a ``shard_map`` in which they are
        manual.
      sparsity: Part of the elements held back in each step, in [0, 1).
      momentum: Discount of the velocity in [0, 1); 0 is top-k with error feedback.
      nesterov: Whether the velocity looks one step ahead.
      clip_norm: Greatest norm of the mean gradient, in the units of the gradient: each worker clips
        its own, over all leaves, to ``clip_norm / sqrt(K)``, before it is added up.
      warmup_steps: Number of steps over which the sparsity rises to its final value, in equal
        phases of 75, 93.75, 98.44 and 99.61 %, those that are less. Each is a branch of the step.
      values: Codec of the values that are sent, ``None`` for f32. What it loses stays in v.

    State kept: u and v, f32, per worker, each of the gradients' size.

    Bytes each of K workers sends in a step, for a bucket of d elements: ``(K-1) c``, c the payload
    of ``top_k(1 - sparsity, values)``, about ``5.6 (1 - sparsity) d`` at 0.999. At sparsity 0 those
    of the exact mean (with ``values``: ``(K-1)`` payloads).

    Raises:
      ValueError: an argument is out of its range.

    Reference: Lin, Han, Mao, Wang and Dally, "Deep Gradient Compression: Reducing the Communication
    Bandwidth for Distributed Training", ICLR 2018.
    """
    _check(axis, sparsity, momentum, clip_norm, warmup_steps, values)
    parts = densities(sparsity, warmup_steps)
    bounds = [math.ceil(warmup_steps * i / (len(parts) - 1)) for i in range(1, len(parts))]

    def init(params: PyTree) -> DgcState:
        def zeros() -> PyTree:
            return jax.tree.map(lambda p: jnp.zeros_like(p, dtype=jnp.float32), params)

        residual = DgcResidual(zeros(), zeros())
        return DgcState(
            jnp.zeros((), jnp.int32), residual, first_branch("dgc") if len(parts) > 1 else {}
        )

    def update(
        updates: PyTree,
        state: DgcState,
        params: PyTree | None = None,
        *,
        wire: Wire | None = None,
        **extra: Any,
    ) -> tuple[PyTree, DgcState]:
        del params, extra
        num_workers = jax.lax.axis_size(axis)
        gradient = jax.tree.map(lambda g: g.astype(jnp.float32), updates)
        if clip_norm is not None:
            gradient = _clipped(gradient, clip_norm / math.sqrt(num_workers))

        def ahead(u: jax.Array, g: jax.Array) -> jax.Array:
            return momentum * u + g

        velocity = jax.tree.map(ahead, state.residual.velocity, gradient)
        look = jax.tree.map(ahead, velocity, gradient) if nesterov else velocity
        unsent = jax.tree.map(jnp.add, state.residual.unsent, look)
        # Made once: what was sent is told by comparing this with what is left of it.
        unsent = jax.lax.optimization_barrier(unsent)

        def say(part: float) -> tuple[PyTree, PyTree]:
            return exchange_mean(
                unsent, _zeros(unsent), axis, _content(part, values), _TOPOLOGY, wire
            )

        metrics: dict[str, jax.Array] = {}
        if sparsity == 0 and values is None:
            mean, _ = exchange_mean(unsent, (), axis, None, "two_phase", wire)
            left = _zeros(unsent)
        elif len(parts) == 1:
            mean, left = say(parts[0])
        else:
            phase = jnp.sum(state.steps >= jnp.asarray(bounds, jnp.int32), dtype=jnp.int32)
            (mean, left), metrics = choose(
                "dgc", phase, [functools.partial(say, part) for part in parts]
            )
        if sparsity > 0 and num_workers > 1:
            velocity = jax.tree.map(
                lambda u, before, after: jnp.where(before == after, u, 0), velocity, unsent, left
            )
        mean = jax.tree.map(lambda m, g: m.astype(g.dtype), mean, updates)
        steps: jax.Array = optax.safe_increment(state.steps)
        return mean, DgcState(steps, DgcResidual(velocity, left), metrics)

    return optax.GradientTransformationExtraArgs(init, update)


def densities(sparsity: float, warmup_steps: int) -> tuple[float, ...]:
    """Parts of the elements that are sent in each phase of the warm-up, and after it."""
    rising = [4.0**-i for i in range(1, 5)] if warmup_steps else []
    return (*(part for part in rising if part > 1 - sparsity), 1 - sparsity)


def _content(part: float, values: Codec | None) -> Content:
    if part < 1:
        return error_feedback(top_k(part, values), two_sided=False)
    assert values is not None
    return error_feedback(values, two_sided=False)


def _clipped(gradient: PyTree, largest: float) -> PyTree:
    """Of a norm of at most ``largest``; a norm that is not finite stays visible."""
    norm = optax.tree.norm(gradient)
    return jax.tree.map(lambda g: g * jnp.minimum(1, largest / norm), gradient)


def _zeros(tree: PyTree) -> PyTree:
    return jax.tree.map(jnp.zeros_like, tree)


def _check(
    axis: Axis,
    sparsity: float,
    momentum: float,
    clip_norm: float | None,
    warmup_steps: int,
    values: Codec | None,
) -> None:
    check_exchange("dgc", axis, None, _TOPOLOGY)
    for name, part in (("sparsity", sparsity), ("momentum", momentum)):
        if isinstance(part, bool) or not isinstance(part, (int, float)) or not 0 <= part < 1:
            raise ValueError(
                f"dgc({name}={part!r}): expected a number in [0, 1), such as "
                f"{'0.999, the part of the elements held back' if name == 'sparsity' else 0.9}."
            )
    if clip_norm is not None and not 0 < clip_norm < math.inf:
        raise ValueError(
            f"dgc(clip_norm={clip_norm!r}): expected None, or a norm > 0 in the gradient's units."
        )
    if not isinstance(warmup_steps, int) or isinstance(warmup_steps, bool) or warmup_steps < 0:
        raise ValueError(
            f"dgc(warmup_steps={warmup_steps!r}): expected an int >= 0, the number of steps until "
            "the final sparsity; the paper takes four epochs."
        )
    check_values("dgc", values)
