"""A vision transformer: an encoder over patches of an image.

    images [batch, size, size, channels]
    patches [batch, (size / patch)², patch, patch, channels] → [batch, (size / patch)², embed]
    class token in front, learned positions added → [batch, 1 + (size / patch)², embed]
    num_layers × Block (the decoder's, of GPT-2's form, in which every position sees all)
    norm of the class token → head [embed, num_classes] → logits [batch, num_classes]

The class token makes the number of positions odd (197 for 224 / 16), so that no axis divides them:
rules for it map ``seq`` to None. Heads, hidden units and ``embed`` divide as in the decoder.

Reference: Dosovitskiy et al., "An Image is Worth 16x16 Words", 2021.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jdml.models.transformer.config import Dtype, Remat, TransformerConfig
from jdml.models.transformer.decoder import Block
from jdml.models.transformer.layers import Dense, LearnedPositions, make_norm, param
from jdml.models.transformer.remat import remat
from jdml.sharding import constrain


@dataclass(frozen=True)
class VisionTransformerConfig:
    """The shape of a :class:`VisionTransformer`; the defaults are ViT-B/16 for 1,000 classes.

    Args:
      image_size: height and width of an image, in pixels.
      patch_size: height and width of a patch; divides ``image_size``.
      channels: of an image.
      num_layers: number of blocks.
      embed_dim: width of the residual stream; ``num_heads`` divides it.
      num_heads: attention heads.
      mlp_dim: width of the MLP's hidden layer.
      num_classes: number of logits.
      dtype: of activations and matrix products, as in ``TransformerConfig``.
      remat: what the backward pass computes again, as in ``TransformerConfig``.
      unroll: write the layers out instead of scanning them.
    """

    image_size: int = 224
    patch_size: int = 16
    channels: int = 3
    num_layers: int = 12
    embed_dim: int = 768
    num_heads: int = 12
    mlp_dim: int = 3072
    num_classes: int = 1000
    dtype: Dtype = "float32"
    remat: Remat = "dots"
    unroll: bool = False

    def __post_init__(self) -> None:
        for name in ("image_size", "patch_size", "channels", "num_classes", "num_heads"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        for name, part in (("image_size", "patch_size"), ("embed_dim", "num_heads")):
            if getattr(self, name) % getattr(self, part):
                raise ValueError(
                    f"{name}={getattr(self, name)} must be a multiple of {part}="
                    f"{getattr(self, part)}"
                )
        _ = self.blocks  # which checks the rest

    @property
    def num_positions(self) -> int:
        """Patches, and the class token."""
        return (self.image_size // self.patch_size) ** 2 + 1

    @property
    def blocks(self) -> TransformerConfig:
        """The blocks, in the decoder's words."""
        return TransformerConfig(
            vocab_size=1,
            num_layers=self.num_layers,
            embed_dim=self.embed_dim,
            num_heads=self.num_heads,
            num_kv_heads=self.num_heads,
            head_dim=self.embed_dim // self.num_heads,
            mlp_dim=self.mlp_dim,
            max_seq_len=self.num_positions,
            norm="layer",
            positions="learned",
            mlp="gelu",
            bias=True,
            causal=False,
            tie_embeddings=True,
            dtype=self.dtype,
            remat=self.remat,
            unroll=self.unroll,
        )

    @property
    def num_params(self) -> int:
        """Number of parameters, counted from the shapes."""
        embed = self.embed_dim
        patches = self.patch_size**2 * self.channels * embed + embed
        # The blocks' words count a table of one word: here it is the class token.
        return self.blocks.num_params + patches + (embed + 1) * self.num_classes


