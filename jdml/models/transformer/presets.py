"""Published shapes of the decoder, as configurations; the weights themselves are not loaded.

A preset is a ``TransformerConfig``: ``gpt2("xl", dtype="bfloat16", max_seq_len=512)`` changes any
field. A table whose rows a mesh axis does not divide needs more of them: GPT-2's 50,257 words do
not divide by 2, so a vocabulary divided over ``model`` asks for ``vocab_size=50_304``, say.
"""

import dataclasses
from typing import Any

from jdml.models.transformer.config import TransformerConfig

# Layers, heads, width.
_GPT2 = {
    "small": (12, 12, 768),
    "medium": (24, 16, 1024),
    "large": (36, 20, 1280),
    "xl": (48, 25, 1600),
}
# Layers, heads, width, hidden units.
_LLAMA3 = {
    "8b": (32, 32, 4096, 14_336),
    "70b": (80, 64, 8192, 28_672),
}
# Layers, heads, width, hidden units of an expert, words, positions.
_MIXTRAL = {
    "8x7b": (32, 32, 4096, 14_336, 32_000, 32_768),
    "8x22b": (56, 48, 6144, 16_384, 32_000, 65_536),
}


def gpt2(size: str = "small", **changes: Any) -> TransformerConfig:
    """GPT-2: LayerNorm before each part, learned positions, GELU, biases, a tied head.

    ======  =============  ======  ==========  ============
    size    parameters     layers  heads × 64  hidden units
    ======  =============  ======  ==========  ============
    small     124,439,808      12          12         3,072
    medium    354,823,168      24          16         4,096
    large     774,030,080      36          20         5,120
    xl      1,557,611,200      48          25         6,400
    ======  =============  ======  ==========  ============

    Reference: Radford et al., "Language Models are Unsupervised Multitask Learners", 2019.

    Args:
      size: one of the table's.
      **changes: fields of ``TransformerConfig`` that are to differ.

    Raises:
      ValueError: a size that is not there, or fields that do not fit together.
    """
    layers, heads, embed = _sizes("gpt2", _GPT2, size)
    config = TransformerConfig(
        vocab_size=50_257,
        num_layers=layers,
        embed_dim=embed,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=embed // heads,
        mlp_dim=4 * embed,
        max_seq_len=1024,
        norm="layer",
        positions="learned",
        mlp="gelu",
        bias=True,
        norm_epsilon=1e-5,
        tie_embeddings=True,
    )
    return dataclasses.replace(config, **changes)


def llama3(size: str = "8b", **changes: Any) -> TransformerConfig:
    """Llama 3: RMSNorm, rotary positions of base 500,000, eight key heads, SwiGLU; in bfloat16.

    ====  ==============  ======  ===========  ============
    size  parameters      layers  heads × 128  hidden units
    ====  ==============  ======  ===========  ============
    8b     8,030,261,248      32           32        14,336
    70b   70,553,706,496      80           64        28,672
    ====  ==============  ======  ===========  ============

    Over more than eight devices the eight key heads do not divide: leave them whole with
    ``rules.replace(kv_heads=None)``; queries and all else stay divided.

    Reference: Grattafiori et al., "The Llama 3 Herd of Models", 2024.

    Args:
      size: one of the table's.
      **changes: fields of ``TransformerConfig`` that are to differ.

    Raises:
      ValueError: a size that is not there, or fields that do not fit together.
    """
    layers, heads, embed, hidden = _sizes("llama3", _LLAMA3, size)
    config = TransformerConfig(
        vocab_size=128_256,
        num_layers=layers,
        embed_dim=embed,
        num_heads=heads,
        num_kv_heads=8,
        head_dim=128,
        mlp_dim=hidden,
        max_seq_len=8192,
        rope_base=500_000.0,
        norm_epsilon=1e-5,
        dtype="bfloat16",
    )
    return dataclasses.replace(config, **changes)


def mixtral(size: str = "8x7b", **changes: Any) -> TransformerConfig:
    """Mixtral: Llama's parts with eight experts, two for each token, none dropped; in bfloat16.

    =====  ===============  ==============  ======  ===========  ============
    size   parameters       a token meets   layers  heads × 128  hidden units
    =====  ===============  ==============  ======  ===========  ============
    8x7b    46,702,792,704  12,879,925,248      32           32        14,336
    8x22b  140,620,634,112  39,152,031,744      56           48        16,384
    =====  ===============  ==============  ======  ===========  ============

    Reference: Jiang et al., "Mixtral of Experts", 2024.

    Args:
      size: one of the table's.
      **changes: fields of ``TransformerConfig`` that are to differ.

    Raises:
      ValueError: a size that is not there, or fields that do not fit together.
    """
    layers, heads, embed, hidden, vocab, seq = _sizes("mixtral", _MIXTRAL, size)
    config = TransformerConfig(
        vocab_size=vocab,
        num_layers=layers,
        embed_dim=embed,
        num_heads=heads,
        num_kv_heads=8,
        head_dim=128,
        mlp_dim=hidden,
        max_seq_len=seq,
        num_experts=8,
        experts_per_token=2,
        rope_base=1_000_000.0,
        norm_epsilon=1e-5,
        dtype="bfloat16",
    )
    return dataclasses.replace(config, **changes)


def _sizes(model: str, table: dict[str, Any], size: str) -> Any:
    if size not in table:
        raise ValueError(f"{model}: no size {size!r}; expected one of {', '.join(table)}")
    return table[size]
