"""0/1 Adam: Adam that seldom looks at its variance and seldom exchanges its compressed momentum."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jdml.aggregate.adam_parts import check_adam, check_count, preconditioned, wide, zeros
from jdml.aggregate.one_bit_adam import SIGNS
from jdml.communicate import Wire
from jdml.communicate.branch import choose, first_branch
from jdml.communicate.collectives.all_reduce import Axis, Content, check_exchange
from jdml.communicate.exchange import exchange_mean, init_exchange
from jdml.communicate.frequency import is_due
from jdml.communicate.wire import settle

PyTree = Any

_VARIANCE, _MOMENTUM = "zero_one_adam.variance", "zero_one_adam.momentum"


class ZeroOneAdamState(NamedTuple):
    """State of :func:`zero_one_adam`.

    Attributes:
      steps: int32, steps taken.
      last: int32, steps that had been taken at the last exchange of the momentum.
      next_variance: int32, number of the next step that updates the variance.
      num_variances: int32, how often it was updated.
      mu: First moment, f32, the same on every worker after an exchange; with local steps, per
        worker.
      nu: Second moment, f32, the same on every worker.
      progress: How far the worker went since the last exchange, before division by the root of the
        variance: f32, per worker; ``()`` without local steps.
      rate: f32, sum since then of the learning rates over the momentum's bias corrections.
      decay_rate: f32, sum since then of the learning rates.
      anchor: The model after the last exchange, f32, the same on every worker; ``()`` without local
        steps.
      residual: What the exchange of the momentum keeps: per worker what it still owes.
      metrics: Whether the last step updated the variance, and whether it exchanged the momentum.
    """

    steps: jax.Array
    last: jax.Array
    next_variance: jax.Array
    num_variances: jax.Array
    mu: PyTree
    nu: PyTree
    progress: PyTree
    rate: jax.Array
    decay_rate: jax.Array
    anchor: PyTree
    residual: PyTree
    metrics: dict[str, jax.Array]


def zero_one_adam(
    axis: Axis,
    learning_rate: optax.ScalarOrSchedule,
    freeze_step: int,
    *,
    kappa: int = 16,
    double_every: int = 32678,
    max_interval: int = 16,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    codec: Content = SIGNS,
    topology: str = "two_phase",
) -> optax.GradientTransformationExtraArgs:
    """Adam with two schedules: of exact gradients for the variance, of compressed momenta.

    At step t = 0, 1, … every worker takes ``m <- b1 m + (1 - b1) g_k`` and adds ``r_t m`` to its
    progress ``u``, with ``r_t = lr_t / (1 - b1^(t+1))``. Then:

    - **Variance**, at steps k_0 = 0, ``k_(j+1) = k_j + 2^floor(j / kappa)`` before ``freeze_step``:
      ``v <- b2 v + (1 - b2) (mean_k g_k)^2`` from the exact mean. All other steps keep v.
    - **Momentum**, at each step up to ``freeze_step``, then after every ``H`` steps, where H is 1,
      doubles every ``double_every`` steps and stops at ``max_interval``: with
      R the sum of r since the last exchange and x' the model after it,
      ``m <- mean_k C(u_k / R + e_k)``, ``x <- x' - R m / d``, ``u <- 0``;
      ``d = sqrt(v / (1 - b2^j)) + eps`` after j updates of v.
    - Between those, ``x_k <- x_k - r_t m / d`` on the worker alone.

    With both schedules at every step and no codec this is ``optax.adamw`` of the mean gradient. To
    that end, unlike the paper's algorithm, it updates the variance before the model, corrects the
    bias of both moments, and adds ``eps`` to the root; and it exchanges u / R where the paper
    exchanges u, so that a rate of 0, where schedules begin, loses no momentum. Decay is decoupled
    and taken from x' at an exchange.

    Give it to ``make_step`` alone: it takes the place of ``mean_gradients`` and of the optimiser.

    Args:
      axis: The worker axis. ``update`` runs inside a ``shard_map`` in which it is manual.
      learning_rate: Number or Optax schedule.
      freeze_step: First step whose variance is that of the step before for good, and after which
        local steps may begin; the end of the learning rate's warm-up in the paper.
      kappa: Number of updates of the variance after which their interval doubles.
      double_every: Number of steps after which the interval between exchanges doubles.
      max_interval: Its largest value; 1 for no local steps, which need a model per worker, an
        anchor and the progress.
      b1: Decay rate of the momentum.
      b2: Decay rate of the variance.
      eps: Added to the root of the variance; see :func:`one_bit_adam`.
      weight_decay: Decoupled (AdamW), times the learning rate.
      codec: What carries the momentum: two-sided error feedback around the sign and one scale per
        block by default; ``None`` for the exact mean.
      topology: See :func:`jdml.communicate.all_reduce_mean`.

    State kept: two f32 moments, the same on every worker, and an f32 residual per worker; with
    local steps the workers' own models and first moments, an f32 progress per worker, and an f32
    anchor, shared: 2 more copies of the parameters.

    Bytes: those of ``codec`` in ``topology`` at an exchange of the momentum, and of an exact
    all-reduce at an update of the variance; the metrics say which of the two a step had.

    Raises:
      ValueError: an argument is out of range; ``codec`` or ``topology`` is not one.

    Reference: Lu et al., "Maximizing Communication Efficiency for Large-scale Training via 0/1
    Adam", ICLR 2023, algorithm 1 and its two policies (``double_every=32678`` and
    ``max_interval=16`` as for BERT).
    """
    name = "zero_one_adam"
    check_count(name, "freeze_step", freeze_step, 1, "the first step with a fixed variance")
    check_count(name, "kappa", kappa, 1, "the number of updates until their interval doubles")
    check_count(name, "double_every", double_every, 1, "the number of steps until H doubles")
    check_count(name, "max_interval", max_interval, 1, "the most steps between two exchanges")
    check_adam(name, b1, b2, eps, weight_decay)
    check_exchange(name, axis, codec, topology)
    local = max_interval > 1

    def interval(steps: jax.Array) -> jax.Array:
        doublings = jnp.minimum(jnp.maximum(steps - freeze_step, 0) // double_every, 30)
        return jnp.minimum(jnp.left_shift(1, doublings), max_interval)

    def init(params: PyTree) -> ZeroOneAdamState:
        # A buffer for each: one that appears twice cannot be donated.
        return ZeroOneAdamState(
            steps=jnp.zeros((), jnp.int32),
            last=jnp.zeros((), jnp.int32),
            next_variance=jnp.zeros((), jnp.int32),
            num_variances=jnp.zeros((), jnp.int32),
            mu=zeros(params),
            nu=zeros(params),
            progress=zeros(params) if local else (),
            rate=jnp.zeros((), jnp.float32),
            decay_rate=jnp.zeros((), jnp.float32),
            anchor=wide(jax.tree.map(jnp.copy, params)) if local else (),
            residual=init_exchange(codec, params),
            metrics=first_branch(_VARIANCE) | (first_branch(_MOMENTUM) if local else {}),
        )

    def update(
        updates: PyTree,
        state: ZeroOneAdamState,
        params: PyTree | None = None,
        *,
        wire: Wire | None = None,
        **extra: Any,
    ) -> tuple[PyTree, ZeroOneAdamState]:
        del extra
        if params is None:
            raise ValueError(
                f"{name} needs the parameters: call tx.update(updates, state, params)."
            )
        gradients, model = wide(updates), wide(params)
        steps: jax.Array = optax.safe_increment(state.steps)

        def with_variance() -> PyTree:
            mean, _ = exchange_mean(gradients, (), axis, None, topology, wire)
            return jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, state.nu, mean)

        looks = (state.steps == state.next_variance) & (state.steps < freeze_step)
        nu, metrics = choose(_VARIANCE, looks, (lambda: state.nu, with_variance))
        num_variances = state.num_variances + looks
        pause = jnp.left_shift(1, jnp.minimum(state.num_variances // kappa, 24))
        next_variance = jnp.where(looks, state.steps + pause, state.next_variance)

        step_rate = jnp.asarray(
            learning_rate(state.steps) if callable(learning_rate) else learning_rate, jnp.float32
        )
        corrected_rate = step_rate / (1 - jnp.asarray(b1, jnp.float32) ** steps)
        rate, decay_rate = state.rate + corrected_rate, state.decay_rate + step_rate
        settled = 1 - jnp.asarray(b2, jnp.float32) ** num_variances
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, gradients)
        move = jax.tree.map(lambda m: corrected_rate * m, mu)
        progress = jax.tree.map(jnp.add, state.progress, move) if local else ()

        def decayed(x: PyTree, by: jax.Array, moved: PyTree) -> PyTree:
            return jax.tree.map(lambda x, d: -d - weight_decay * by * x, x, moved)

        def moved(by: PyTree) -> PyTree:
            return jax.tree.map(lambda x, d, p: (x + d).astype(p.dtype), model, by, params)

        def together() -> tuple[PyTree, PyTree, PyTree, PyTree, Any, Any, PyTree, PyTree]:
            mine = mu
            if local:
                known = jnp.where(rate > 0, rate, 1)
                mine = jax.tree.map(lambda u, m: jnp.where(rate > 0, u / known, m), progress, mu)
            mean, residual = exchange_mean(mine, state.residual, axis, codec, topology, wire)
            mean = jax.tree.map(lambda m, v: jnp.where(v == 0, 0, m), mean, nu)
            start = state.anchor if local else model
            move = jax.tree.map(lambda m: rate * m, mean)
            change = decayed(start, decay_rate, preconditioned(move, nu, settled, eps))
            zero = jnp.zeros((), jnp.float32)
            if not local:
                return change, moved(change), mean, (), zero, zero, (), residual
            anchor = jax.tree.map(jnp.add, start, change)
            change = jax.tree.map(jnp.subtract, anchor, model)
            new = jax.tree.map(lambda a, p: a.astype(p.dtype), anchor, params)
            return change, new, mean, zeros(progress), zero, zero, anchor, residual

        def alone() -> tuple[PyTree, PyTree, PyTree, PyTree, Any, Any, PyTree, PyTree]:
            change = decayed(model, step_rate, preconditioned(move, nu, settled, eps))
            return (
                change,
                moved(change),
                mu,
                progress,
                rate,
                decay_rate,
                state.anchor,
                state.residual,
            )

        due = is_due(interval, steps, state.last)
        if local:
            (change, new, *rest), taken = choose(_MOMENTUM, due, (alone, together))
            metrics = metrics | taken
        else:
            change, new, *rest = together()
        settle(wire, change, new)
        last = jnp.where(due, steps, state.last)
        mu, progress, rate, decay_rate, anchor, residual = rest
        return change, ZeroOneAdamState(
            steps=steps,
            last=last,
            next_variance=next_variance,
            num_variances=num_variances,
            mu=mu,
            nu=nu,
            progress=progress,
            rate=rate,
            decay_rate=decay_rate,
            anchor=anchor,
            residual=residual,
            metrics=metrics,
        )

    return optax.GradientTransformationExtraArgs(init, update)
