"""Attention with all scores at once: what the other forms must equal."""

import jax
import jax.numpy as jnp


def plain_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, *, causal: bool = True
) -> jax.Array:
    """``softmax(q kᵀ / sqrt(head_dim)) v``, the softmax in float32.

    Args:
      query: [batch, heads, seq, head_dim].
      key, value: [batch, kv_heads, seq, head_dim]; query head h looks at key head
        ``h // (heads / kv_heads)``.
      causal: a query sees its own position and earlier ones.

    Returns:
      [batch, heads, seq, head_dim] in the dtype of the query.
    """
    batch, heads, seq, head_dim = query.shape
    kv_heads = key.shape[1]
    grouped = query.reshape(batch, kv_heads, heads // kv_heads, seq, head_dim)
    scores = jnp.einsum("bkgtd,bksd->bkgts", grouped, key, preferred_element_type=jnp.float32)
    scores = scores * head_dim**-0.5
    if causal:
        visible = jnp.tril(jnp.ones((seq, key.shape[2]), bool))
        scores = jnp.where(visible, scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(query.dtype)
    return jnp.einsum("bkgts,bksd->bkgtd", weights, value).reshape(query.shape)