def vit(variant: str = "b16", **changes: Any) -> VisionTransformerConfig:
    """Published shapes at 224 × 224 for 1,000 classes.

    =======  ===========  ======  ===================
    variant  parameters   layers  embed, heads, hidden
    =======  ===========  ======  ===================
    s16       22,050,664      12        384, 6, 1,536
    b16       86,567,656      12       768, 12, 3,072
    b32       88,224,232      12       768, 12, 3,072
    l16      304,326,632      24     1,024, 16, 4,096
    h14      632,045,800      32     1,280, 16, 5,120
    =======  ===========  ======  ===================

    Reference: Dosovitskiy et al., 2021; s16: Touvron et al., "DeiT", 2021.

    Args:
      variant: one of the table's: a size and the patch size.
      **changes: fields of ``VisionTransformerConfig`` that are to differ.

    Raises:
      ValueError: a variant that is not there, or fields that do not fit together.
    """
    if variant not in _VARIANTS:
        raise ValueError(f"vit: no variant {variant!r}; expected one of {', '.join(_VARIANTS)}")
    layers, embed, heads = _VARIANTS[variant]
    shape: dict[str, Any] = {
        "patch_size": int(variant[1:]),
        "num_layers": layers,
        "embed_dim": embed,
        "num_heads": heads,
        "mlp_dim": 4 * embed,
    }
    return VisionTransformerConfig(**shape | changes)


# Layers, width, heads.
_VARIANTS = {
    "s16": (12, 384, 6),
    "b16": (12, 768, 12),
    "b32": (12, 768, 12),
    "l16": (24, 1024, 16),
    "h14": (32, 1280, 16),
}


class VisionTransformer(nnx.Module):
    """Images to logits. Call inside ``jdml.sharding.use_rules``, or inside ``no_mesh``.

    Args:
      config: the shape.
      rngs: stream ``params``. Kernels as the decoder's; positions have deviation 0.02; the class
        token and biases start at 0.
    """

    def __init__(self, config: VisionTransformerConfig, *, rngs: nnx.Rngs):
        self.config = config
        embed, patch = config.embed_dim, config.patch_size
        self.patch = Dense(
            (patch, patch, config.channels),
            (embed,),
            (None, None, None, "embed"),
            rngs.params(),
            bias=True,
        )
        self.token = param(jnp.zeros((embed,), jnp.float32), ("embed",))
        self.positions = LearnedPositions(config.num_positions, embed, rngs.params(), std=0.02)
        make = nnx.vmap(
            lambda rngs: Block(config.blocks, rngs),
            transform_metadata={nnx.PARTITION_NAME: "layers"},
        )
        self.layers = make(rngs.split(config.num_layers))
        self.norm = make_norm(config.blocks)
        classes = (config.num_classes,)
        self.head = Dense((embed,), classes, ("embed", None), rngs.params(), bias=True)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Logits.

        Args:
          images: floats [batch, image_size, image_size, channels].

        Returns:
          float32 [batch, num_classes].

        Raises:
          ValueError: images of another shape, or not floating.
        """
        c = self.config
        size, patch, dtype = c.image_size, c.patch_size, c.blocks.compute_dtype
        if images.shape[1:] != (size, size, c.channels) or not jnp.issubdtype(
            images.dtype, jnp.floating
        ):
            raise ValueError(
                f"images: expected floats [batch, {size}, {size}, {c.channels}], got "
                f"{images.dtype}{list(images.shape)}"
            )
        batch, side = len(images), size // patch
        patches = images.astype(dtype).reshape(batch, side, patch, side, patch, c.channels)
        patches = patches.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1, patch, patch, c.channels)
        x = self.patch(patches)
        token = jnp.broadcast_to(self.token[...].astype(dtype), (batch, 1, c.embed_dim))
        x = jnp.concatenate([token, x], axis=1) + self.positions(0, c.num_positions, dtype)
        x = constrain(x, "batch", "seq", "embed")

        graphdef, state = nnx.split(self.layers)

        def body(x: jax.Array, state: Any) -> tuple[jax.Array, None]:
            return nnx.merge(graphdef, state)(x, None)[0], None

        unroll = c.num_layers if c.unroll else 1
        x, _ = jax.lax.scan(remat(body, c.blocks), x, nnx.to_pure_dict(state), unroll=unroll)
        logits = self.head(self.norm(x[:, 0]).astype(jnp.float32))
        return constrain(logits, "batch", None)
