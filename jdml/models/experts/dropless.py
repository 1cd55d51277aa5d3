"""Experts that take every token that chooses them, however many those are.

On one device the choices are sorted by expert, and each group of rows goes through its kernels
(``products``): k products for a token, none on padding but for what fills up a block.

With the experts divided over an axis of n devices, a device sends a token to those that hold its
experts. How many rows that is, is data, and shapes are static: a round of exchange has P places for
each pair of devices, twice the even share k · tokens / n (``slack``). Should any pair have more,
the devices exchange another round, and another, until all is sent: the result is exact in any case,
and what an uneven router costs is time. The rounds after the first stand in a branch; their
backward pass computes them again, so that memory is that of one round.

On CPU a round is an all-to-all of all ``n · P`` places. On TPU and GPU it is a ragged all-to-all
into the same places, which sends the rows alone. Forward and backward there are two each, of
``n · P · embed`` values of a device, and a small one of counts.

References: Gale et al., "MegaBlocks", 2022 (dropless, grouped products).
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jdml.models.experts.exchange import exchange
from jdml.models.experts.kernels import Kernels, activation, names_of, present, restored
from jdml.models.experts.layout import TOKENS, Layout, layout_of, weighted
from jdml.models.experts.mapped import one_by_one
from jdml.models.experts.products import block_size, grouped, product
from jdml.models.experts.routing import Routing
from jdml.models.experts.rows import collect, places_of, spread
from jdml.sharding.region import alike, manual, platform, varying_axes

PyTree = Any

SLACK = 2.0


def evaluate_dropless(
    x: jax.Array, routing: Routing, kernels: Kernels, slack: float = SLACK
) -> jax.Array:
    """``evaluate_densely``, to rounding, at the cost of the chosen experts alone.

    Call inside ``use_rules`` or ``no_mesh``; the axis of the name ``experts`` divides the experts.

    Args:
      x: [batch, seq, embed].
      routing: of the same tokens, the k of a token being different experts.
      kernels: of all experts, in the dtype of ``x``.
      slack: places of a round for each pair of devices, over the even share.

    Raises:
      ValueError: experts that their axis does not divide, an axis of experts that does not divide
        the tokens, or a slack that is not positive.
    """
    if not slack > 0:
        raise ValueError(f"slack must be positive, got {slack!r}")
    num_experts, on = kernels.up.shape[0], platform()
    layout = layout_of(num_experts)

    def on_device(
        x: jax.Array, experts: jax.Array, weights: jax.Array, *arrays: jax.Array
    ) -> jax.Array:
        tokens = layout.enter(x).reshape(-1, x.shape[-1])
        choices = experts.reshape(-1, experts.shape[-1])
        weights = weights.reshape(choices.shape)
        held = restored(arrays)
        if layout.axes:
            rows, num = choices.shape
            size, number = rows_of_round(rows, num, num_experts, layout.num_parts, slack)
            rounds = _Rounds(layout, size, number, on)
            mixed = _exchanged(rounds, tokens, choices, weights, held)
        else:
            mixed = weighted(_mlp(tokens, choices, held, on), weights)
        return layout.leave(mixed.astype(x.dtype).reshape(x.shape))

    region = manual(on_device, [TOKENS] * 3 + names_of(kernels), TOKENS)
    return region(x, routing.experts, routing.weights, *present(kernels))


def rows_of_round(
    num_tokens: int, num_choices: int, num_experts: int, num_parts: int, slack: float = SLACK
) -> tuple[int, int]:
    """``(P, rounds)``: places for each pair of devices, and rounds until all is sent at the worst.

    Args:
      num_tokens: of a device.
      num_choices: k.
      num_experts: E.
      num_parts: n, devices among which the experts are divided.
      slack: as in ``evaluate_dropless``.
    """
    most = num_tokens * min(num_choices, num_experts // num_parts)
    share = math.ceil(slack * num_tokens * num_choices / num_parts)
    rows = min(most, -(-share // 8) * 8)
    return rows, -(-most // rows)


def _mlp(x: jax.Array, experts: jax.Array, kernels: Kernels, on: str) -> jax.Array:
    """Rows [rows, embed] through each of their experts [rows, copies] → [rows, copies, embed].

    Zeros where the expert is E or more.
    """
    num_experts = kernels.up.shape[0]
    block = block_size(experts.size, num_experts, on)
    places, sizes = grouped(experts, num_experts, block)
    rows = spread(x, places)

    def into(kernel: jax.Array) -> jax.Array:
        return checkpoint_name(product(rows, kernel, sizes, block), "experts.product")

    up = into(kernels.up)
    gate = None if kernels.gate is None else into(kernels.gate)
    return collect(product(activation(gate, up), kernels.down, sizes, block), places)


@dataclasses.dataclass(frozen=True)
class _Rounds:
    """What is known of the exchange before it is traced."""

    layout: Layout
    size: int
    number: int
    on: str


class _Plan(NamedTuple):
    """Where a device's choices go, all int32.

    ``part`` [tokens, k]: the device; ``number`` [tokens, k]: among the choices that go there,
    sorted by expert; ``begins``, ``ends`` [parts, own]: the numbers of those for each expert.
    """

    part: jax.Array
    number: jax.Array
    begins: jax.Array
    ends: jax.Array


def _exchanged(
    rounds: _Rounds, tokens: jax.Array, choices: jax.Array, weights: jax.Array, kernels: Kernels
) -> jax.Array:
    plan = _plan_of(choices, rounds.layout)
    # All of one type: what is summed over other axes is summed once, and not in every round.
    operands = _alike((tokens, weights, present(kernels)))
    first = _one_round(rounds, 0, plan, *operands)
    return first if rounds.number == 1 else first + _later_rounds(rounds, plan, *operands)


def _alike(trees: PyTree) -> PyTree:
    leaves, treedef = jax.tree.flatten(trees)
    return jax.tree.unflatten(treedef, alike(*leaves))


def _plan_of(choices: jax.Array, layout: Layout) -> _Plan:
    own = layout.num_experts // layout.num_parts
    flat = choices.ravel()
    chosen = flat[:, None] == jnp.arange(layout.num_experts)
    counts = jnp.sum(chosen, axis=0, dtype=jnp.int32).reshape(layout.num_parts, own)
    order = jnp.argsort(flat, stable=True)
    in_order = jnp.arange(flat.size, dtype=jnp.int32)
    rank = jnp.zeros_like(flat).at[order].set(in_order, unique_indices=True)
    of_part = jnp.sum(counts, axis=1)
    part = flat // own
    number = rank - (jnp.cumsum(of_part) - of_part)[part]
    ends = jnp.cumsum(counts, axis=1)
    return _Plan(part.reshape(choices.shape), number.reshape(choices.shape), ends - counts, ends)


def _one_round(
    rounds: _Rounds,
    turn: jax.Array | int,
    plan: _Plan,
    tokens: jax.Array,
    weights: jax.Array,
    arrays: tuple[jax.Array, ...],
) -> jax.Array:
    """float32 [tokens, embed]: what the choices with numbers from ``turn · size`` on add."""
    size, (axes, parts) = rounds.size, (rounds.layout.axes, rounds.layout.num_parts)
    first = turn * size
    place = plan.number - first
    target = jnp.where((place >= 0) & (place < size), plan.part * size + place, parts * size)
    places = places_of(target, parts * size)
    # How many of these rows are for each expert: what the others must know to sort them.
    sent = jnp.clip(plan.ends - first, 0, size) - jnp.clip(plan.begins - first, 0, size)
    received = jax.lax.all_to_all(sent, axes, 0, 0, tiled=True)
    sizes = jnp.sum(sent, axis=1), jnp.sum(received, axis=1)
    rows = exchange(spread(tokens, places), *sizes, axes, rounds.on)
    rows = checkpoint_name(rows, "experts.exchanged")
    passed = jnp.arange(size)[None, :, None] >= jnp.cumsum(received, axis=1)[:, None, :]
    experts = jnp.sum(passed, axis=2, dtype=jnp.int32)  # past the last where no row stands
    done = _mlp(rows, experts.reshape(-1, 1), restored(arrays), rounds.on)
    done = exchange(done.reshape(rows.shape), *sizes[::-1], axes, rounds.on)
    done = checkpoint_name(done, "experts.exchanged")
    return weighted(collect(done, places), weights)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _later_rounds(rounds: _Rounds, plan: _Plan, *operands: Any) -> jax.Array:
    """The sum over all rounds but the first, of which most batches need none."""

    def run(plan: _Plan, *operands: Any) -> jax.Array:
        operands = _alike(operands)

        def add(turn: jax.Array, mixed: jax.Array) -> jax.Array:
            return mixed + _one_round(rounds, turn, plan, *operands)

        zeros = alike(jnp.zeros(operands[0].shape, jnp.float32), operands[0])[0]
        return _while_needed(rounds, plan, add, zeros)

    return one_by_one(run)(plan, *operands)


def _later_rounds_forward(rounds: _Rounds, plan: _Plan, *operands: Any) -> tuple[jax.Array, Any]:
    return _later_rounds(rounds, plan, *operands), (plan, operands)


def _later_rounds_backward(rounds: _Rounds, kept: Any, gradient: jax.Array) -> Any:
    def run(gradient: jax.Array, plan: _Plan, *operands: Any) -> Any:
        gradient, *operands = _alike((gradient, *operands))

        def add(turn: jax.Array, so_far: Any) -> Any:
            part = functools.partial(_one_round, rounds, turn, plan)
            gradients = list(jax.vjp(part, *operands)[1](gradient))
            return jax.tree.map(lambda a, b: a + b.astype(a.dtype), so_far, gradients)

        zeros = jax.tree.map(lambda x: alike(jnp.zeros(x.shape, jnp.float32), x)[0], operands)
        total = _while_needed(rounds, plan, add, zeros)
        return tuple(jax.tree.map(lambda total, x: total.astype(x.dtype), total, operands))

    plan, operands = kept
    return (None, *one_by_one(run)(gradient, plan, *operands))


_later_rounds.defvjp(_later_rounds_forward, _later_rounds_backward)


def _while_needed(rounds: _Rounds, plan: _Plan, add: Any, start: Any) -> Any:
    """``add(turn, …)`` for the rounds from 1 on that any device needs.

    Any at all, though only those that exchange rows must agree: programs of a mesh then take the
    same branch everywhere.
    """
    most = jnp.max(plan.ends)
    most = jax.lax.pmax(most, tuple(sorted(varying_axes(most))))

    def maybe(carry: Any, turn: jax.Array) -> tuple[Any, None]:
        with jax.named_scope("branch.experts_overflow"):
            return jax.lax.cond(most > turn * rounds.size, add, lambda _, x: x, turn, carry), None

    return jax.lax.scan(maybe, start, jnp.arange(1, rounds.number))[0]
