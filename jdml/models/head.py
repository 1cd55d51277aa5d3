"""The loss under a head that FSDP divides, put together a piece of the vocabulary at a time.

A head of 128,000 words is two or three decoder layers. Where its ``embed`` dim is divided over axes
of the batch, here one loop takes as many words at a time as a layer has parameters: it gathers
that piece, passes all positions through it, chunk by chunk, and, backward, hands the piece's
gradient back to where it is stored. So no chip ever holds the head or its gradient whole, and
nothing larger than a layer is exchanged.

    log Z = log Σ_pieces exp(log Z_piece)      loss = log Z − logit[target]

Products with the head: one forward and three backward, of which one computes the logits again, as
in a loop over positions alone. A chip sends, of a head of V words and width E in a compute dtype of
w bytes: over the n devices of FSDP's axes ``2 (n − 1)/n · w V E / m`` for the pieces, forward and
backward, and ``(n − 1)/n · 4 V E / m`` for the gradient (f32), m devices dividing the vocabulary;
over these, three numbers a position forward, and backward what an all-reduce of ``[batch, seq,
embed]`` in f32 takes.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jdml.models.experts.mapped import one_by_one
from jdml.sharding import Without
from jdml.sharding.constrain import current_context, manual_axes
from jdml.sharding.region import Stored, alike, axes_of_name, axes_of_stored, manual
from jdml.sharding.torus import sum_scattered

POSITIONS = ("batch", Without("seq", "vocab"))
HIDDEN = (*POSITIONS, "embed")
KERNEL = Stored(("embed", "vocab"))


@dataclass(frozen=True)
class Division:
    """How a head is divided, and what is made of it at a time.

    Attributes:
      mesh: Of the devices.
      rows: Axes that divide positions.
      embed: Those of them that divide the kernel's rows, as it is stored.
      vocab: Axes that divide its columns.
      num_pieces: Of each device's columns.
      num_chunks: Of each device's positions.
    """

    mesh: Mesh
    rows: tuple[str, ...]
    embed: tuple[str, ...]
    vocab: tuple[str, ...]
    num_pieces: int
    num_chunks: int


def division_of(
    kernel: jax.Array, hidden: jax.Array, limit: int, chunk_size: int
) -> Division | None:
    """How the rules in force divide a head; None where they leave it whole, or divide it otherwise.

    Args:
      kernel: [embed, vocab], as it is stored.
      hidden: [batch, seq, embed].
      limit: elements of a piece, over all devices.
      chunk_size: positions to be taken at a time, of those of all devices.
    """
    mesh = current_context("division_of")[0]
    if mesh is None:
        return None
    embed, vocab = axes_of_stored("embed"), axes_of_name("vocab")
    batch, seq = axes_of_name("batch"), axes_of_name(Without("seq", "vocab"))
    usual = (
        embed
        and set(embed) <= {*batch, *seq}
        and vocab == axes_of_stored("vocab")
        and not axes_of_name("embed")
        and not manual_axes().intersection((*batch, *seq, *vocab))
    )
    sizes = (
        (batch, hidden.shape[0]),
        (seq, hidden.shape[1]),
        (embed, kernel.shape[0]),
        (vocab, kernel.shape[1]),
    )
    if not usual or any(size % _product(mesh, axes) for axes, size in sizes):
        return None
    return Division(
        mesh,
        rows=(*batch, *seq),
        embed=embed,
        vocab=vocab,
        num_pieces=-(-kernel.size // limit),
        num_chunks=-(-hidden.shape[1] // chunk_size),
    )


def losses_under(
    kernel: jax.Array, hidden: jax.Array, targets: jax.Array, division: Division
) -> jax.Array:
    """``token_losses(hidden @ kernel, targets)``: float32 [batch, seq].

    Call inside ``use_rules``. Differentiable, once, in ``kernel`` and ``hidden``.

    Args:
      kernel: float32 [embed, vocab], as it is stored.
      hidden: [batch, seq, embed] in the compute dtype.
      targets: int32 [batch, seq]; NaN where one lies outside the vocabulary.
      division: from :func:`division_of`, of the same rules.
    """
    words = _Words(division, kernel.shape[1] // _product(division.mesh, division.vocab))
    # Made here: the backward pass may be traced outside of the rules.
    forward = manual(
        one_by_one(functools.partial(_forward, words)),
        [KERNEL, HIDDEN, POSITIONS],
        [POSITIONS, POSITIONS],
    )
    backward = manual(
        one_by_one(functools.partial(_backward, words)),
        [KERNEL, HIDDEN, POSITIONS, POSITIONS, POSITIONS],
        [KERNEL, HIDDEN],
    )

    @jax.custom_vjp
    def losses(kernel: jax.Array, hidden: jax.Array, targets: jax.Array) -> jax.Array:
        return forward(kernel, hidden, targets)[0]

    def keep(kernel: jax.Array, hidden: jax.Array, targets: jax.Array) -> Any:
        found, log_sum = forward(kernel, hidden, targets)
        return found, (kernel, hidden, targets, log_sum)

    def gradients(kept: Any, slopes: jax.Array) -> Any:
        return *backward(*kept, slopes), None

    losses.defvjp(keep, gradients)
    return losses(kernel, hidden, targets)


@dataclass(frozen=True)
class _Words:
    """A device's columns in equal pieces, the last one filled up."""

    division: Division
    num_own: int

    @property
    def size(self) -> int:
        return -(-self.num_own // self.division.num_pieces)

    def cut(self, kernel: jax.Array) -> jax.Array:
        """[rows, own columns] → [pieces, rows, columns]."""
        fill = self.division.num_pieces * self.size - self.num_own
        kernel = jnp.pad(kernel, ((0, 0), (0, fill))) if fill else kernel
        return jnp.moveaxis(kernel.reshape(len(kernel), -1, self.size), 1, 0)

    def join(self, pieces: jax.Array) -> jax.Array:
        """The inverse of ``cut``."""
        return jnp.moveaxis(pieces, 0, 1).reshape(pieces.shape[1], -1)[:, : self.num_own]

    def first(self) -> jax.Array | int:
        """This device's first word."""
        axes = self.division.vocab
        return jax.lax.axis_index(axes) * self.num_own if axes else 0

    def logits(
        self, hidden: jax.Array, piece: jax.Array, number: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """f32 logits of piece ``number``, and which of a device's words they are of."""
        found = jnp.matmul(hidden, piece, preferred_element_type=jnp.float32)
        column = number * self.size + jnp.arange(self.size)
        if self.division.num_pieces * self.size > self.num_own:
            found = jnp.where(column < self.num_own, found, -jnp.inf)
        return found, column


def _forward(
    words: _Words, kernel: jax.Array, hidden: jax.Array, targets: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Losses and ``log Z`` of a device's positions."""
    division = words.division
    pieces = words.cut(kernel.astype(hidden.dtype))
    chunks = _chunks(hidden, division), _chunks(targets - words.first(), division)

    def piece(carry: Any, x: Any) -> tuple[Any, None]:
        whole, number = _gather(x[0], division), x[1]

        def chunk(_: None, y: Any) -> tuple[None, Any]:
            hidden, target = y
            logits, column = words.logits(hidden, whole, number)
            of_target = jnp.where(column == target[:, None], logits, 0.0).sum(axis=-1)
            return None, (jax.nn.logsumexp(logits, axis=-1), of_target)

        _, (log_sum, of_target) = jax.lax.scan(chunk, None, chunks)
        return (jnp.logaddexp(carry[0], log_sum), carry[1] + of_target), None

    zeros = jnp.zeros(chunks[1].shape, jnp.float32)
    log_sum, of_target = alike(jnp.full_like(zeros, -jnp.inf), zeros, pieces, hidden, targets)[:2]
    (log_sum, of_target), _ = jax.lax.scan(
        piece, (log_sum, of_target), (pieces, jnp.arange(len(pieces)))
    )
    if division.vocab:
        largest = jax.lax.pmax(log_sum, division.vocab)
        sums = jnp.stack([jnp.exp(log_sum - largest), of_target])
        others, of_target = jax.lax.psum(sums, division.vocab)
        log_sum = largest + jnp.log(others)
    log_sum, of_target = (_unchunk(x, targets.shape) for x in (log_sum, of_target))
    num_words = words.num_own * _product(division.mesh, division.vocab)
    inside = (targets >= 0) & (targets < num_words)
    return jnp.where(inside, log_sum - of_target, jnp.nan), log_sum


def _backward(
    words: _Words,
    kernel: jax.Array,
    hidden: jax.Array,
    targets: jax.Array,
    log_sum: jax.Array,
    slopes: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Gradients of kernel (f32) and hidden, given those of the losses."""
    division = words.division
    pieces = words.cut(kernel.astype(hidden.dtype))
    chunks = tuple(_chunks(x, division) for x in (hidden, targets - words.first(), log_sum, slopes))
    others = tuple(axis for axis in division.rows if axis not in division.embed)

    def piece(of_hidden: jax.Array, x: Any) -> tuple[jax.Array, jax.Array]:
        whole, number = _gather(x[0], division), x[1]

        def chunk(carry: Any, y: Any) -> tuple[Any, None]:
            of_whole, of_hidden = carry
            place, (hidden, target, log_sum, slope) = y
            logits, column = words.logits(hidden, whole, number)
            is_target = (column == target[:, None]).astype(jnp.float32)
            of_logits = (jnp.exp(logits - log_sum[:, None]) - is_target) * slope[:, None]
            of_logits = of_logits.astype(hidden.dtype)
            product = functools.partial(jnp.matmul, preferred_element_type=jnp.float32)
            of_whole = of_whole + product(hidden.T, of_logits)
            return (of_whole, of_hidden.at[place].add(product(of_logits, whole.T))), None

        of_whole, of_hidden, *_ = alike(
            jnp.zeros(whole.shape, jnp.float32), of_hidden, whole, *chunks
        )
        turns = (jnp.arange(division.num_chunks), chunks)
        (of_whole, of_hidden), _ = jax.lax.scan(chunk, (of_whole, of_hidden), turns)
        of_piece = sum_scattered(of_whole, division.embed, division.mesh)
        return of_hidden, jax.lax.psum(of_piece, others) if others else of_piece

    of_hidden, *_ = alike(jnp.zeros(chunks[0].shape, jnp.float32), pieces, *chunks)
    of_hidden, of_pieces = jax.lax.scan(piece, of_hidden, (pieces, jnp.arange(len(pieces))))
    summed: Callable[[jax.Array], jax.Array] = lambda x: (  # noqa: E731
        jax.lax.psum(x, division.vocab) if division.vocab else x
    ).astype(hidden.dtype)
    of_hidden = jax.lax.map(summed, of_hidden)
    return words.join(of_pieces).astype(kernel.dtype), _unchunk(of_hidden, hidden.shape)


def _gather(piece: jax.Array, division: Division) -> jax.Array:
    return jax.lax.all_gather(piece, division.embed, tiled=True)


def _product(mesh: Mesh, axes: tuple[str, ...]) -> int:
    return math.prod(mesh.shape[axis] for axis in axes)


def _chunks(x: jax.Array, division: Division) -> jax.Array:
    """A device's [batch, seq, ...] → [num_chunks, positions, ...], zeros after the last."""
    flat = x.reshape(-1, *x.shape[2:])
    fill = -len(flat) % division.num_chunks
    if fill:
        flat = jnp.concatenate([flat, jnp.zeros((fill, *flat.shape[1:]), flat.dtype)])
    return flat.reshape(division.num_chunks, -1, *flat.shape[1:])


def _unchunk(chunks: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    flat = chunks.reshape(-1, *chunks.shape[2:])
    return flat[: math.prod(shape[:2])].reshape(shape)
