"""Sampling text: one compiled program reads the prompt, then writes token after token."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jdml.models.transformer.decoder import Transformer

PyTree = Any


def generate(
    model: Transformer,
    prompt: jax.Array,
    num_tokens: int,
    key: jax.Array | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
) -> jax.Array:
    """Continues a prompt, keeping keys and values of what was read.

    Args:
      model: the decoder; like its forward pass, call inside ``use_rules`` or ``no_mesh``.
      prompt: int32 [batch, seq] with seq ≥ 1.
      num_tokens: how many to write.
      key: typed key; may be None at temperature 0.
      temperature: logits are divided by it; 0 takes the likeliest token. A new value needs no new
        compilation, except between zero and positive.
      top_k: sample among the ``top_k`` likeliest tokens; None among all.

    Returns:
      int32 [batch, num_tokens], without the prompt.

    Raises:
      ValueError: an empty prompt, one too long for ``config.max_seq_len`` together with
        ``num_tokens``, a negative temperature, or ``top_k`` outside 1 … vocab_size.
    """
    config = model.config
    if prompt.ndim != 2 or prompt.shape[1] < 1 or not jnp.issubdtype(prompt.dtype, jnp.integer):
        raise ValueError(
            f"prompt: expected integers [batch, seq ≥ 1], got {prompt.dtype} {prompt.shape}"
        )
    if num_tokens < 1:
        raise ValueError(f"num_tokens must be at least 1, got {num_tokens}")
    length = prompt.shape[1] + num_tokens
    if length > config.max_seq_len:
        raise ValueError(
            f"prompt ({prompt.shape[1]}) + num_tokens ({num_tokens}) = {length} positions, more "
            f"than config.max_seq_len={config.max_seq_len}; shorten one of them"
        )
    if not temperature >= 0:
        raise ValueError(f"temperature must be at least 0, got {temperature}")
    if top_k is not None and not 1 <= top_k <= config.vocab_size:
        raise ValueError(f"top_k must lie in 1 … {config.vocab_size}, got {top_k}")
    greedy = temperature == 0
    if key is None:
        if not greedy:
            raise ValueError(f"key: sampling at temperature {temperature} needs a key")
        key = jax.random.key(0)
    graphdef, params = nnx.split(model)
    return _generate(
        graphdef, params, prompt, key, jnp.float32(temperature), num_tokens, top_k, greedy
    )


@partial(jax.jit, static_argnames=("graphdef", "num_tokens", "top_k", "greedy"))
def _generate(
    graphdef: nnx.GraphDef,
    params: PyTree,
    prompt: jax.Array,
    key: jax.Array,
    temperature: jax.Array,
    num_tokens: int,
    top_k: int | None,
    greedy: bool,
) -> jax.Array:
    def choose(logits: jax.Array, key: jax.Array) -> jax.Array:
        if greedy:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        if top_k is not None:
            best, ids = jax.lax.top_k(logits, top_k)
            pick = jax.random.categorical(key, best / temperature)
            return jnp.take_along_axis(ids, pick[:, None], axis=1)[:, 0].astype(jnp.int32)
        return jax.random.categorical(key, logits / temperature).astype(jnp.int32)

    model = nnx.merge(graphdef, params)
    keys = jax.random.split(key, num_tokens)
    cache = model.init_cache(prompt.shape[0], prompt.shape[1] + num_tokens)
    logits, cache = model.decode(prompt, cache)

    def write(carry: Any, key: jax.Array) -> tuple[Any, jax.Array]:
        token, cache = carry
        logits, cache = nnx.merge(graphdef, params).decode(token[:, None], cache)
        token = choose(logits, key)
        return (token, cache), token

    first = choose(logits, keys[0])
    _, rest = jax.lax.scan(write, (first, cache), keys[1:])
    return jnp.concatenate([first[:, None], rest.T], axis=1)
