"""A loss scale that finds its own size, for float16, whose gradients would end in zero.

    gradients = d(scale · loss)/d(params) / scale
    any of them not finite, on any worker:  no step; scale / factor
    ``growth_every`` finite steps in a row: scale · factor

float16 ends at 6e-8 below and at 65,504 above; a scale lifts small gradients over the first, and is
taken back when they pass the second. bfloat16 has float32's range and needs none: ``make_step``
refuses a scale where nothing in the loss is float16. With powers of two, scaling rounds nothing.

Reference: Micikevicius et al., "Mixed Precision Training", 2018, section 3.2. Optax's
``apply_if_finite`` asks the gradients that it is given, which differ from worker to worker until
they have been exchanged; the step here knows of all of them before.
"""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jdml.communicate.branch import choose, first_branch
from jdml.communicate.wire import per_worker

PyTree = Any
BRANCH = "finite"


class DynamicLossScaleState(NamedTuple):
    """State of :func:`dynamic_loss_scale`; the same on every worker but for ``inner``.

    Attributes:
      loss_scale: f32 ``[]``, what the step multiplies the next loss by.
      finite_steps: int32 ``[]``, finite steps since the scale last changed.
      skipped_steps: int32 ``[]``, steps not taken so far.
      metrics: ``loss_scale`` and ``skipped_steps``, for the log; ``branch.finite``, 1 where
        the last step was taken.
      inner: State of the chain.
    """

    loss_scale: jax.Array
    finite_steps: jax.Array
    skipped_steps: jax.Array
    metrics: dict[str, jax.Array]
    inner: PyTree


def dynamic_loss_scale(
    tx: optax.GradientTransformation,
    axis: str | tuple[str, ...],
    *,
    initial: float = 2.0**15,
    growth_every: int = 2000,
    factor: float = 2.0,
    least: float = 1.0,
    most: float = 2.0**24,
) -> optax.GradientTransformationExtraArgs:
    """The chain ``tx`` on gradients of a scaled loss; ``make_step`` scales it.

    ``dynamic_loss_scale(optax.chain(mean_gradients("data"), optax.adamw(3e-4)), "data")``: the
    whole chain, for a step that is not taken must leave all of its state as it was: parameters,
    moments, counters, residuals. All workers take a step or none does: each tells the others
    whether its gradients are finite. What the step counts (``state.step``, keys) goes on; model
    state stays.

    Bytes per round: one f32 is summed over the workers; a step not taken sends no more.

    Args:
      tx: An Optax chain.
      axis: The worker axis (or axes), as ``make_step`` has it.
      initial: First scale; a power of two.
      growth_every: Finite steps after which the scale grows.
      factor: By what it grows and shrinks; a power of two over 1.
      least: Not below; a power of two.
      most: Not above; a power of two.

    Raises:
      ValueError: scales or a factor that are no powers of two, or out of order.
    """
    for name, value in (
        ("initial", initial),
        ("factor", factor),
        ("least", least),
        ("most", most),
    ):
        if not (math.isfinite(value) and value > 0 and math.frexp(value)[0] == 0.5):
            raise ValueError(
                f"dynamic_loss_scale: {name}={value!r}; expected a power of two, so that scaling "
                "rounds nothing."
            )
    if factor <= 1:
        raise ValueError(f"dynamic_loss_scale: factor={factor!r}; expected a power of two over 1.")
    if not least <= initial <= most:
        raise ValueError(
            f"dynamic_loss_scale: initial={initial!r} lies outside [least={least!r}, "
            f"most={most!r}]."
        )
    if isinstance(growth_every, bool) or not isinstance(growth_every, int) or growth_every < 1:
        raise ValueError(
            f"dynamic_loss_scale: growth_every={growth_every!r}; expected an int >= 1."
        )
    inner_tx = optax.with_extra_args_support(tx)

    def init(params: PyTree) -> DynamicLossScaleState:
        scale, zero = jnp.float32(initial), jnp.int32(0)
        metrics = {**_metrics(scale, zero), **first_branch(BRANCH)}
        return DynamicLossScaleState(scale, zero, zero, metrics, inner_tx.init(params))

    def update(
        updates: PyTree, state: DynamicLossScaleState, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, DynamicLossScaleState]:
        scale = state.loss_scale
        here = jnp.all(jnp.stack([jnp.all(jnp.isfinite(g)) for g in jax.tree.leaves(updates)]))
        not_finite = per_worker(jnp.where(here, 0.0, 1.0), axis)
        finite = jax.lax.psum(not_finite, axis) == 0
        gradients = jax.tree.map(lambda g: g / scale.astype(g.dtype), updates)

        def taken() -> tuple[PyTree, PyTree]:
            return inner_tx.update(gradients, state.inner, params, **extra)

        def skipped() -> tuple[PyTree, PyTree]:
            shapes = jax.eval_shape(taken)[0]
            # Minus zero is what added leaves every number as it is: zeros of both signs.
            return jax.tree.map(lambda s: jnp.full(s.shape, -0.0, s.dtype), shapes), state.inner

        (updates, inner), branch_metrics = choose(BRANCH, finite, (skipped, taken))
        run = jnp.where(finite, state.finite_steps + 1, 0)
        grows = run >= growth_every
        scale = jnp.where(
            finite,
            jnp.where(grows, jnp.minimum(scale * factor, most), scale),
            jnp.maximum(scale / factor, least),
        )
        skipped_steps = state.skipped_steps + jnp.where(finite, 0, 1)
        metrics = {**_metrics(scale, skipped_steps), **branch_metrics}
        run = jnp.where(grows, 0, run)
        return updates, DynamicLossScaleState(scale, run, skipped_steps, metrics, inner)

    return optax.GradientTransformationExtraArgs(init, update)


def loss_scale_of(opt_state: PyTree) -> DynamicLossScaleState | None:
    """The state of the :func:`dynamic_loss_scale` around a chain, or None without one."""
    found = [
        x
        for x in jax.tree.leaves(opt_state, is_leaf=_is_state)
        if isinstance(x, DynamicLossScaleState)
    ]
    return found[0] if found else None


def check_outermost(opt_state: PyTree) -> None:
    """Raises ``ValueError`` for a scale inside a chain, whose other parts would still step."""
    if loss_scale_of(opt_state) is not None and not _is_state(opt_state):
        raise ValueError(
            "make_step: dynamic_loss_scale inside another transformation, which would change its "
            "state in steps that are not taken. Put it around the whole chain: "
            "dynamic_loss_scale(optax.chain(...), axis)."
        )


def check_float16(equations: Iterable[Any]) -> None:
    """Raises ``ValueError`` if none of a traced loss's equations makes a float16 array."""
    for equation in equations:
        if any(getattr(v.aval, "dtype", None) == jnp.float16 for v in equation.outvars):
            return
    raise ValueError(
        "make_step: dynamic_loss_scale, but nothing in the loss is float16: float32 and bfloat16 "
        "have the range to do without. Leave it out, or compute in float16."
    )


def _metrics(scale: jax.Array, skipped_steps: jax.Array) -> dict[str, jax.Array]:
    skipped = skipped_steps.astype(jnp.float32)
    return {"loss_scale": scale, "skipped_steps": skipped}


def _is_state(x: Any) -> bool:
    return isinstance(x, DynamicLossScaleState)
