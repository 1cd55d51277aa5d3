"""Optax's character-level transformer (NNX): six layers of 256 with dropout."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import PartitionSpec as P

from jdml.sharding import Rules
from tests.sharding.published.example import Example

VOCAB, BLOCK = 65, 64


class NanoLM(nnx.Module):
    def __init__(
        self,
        vocab_size,
        num_layers=6,
        num_heads=8,
        head_size=32,
        dropout_rate=0.2,
        embed_size=256,
        block_size=BLOCK,
        *,
        rngs,
    ):
        self.embed = nnx.Embed(vocab_size, embed_size, rngs=rngs)
        self.pos_embed = nnx.Embed(block_size, embed_size, rngs=rngs)
        self.layers = nnx.List(
            nnx.Dict(
                ln_1=nnx.LayerNorm(embed_size, rngs=rngs),
                attn=nnx.MultiHeadAttention(
                    num_heads=num_heads,
                    in_features=embed_size,
                    qkv_features=head_size,
                    out_features=head_size * num_heads,
                    dropout_rate=dropout_rate,
                    decode=False,
                    rngs=rngs,
                ),
                ln_2=nnx.LayerNorm(embed_size, rngs=rngs),
                mlp_fc=nnx.Linear(embed_size, 4 * embed_size, rngs=rngs),
                mlp_dropout=nnx.Dropout(dropout_rate, rngs=rngs),
                mlp_proj=nnx.Linear(4 * embed_size, embed_size, rngs=rngs),
            )
            for _ in range(num_layers)
        )
        self.ln_f = nnx.LayerNorm(embed_size, rngs=rngs)
        self.head = nnx.Linear(embed_size, vocab_size, rngs=rngs)

    def __call__(self, x, deterministic=False):
        length = x.shape[1]
        x = self.embed(x) + self.pos_embed(jnp.arange(length))
        mask = jnp.tril(jnp.ones((length, length)))
        for layer in self.layers:
            y = layer["ln_1"](x)
            x = x + layer["attn"](y, y, y, mask=mask, deterministic=deterministic)
            y = jax.nn.relu(layer["mlp_fc"](layer["ln_2"](x)))
            y = layer["mlp_dropout"](y, deterministic=deterministic)
            x = x + layer["mlp_proj"](y)
        return self.head(self.ln_f(x))


def loss(model, batch, key):
    graphdef, state = nnx.split(model)

    def of_one(tokens, seed):
        # Each sample brings the seed of its masks, so that they do not depend on who computes it.
        one = nnx.merge(graphdef, state, copy=True)
        nnx.reseed(one, default=jax.random.key(seed))
        logits = one(tokens[None, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits[0], tokens[1:]).mean()

    return jax.vmap(of_one)(batch["tokens"], batch["seed"]).mean()


def samples(rng, number):
    return {
        "tokens": rng.integers(0, VOCAB, (number, BLOCK + 1), "int32"),
        "seed": rng.integers(0, 2**32, number, "uint32"),
    }


EXAMPLE = Example(
    make=lambda key: NanoLM(VOCAB, rngs=nnx.Rngs(key)),
    loss=loss,
    tx=optax.adamw(2e-3),
    samples=samples,
    rules=Rules(embed="fsdp", heads="model", mlp="model").for_paths(
        {
            "embed/embedding": (None, "embed"),
            "attn/(query|key|value)/kernel": ("embed", "heads", None),
            "attn/(query|key|value)/bias": ("heads", None),
            "attn/out/kernel": ("heads", None, "embed"),
            "mlp_fc/kernel": ("embed", "mlp"),
            "mlp_fc/bias": ("mlp",),
            "mlp_proj/kernel": ("mlp", "embed"),
            "head/kernel": ("embed", None),
            "bias|scale|rngs": None,
        }
    ),
    num_params=3_408_513,
    layout={
        "embed/embedding": P(None, "fsdp"),
        "layers/3/attn/query/kernel": P("fsdp", "model", None),
        "layers/3/attn/out/kernel": P("model", None, "fsdp"),
        "layers/5/mlp_proj/kernel": P("model", "fsdp"),
        "layers/5/ln_1/scale": P(),
        "head/kernel": P("fsdp", None),
    },
    second_axis="model",
    only_axis="data",
)
