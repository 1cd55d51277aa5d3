"""Cross-entropy of the next token, in nats, without float32 logits of the whole batch.

With a large vocabulary the logits are by far the largest array of a training step: 32 × 2,048
tokens over 128,000 words are 34 GB in float32. Here a loop takes ``chunk_size`` positions at a
time, and the backward pass computes their logits again (one more product with the head: a third
of its cost). Chunk ``j`` of ``n`` holds positions ``j, j + n, j + 2n, …``: taking it leaves every
device with positions that it has, where an axis divides the sequence.

Of a head that FSDP divides the loop takes a piece at a time, no larger than a decoder layer:
``jdml.models.head``.
"""

from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from jdml.models.head import division_of, losses_under
from jdml.models.lookup import SMALL_VOCABULARY

_CHUNK_SIZE = 128


class LanguageModel(Protocol):
    """What the loss asks of a model.

    Of one that has ``stored_head()`` too, ``(kernel, limit)``, the loss puts a divided head
    together in pieces of about ``limit`` elements: float32 [embed, vocab], laid out as the
    parameter is, whose logits are its plain product.
    """

    def hidden(self, tokens: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        """[batch, seq] → [batch, seq, embed]."""

    def head_kernel(self) -> jax.Array:
        """[embed, vocab]."""

    def logits(self, hidden: jax.Array, kernel: jax.Array) -> jax.Array:
        """[batch, seq, embed], [embed, vocab] → float32 [batch, seq, vocab]."""


def next_token_loss(
    model: Any,
    inputs: jax.Array,
    targets: jax.Array,
    mask: jax.Array | None = None,
    *,
    key: jax.Array | None = None,
    chunk_size: int | None = None,
) -> jax.Array:
    """Mean of ``-log p(target | inputs so far)`` over the positions that the mask keeps.

    Args:
      model: a ``LanguageModel``, such as ``Transformer``.
      inputs: int32 [batch, seq].
      targets: int32 [batch, seq], the token that follows each position.
      mask: [batch, seq], weight of each position, 0 for padding; None counts all alike.
      key: typed key for dropout; None switches it off.
      chunk_size: positions per pass over the head; None takes all at once for a vocabulary of
        4,096 or less, and 128 otherwise.

    Returns:
      float32 scalar, nats per token; 0 if the mask keeps nothing. NaN where a target that counts
      lies outside the vocabulary.

    Raises:
      ValueError: shapes that differ, or a chunk size below 1.
    """
    hidden = model.hidden(inputs, key=key)
    return loss_of_hidden(model, hidden, targets, mask, chunk_size=chunk_size)


def loss_of_hidden(
    model: Any,
    hidden: jax.Array,
    targets: jax.Array,
    mask: jax.Array | None = None,
    *,
    chunk_size: int | None = None,
) -> jax.Array:
    """``next_token_loss``, given what the head multiplies.

    Args:
      model: a ``LanguageModel``, whose head is used.
      hidden: [batch, seq, embed], from ``model.hidden``.
      targets, mask, chunk_size: as ``next_token_loss`` takes them.
    """
    positions = hidden.shape[:2]
    for name, array in (("targets", targets), ("mask", mask)):
        if array is not None and array.shape != positions:
            raise ValueError(f"{name}: expected the shape of inputs {positions}, got {array.shape}")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    weights = jnp.ones(positions, jnp.float32) if mask is None else mask.astype(jnp.float32)
    count = weights.size if mask is None else jnp.maximum(jnp.sum(weights), 1e-8)
    if hasattr(model, "stored_head"):
        stored, limit = model.stored_head()
        size = _chunk_size(chunk_size, positions[1], stored.shape[1])
        if size < positions[1]:
            division = division_of(stored, hidden, limit, size)
            if division is not None:
                losses = losses_under(stored, hidden, targets, division)
                return jnp.sum(jnp.where(weights > 0, losses * weights, 0.0)) / count
    kernel = model.head_kernel()
    chunk_size = _chunk_size(chunk_size, positions[1], kernel.shape[1])

    def total(kernel: jax.Array, hidden: jax.Array, targets: jax.Array, weights: jax.Array) -> Any:
        loss = token_losses(model.logits(hidden, kernel), targets)
        return jnp.sum(jnp.where(weights > 0, loss * weights, 0.0))

    seq = positions[1]
    if chunk_size >= seq:
        sum_losses = total(kernel, hidden, targets, weights)
    else:
        chunks = tuple(_chunks(x, -(-seq // chunk_size)) for x in (hidden, targets, weights))
        # The loop adds up the kernel's gradient in the dtype of what enters it: not bfloat16.
        wide = kernel.astype(jnp.float32)

        @partial(jax.checkpoint, prevent_cse=False)  # a loop keeps the two passes apart
        def add(carry: jax.Array, chunk: Any) -> tuple[jax.Array, None]:
            return carry + total(wide.astype(kernel.dtype), *chunk), None

        sum_losses, _ = jax.lax.scan(add, jnp.zeros((), jnp.float32), chunks)
    return sum_losses / count


def _chunk_size(asked: int | None, seq: int, vocab: int) -> int:
    if asked is not None:
        return asked
    return seq if vocab <= SMALL_VOCABULARY else _CHUNK_SIZE


@jax.custom_jvp
def token_losses(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """``logsumexp(logits) - logits[target]``, in float32.

    The target's logit is selected by a comparison, not by a gather: the sum over the vocabulary
    stays on each device's part of it.

    Args:
      logits: float32 [..., vocab].
      targets: integers [...]; NaN results where one lies outside the vocabulary.
    """
    return _losses(logits, targets)[0]


@token_losses.defjvp
def _token_losses_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    # By the chain rule JAX would keep the exponentials, the selection and both their gradients;
    # softmax(logits) - onehot(target) in one pass needs less than half of that.
    logits, targets = primals
    losses, log_sum, is_target = _losses(logits, targets)
    slope = jnp.exp(logits - log_sum[..., None]) - is_target.astype(logits.dtype)
    return losses, jnp.sum(slope * tangents[0], axis=-1)


def _losses(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    vocab = logits.shape[-1]
    is_target = jnp.arange(vocab) == targets[..., None]
    log_sum = jax.nn.logsumexp(logits, axis=-1)
    losses = log_sum - jnp.where(is_target, logits, 0.0).sum(axis=-1)
    return jnp.where((targets >= 0) & (targets < vocab), losses, jnp.nan), log_sum, is_target


def _chunks(x: jax.Array, num_chunks: int) -> jax.Array:
    """[batch, seq, ...] → [num_chunks, batch, positions, ...], zeros after the end of the seq."""
    batch, seq = x.shape[:2]
    pad = -seq % num_chunks
    if pad:
        x = jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(batch, -1, num_chunks, *x.shape[2:]), 2, 0)
