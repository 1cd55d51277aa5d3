"""The decoder: embedding, stacked blocks, norm, head.

    tokens [batch, seq] → embed (+ positions) [batch, seq, embed]
    num_layers × Block: x + attention(norm(x)); x + mlp(norm(x))
    norm → head [embed, vocab] → logits [batch, seq, vocab]

The blocks' parameters are stacked under a leading dim named ``layers``: one traced block serves
them all, compilation does not grow with depth, and a step handles a dozen leaves instead of
hundreds. The model holds no random state: dropout takes a key with the call, so that a loss stays
a pure function of parameters, batch and key.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from jdml.models.attention import attention_axis_size, positions, zigzag
from jdml.models.experts import Balance
from jdml.models.transformer.attention import Attention, LayerCache, Rotary, rotary
from jdml.models.transformer.config import TransformerConfig
from jdml.models.transformer.experts import Experts
from jdml.models.transformer.layers import Dense, Embed, LearnedPositions, dropout, make_norm
from jdml.models.transformer.mlp import make_mlp
from jdml.models.transformer.remat import BLOCK_INPUT, remat
from jdml.sharding import Without, constrain


class Cache(NamedTuple):
    """Keys and values of every layer, and how many positions they hold.

    ``layers``: arrays [num_layers, batch, kv_heads, capacity, head_dim]; ``length``: int32 scalar.
    """

    layers: LayerCache
    length: jax.Array


class Block(nnx.Module):
    """``x + attention(norm(x))``, then ``x + mlp(norm(x))``."""

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
        self.rate = config.dropout
        self.attention_norm = make_norm(config)
        self.attention = Attention(config, rngs)
        self.mlp_norm = make_norm(config)
        self.mlp = make_mlp(config, rngs) if config.num_experts is None else Experts(config, rngs)

    def __call__(
        self,
        x: jax.Array,
        table: Rotary | None,
        key: jax.Array | None = None,
        cache: LayerCache | None = None,
        start: jax.Array | int = 0,
    ) -> tuple[jax.Array, LayerCache | None]:
        """``x`` [batch, seq, embed] → the same, and the cache with these positions written.

        A mixture's losses are left out; ``run`` returns them.
        """
        return self.run(x, table, key, cache, start)[:2]

    def run(
        self,
        x: jax.Array,
        table: Rotary | None,
        key: jax.Array | None = None,
        cache: LayerCache | None = None,
        start: jax.Array | int = 0,
    ) -> tuple[jax.Array, LayerCache | None, Balance | None]:
        """What a call returns, and how evenly a mixture of experts is used (None without one)."""
        keys = (None, None) if key is None else jax.random.split(key)
        x = checkpoint_name(x, BLOCK_INPUT)
        mixed, cache = self.attention(self.attention_norm(x), table, cache, start)
        x = constrain(x + dropout(mixed, self.rate, keys[0]), "batch", "seq", "embed")
        balance = None
        if isinstance(self.mlp, Experts):
            mixed, balance = self.mlp(self.mlp_norm(x))
        else:
            mixed = self.mlp(self.mlp_norm(x))
        x = x + dropout(mixed, self.rate, keys[1])
        return constrain(x, "batch", "seq", "embed"), cache, balance


class Transformer(nnx.Module):
    """A decoder-only language model.

    ``constrain`` needs to know the mesh: call the model inside ``jdml.sharding.use_rules``, or
    inside ``no_mesh`` on one device.

    Args:
      config: the shape.
      rngs: stream ``params``. Kernels are cut normals with deviation ``1 / sqrt(fan in)``, those
        that write to the residual stream smaller by ``sqrt(2 * num_layers)``; the embedding's
        deviation is 0.3, or ``1 / sqrt(embed_dim)`` where it is the head too; that of learned
        positions half as much. Biases start at 0.
    """

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        self.config = config
        # Much less than what a block adds (0.02, say) and tokens are lost in the first block's
        # output: 2.4 instead of 2.0 nats per byte after 100 steps of a small model. A tied table
        # is also the head, whose logits should start at about unit size.
        std = 1 / math.sqrt(config.embed_dim) if config.tie_embeddings else 0.3
        self.embed = Embed(config.vocab_size, config.embed_dim, rngs.params(), std=std)
        make = nnx.vmap(
            lambda rngs: Block(config, rngs),
            transform_metadata={nnx.PARTITION_NAME: "layers"},
        )
        self.layers = make(rngs.split(config.num_layers))
        self.norm = make_norm(config)
        self.head = nnx.data(
            None
            if config.tie_embeddings
            else Dense((config.embed_dim,), (config.vocab_size,), ("embed", "vocab"), rngs.params())
        )
        self.positions = nnx.data(
            LearnedPositions(config.max_seq_len, config.embed_dim, rngs.params(), std=std / 2)
            if config.positions == "learned"
            else None
        )

    def __call__(self, tokens: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        """Logits of the next token at every position.

        Args:
          tokens: int32 [batch, seq].
          key: typed key for dropout; None switches it off.

        Returns:
          float32 [batch, seq, vocab].
        """
        return self.logits(self.hidden(tokens, key=key), self.head_kernel())

    def hidden(self, tokens: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        """What the head multiplies: [batch, seq, embed] in the compute dtype.

        Raises:
          ValueError: tokens that are not integers [batch, seq], or too long a sequence.
        """
        return self.hidden_and_balance(tokens, key=key)[0]

    def hidden_and_balance(
        self, tokens: jax.Array, *, key: jax.Array | None = None
    ) -> tuple[jax.Array, Balance | None]:
        """``hidden``, and the mean over layers of how evenly the experts are used, if any."""
        self._check(tokens, self.config.max_seq_len, "config.max_seq_len")
        x, _, balance = self._run(tokens, key)
        return x, balance

    def decode(self, tokens: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """Logits of the token after the last one, given those in the cache.

        Args:
          tokens: int32 [batch, seq], the positions that follow ``cache.length``.
          cache: from ``init_cache`` or an earlier call; must have room for ``seq`` more.

        Returns:
          float32 [batch, vocab], NaN once the cache has overflowed, and the cache with these
          positions written.
        """
        capacity = cache.layers.keys.shape[3]
        self._check(tokens, capacity, "the cache's capacity")
        x, cache, _ = self._run(tokens, None, cache)
        last = self.logits(x[:, -1:], self.head_kernel())[:, 0]
        return jnp.where(cache.length <= capacity, last, jnp.nan), cache

    def init_cache(self, batch: int, capacity: int) -> Cache:
        """An empty cache for ``capacity`` positions.

        Raises:
          ValueError: the decoder is not causal: what it read would have to be read again.
        """
        c = self.config
        if not c.causal:
            raise ValueError("init_cache: expected config.causal=True, got False")
        shape = (c.num_layers, batch, c.num_kv_heads, capacity, c.head_dim)
        # One array each: a buffer that appears twice could not be donated.
        empty = LayerCache(jnp.zeros(shape, c.compute_dtype), jnp.zeros(shape, c.compute_dtype))
        return Cache(empty, jnp.zeros((), jnp.int32))

    def logits(self, hidden: jax.Array, kernel: jax.Array) -> jax.Array:
        """``hidden @ kernel``, accumulated and returned in float32.

        Args:
          hidden: [batch, seq, embed], from ``hidden``.
          kernel: [embed, vocab], from ``head_kernel``; an argument, so that a loop over parts of
            the sequence makes it once.
        """
        flat = hidden.reshape(-1, hidden.shape[-1]) if self.config.flatten_tokens else hidden
        product = jnp.matmul(flat, kernel, preferred_element_type=jnp.float32)
        product = product.reshape(*hidden.shape[:-1], kernel.shape[-1])
        return constrain(product, "batch", P.UNCONSTRAINED, "vocab")

    def head_kernel(self) -> jax.Array:
        """[embed, vocab] in the compute dtype: the head's kernel or the embedding transposed."""
        kernel = self.embed.embedding[...].T if self.head is None else self.head.kernel[...]
        # Laid out as activations are: a loop over chunks would gather a divided kernel every time.
        return constrain(kernel.astype(self.config.compute_dtype), "embed", "vocab")

    def stored_head(self) -> tuple[jax.Array, int]:
        """The head's kernel as it is stored, float32 [embed, vocab]; and a layer's parameters."""
        kernel = self.embed.embedding[...].T if self.head is None else self.head.kernel[...]
        return kernel, self.config.num_layer_params

    def rotary_table(self, seq: int, start: jax.Array | int = 0) -> Rotary | None:
        """Angles of the positions from ``start`` on, for the blocks; None without rotary ones."""
        if self.config.positions != "rotary":
            return None
        places = start + positions(seq, self._zigzag_size(start), "zigzag")
        return rotary(places, self.config.head_dim, self.config.rope_base)

    def enter(
        self, tokens: jax.Array, key: jax.Array | None = None, start: jax.Array | int = 0
    ) -> jax.Array:
        """What the first block is given: [batch, seq, embed] in the compute dtype.

        Args:
          tokens: int32 [batch, seq].
          key: typed key for dropout; None switches it off.
          start: position of ``tokens[:, 0]``.
        """
        c = self.config
        # The sum over the axis of the vocabulary comes first: where that axis divides the positions
        # too, the partitioner would put the whole table together instead.
        x = constrain(
            self.embed(tokens, c.compute_dtype), "batch", Without("seq", "vocab"), "embed"
        )
        if self.positions is not None:
            vectors = self.positions(start, tokens.shape[1], c.compute_dtype)
            x = x + zigzag(vectors, self._zigzag_size(start), dim=0)
        return constrain(dropout(x, c.dropout, key), "batch", "seq", "embed")

    def _run(
        self, tokens: jax.Array, key: jax.Array | None, cache: Cache | None = None
    ) -> tuple[jax.Array, Any, Balance | None]:
        c = self.config
        start: jax.Array | int = 0 if cache is None else cache.length
        seq = tokens.shape[1]
        table = self.rotary_table(seq, start)
        keys: jax.Array | None = None
        embed_key: jax.Array | None = None
        if key is not None and c.dropout > 0:
            key, embed_key = jax.random.split(key)
            keys = jax.random.split(key, c.num_layers)
        x = self.enter(tokens, embed_key, start)

        graphdef, state = nnx.split(self.layers)

        def body(x: jax.Array, xs: Any) -> tuple[jax.Array, Any]:
            state, key, cache = xs
            x, cache, balance = nnx.merge(graphdef, state).run(x, table, key, cache, start)
            return x, (cache, balance)

        xs = (nnx.to_pure_dict(state), keys, None if cache is None else cache.layers)
        body = remat(body, c)
        x, (layers, balance) = jax.lax.scan(body, x, xs, unroll=c.num_layers if c.unroll else 1)
        if cache is not None:
            cache = Cache(layers, cache.length + seq)
        return self.norm(x), cache, jax.tree.map(jnp.mean, balance)

    def _zigzag_size(self, start: jax.Array | int) -> int:
        """Over how many devices the tokens are in zig-zag order; a cache (``start``) is in none."""
        in_order = self.config.seq_order == "contiguous" or not isinstance(start, int)
        return 1 if in_order else attention_axis_size()

    def _check(self, tokens: jax.Array, limit: int, name: str) -> None:
        if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ValueError(
                f"tokens: expected integers [batch, seq], got {tokens.dtype} {tokens.shape}"
            )
        if not 0 < tokens.shape[1] <= limit:
            raise ValueError(f"tokens: {tokens.shape[1]} positions; expected 1 to {limit} ({name})")
