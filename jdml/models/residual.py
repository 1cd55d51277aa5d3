"""Residual networks for images.

    images [batch, height, width, channels]
    stem: 7 × 7 convolution, stride 2; 3 × 3 maximum, stride 2 → [batch, height/4, width/4, width_0]
    depths[i] × block in stage i → [batch, height/2^(i+2), …, width_0 · 2^i · expansion]
      basic:       3 × 3, 3 × 3                                     expansion 1
      bottleneck:  1 × 1 (width), 3 × 3 (width), 1 × 1 (4 · width)  expansion 4
    mean over pixels → head [features, num_classes] → logits [batch, num_classes]

Every convolution is followed by a norm. *Group norm* (the default) looks at one image at a time and
has no state, so that every distributed method trains it as it trains anything else. *Batch norm*
looks at the batch that it is given: each worker's own where workers are mapped, the whole of it
where an axis divides it (the partitioner then sums over the axis). For use after training it needs
statistics of the training data; they are explicit: ``observe`` returns them and a call takes them.
They are measured with the trained weights, not as a running mean (Wu and Johnson, "Rethinking
'Batch' in BatchNorm", 2021), so a training step carries none. Both norms have a scale and a shift
per channel, so the published numbers of parameters hold for both; statistics do not count.

Over a ``model`` axis the first convolution of a block divides its outputs and the second its
inputs: one sum over the axis in each block. (The bottleneck's third, a quarter of its work, stays
whole: divided, it would add a sum four times as large.)

References: He et al., "Deep Residual Learning for Image Recognition", 2016, with the stride in the
3 × 3 convolution; Ioffe and Szegedy, "Batch Normalization", 2015; Wu and He, "Group Normalization",
2018; Goyal et al., "Accurate, Large Minibatch SGD", 2017 (a block's last scale starts at 0).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jdml.models.transformer.layers import Dense, param, truncated_normal
from jdml.sharding import constrain

_EPSILON = 1e-5
_DEPTHS: dict[int, tuple[Literal["basic", "bottleneck"], tuple[int, ...]]] = {
    18: ("basic", (2, 2, 2, 2)),
    34: ("basic", (3, 4, 6, 3)),
    50: ("bottleneck", (3, 4, 6, 3)),
    101: ("bottleneck", (3, 4, 23, 3)),
    152: ("bottleneck", (3, 8, 36, 3)),
}
_EXPANSION = {"basic": 1, "bottleneck": 4}
# (size, inputs, outputs) of a block's convolutions.
_SHAPES = {
    "basic": lambda inputs, width: ((3, inputs, width), (3, width, width)),
    "bottleneck": lambda inputs, width: (
        (1, inputs, width),
        (3, width, width),
        (1, width, 4 * width),
    ),
}


@dataclass(frozen=True)
class ResNetConfig:
    """The shape of a :class:`ResNet`; the defaults are ResNet-18's for 1,000 classes.

    Args:
      block: ``"basic"`` or ``"bottleneck"``.
      depths: blocks of each stage; every stage but the first halves the image.
      width: channels of the stem and of the first stage's inner convolutions; doubles by stage.
      channels: of an image.
      num_classes: number of logits.
      norm: ``"group"`` or ``"batch"``.
      num_groups: of group norm; divides ``width``.
      dtype: of activations and convolutions; parameters, norms and logits are float32.
    """

    block: Literal["basic", "bottleneck"] = "basic"
    depths: tuple[int, ...] = (2, 2, 2, 2)
    width: int = 64
    channels: int = 3
    num_classes: int = 1000
    norm: Literal["group", "batch"] = "group"
    num_groups: int = 32
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        sizes = {k: getattr(self, k) for k in ("width", "channels", "num_classes", "num_groups")}
        sizes |= {f"depths[{i}]": n for i, n in enumerate(self.depths)}
        for name, size in sizes.items():
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ValueError(f"ResNetConfig({name}={size!r}): expected an int >= 1.")
        for name, allowed in (
            ("block", ("basic", "bottleneck")),
            ("norm", ("group", "batch")),
            ("dtype", ("float32", "bfloat16")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
        if not self.depths:
            raise ValueError("ResNetConfig(depths=()): expected at least one stage.")
        if self.norm == "group" and self.width % self.num_groups:
            raise ValueError(
                f"width={self.width} must be a multiple of num_groups={self.num_groups}"
            )

    @property
    def features(self) -> int:
        """Channels that the head sees."""
        return self.width * 2 ** (len(self.depths) - 1) * _EXPANSION[self.block]

    @property
    def num_params(self) -> int:
        """Number of parameters, counted from the shapes; a norm has two per channel."""
        count = 49 * self.channels * self.width + 2 * self.width
        inputs = self.width
        for stage, depth in enumerate(self.depths):
            width = self.width * 2**stage
            outputs = width * _EXPANSION[self.block]
            for block in range(depth):
                for size, a, b in _SHAPES[self.block](inputs, width):
                    count += size**2 * a * b + 2 * b
                if inputs != outputs or (stage > 0 and block == 0):
                    count += inputs * outputs + 2 * outputs
                inputs = outputs
        return count + (inputs + 1) * self.num_classes


def resnet(depth: int = 50, **changes: Any) -> ResNetConfig:
    """Published shapes, for 1,000 classes.

    =====  ==========  ==========  ===========
    depth  parameters  block       depths
    =====  ==========  ==========  ===========
    18     11,689,512  basic       2, 2, 2, 2
    34     21,797,672  basic       3, 4, 6, 3
    50     25,557,032  bottleneck  3, 4, 6, 3
    101    44,549,160  bottleneck  3, 4, 23, 3
    152    60,192,808  bottleneck  3, 8, 36, 3
    =====  ==========  ==========  ===========

    Args:
      depth: one of the table's.
      **changes: fields of ``ResNetConfig`` that are to differ.

    Raises:
      ValueError: a depth that is not there, or fields that do not fit together.
    """
    if depth not in _DEPTHS:
        raise ValueError(f"resnet: no depth {depth!r}; expected one of {tuple(_DEPTHS)}")
    block, depths = _DEPTHS[depth]
    fields: dict[str, Any] = {"block": block, "depths": depths}
    return ResNetConfig(**fields | changes)


class Moments(NamedTuple):
    """What a batch norm subtracts and divides by: float32 [channels] each.

    The mean of these over batches, or over workers, are those of all samples together (for the
    activations as they were).
    """

    mean: jax.Array
    mean_square: jax.Array


Statistics = tuple[Moments, ...]


class _Call:
    """What the batch norms of one call use, in their order: given moments, or their batch's own."""

    def __init__(self, given: Statistics | None):
        self.used: list[Moments] = []
        self._given: Iterator[Moments] | None = None if given is None else iter(given)

    def moments(self, x: jax.Array) -> Moments:
        if self._given is not None:
            found = next(self._given)
        else:
            found = Moments(jnp.mean(x, axis=(0, 1, 2)), jnp.mean(x * x, axis=(0, 1, 2)))
        self.used.append(found)
        return found


class Norm(nnx.Module):
    """``(x - mean) / sqrt(variance + 1e-5) * scale + bias``, in float32.

    Mean and variance are over pixels and a group of channels (group norm), or over pixels and
    samples (batch norm).

    Args:
      config: which.
      channels: of ``x``.
      name: logical name of the channels.
      scale: at the start.
    """

    def __init__(self, config: ResNetConfig, channels: int, name: str, scale: float = 1.0):
        self.num_groups = config.num_groups if config.norm == "group" else None
        self.scale = param(jnp.full((channels,), scale, jnp.float32), (name,))
        self.bias = param(jnp.zeros((channels,), jnp.float32), (name,))

    def __call__(self, x: jax.Array, call: _Call) -> jax.Array:
        """``x`` [batch, height, width, channels], same dtype out."""
        wide = x.astype(jnp.float32)
        if self.num_groups is None:
            mean, mean_square = call.moments(wide)
            wide = (wide - mean) * jax.lax.rsqrt(mean_square - mean**2 + _EPSILON)
        else:
            groups = wide.reshape(*x.shape[:3], self.num_groups, -1)
            groups = groups - jnp.mean(groups, axis=(1, 2, 4), keepdims=True)
            variance = jnp.mean(groups * groups, axis=(1, 2, 4), keepdims=True)
            wide = (groups * jax.lax.rsqrt(variance + _EPSILON)).reshape(x.shape)
        return (wide * self.scale[...] + self.bias[...]).astype(x.dtype)


class Convolution(nnx.Module):
    """A convolution with as many pixels of padding on each side, a norm, and perhaps a ReLU.

    Parameters: ``kernel`` f32 [size, size, inputs, outputs], and the norm's.
    """

    def __init__(
        self,
        config: ResNetConfig,
        size: int,
        inputs: int,
        outputs: int,
        names: tuple[str | None, str],
        rngs: nnx.Rngs,
        *,
        stride: int = 1,
        scale: float = 1.0,
    ):
        self.stride, self.name = stride, names[1]
        shape = (size, size, inputs, outputs)
        std = math.sqrt(2 / (size**2 * outputs))
        self.kernel = param(truncated_normal(rngs.params(), shape, std), (None, None, *names))
        self.norm = Norm(config, outputs, names[1], scale)

    def __call__(self, x: jax.Array, call: _Call, *, relu: bool = True) -> jax.Array:
        """``x`` [batch, height, width, inputs] → [batch, ⌈height / stride⌉, …, outputs]."""
        pad = (self.kernel.shape[0] - 1) // 2
        x = jax.lax.conv_general_dilated(
            x,
            self.kernel[...].astype(x.dtype),
            window_strides=(self.stride, self.stride),
            padding=((pad, pad), (pad, pad)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        x = self.norm(constrain(x, "batch", None, None, self.name), call)
        return jax.nn.relu(x) if relu else x


class ResidualBlock(nnx.Module):
    """``relu(shortcut(x) + last(… first(x)))``; the shortcut is ``x`` itself where shapes agree."""

    def __init__(self, config: ResNetConfig, inputs: int, width: int, stride: int, rngs: nnx.Rngs):
        shapes = _SHAPES[config.block](inputs, width)
        # (inputs, outputs) of each: the first divides its outputs, the second its inputs.
        names: tuple[tuple[str | None, str], ...]
        names = (("embed", "mlp"), ("mlp", "embed"), (None, "embed"))
        strided = len(shapes) - 2  # the first 3 × 3
        self.layers = nnx.List(
            Convolution(
                config,
                *shape,
                names[i],
                rngs,
                stride=stride if i == strided else 1,
                scale=0.0 if i == len(shapes) - 1 else 1.0,
            )
            for i, shape in enumerate(shapes)
        )
        outputs = shapes[-1][2]
        self.shortcut = nnx.data(
            None
            if stride == 1 and inputs == outputs
            else Convolution(config, 1, inputs, outputs, (None, "embed"), rngs, stride=stride)
        )

    def __call__(self, x: jax.Array, call: _Call) -> jax.Array:
        """``x`` [batch, height, width, inputs] → [batch, ⌈height / stride⌉, …, outputs]."""
        y = x
        for i, layer in enumerate(self.layers):
            y = layer(y, call, relu=i < len(self.layers) - 1)
        kept = x if self.shortcut is None else self.shortcut(x, call, relu=False)
        return jax.nn.relu(kept + y)


class ResNet(nnx.Module):
    """Images to logits. Call inside ``jdml.sharding.use_rules``, or inside ``no_mesh``.

    Args:
      config: the shape.
      rngs: stream ``params``. Kernels are cut normals with deviation ``sqrt(2 / fan out)`` (He et
        al., 2015), the head's ``sqrt(1 / fan in)``.
    """

    def __init__(self, config: ResNetConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.stem = Convolution(
            config, 7, config.channels, config.width, (None, "embed"), rngs, stride=2
        )
        blocks, inputs = [], config.width
        for stage, depth in enumerate(config.depths):
            for i in range(depth):
                stride = 2 if stage > 0 and i == 0 else 1
                width = config.width * 2**stage
                blocks.append(ResidualBlock(config, inputs, width, stride, rngs))
                inputs = width * _EXPANSION[config.block]
        self.blocks = nnx.List(blocks)
        classes = (config.num_classes,)
        self.head = Dense((inputs,), classes, ("embed", None), rngs.params(), bias=True)

    def __call__(self, images: jax.Array, statistics: Statistics | None = None) -> jax.Array:
        """Logits.

        Args:
          images: floats [batch, height, width, channels], of any height and width.
          statistics: for batch norm, from ``observe``; None takes those of this batch.

        Returns:
          float32 [batch, num_classes].

        Raises:
          ValueError: images with other channels, or not floating; statistics of another network.
        """
        return self._run(images, statistics)[0]

    def observe(self, images: jax.Array) -> tuple[jax.Array, Statistics]:
        """Logits, and the moments that batch norm found in these images; ``()`` for group norm.

        For a fixed model, average the moments leaf by leaf over as many batches as are wanted.
        """
        logits, used = self._run(images, None)
        return logits, tuple(used)

    def _run(
        self, images: jax.Array, statistics: Statistics | None
    ) -> tuple[jax.Array, list[Moments]]:
        c = self.config
        if (
            images.ndim != 4
            or images.shape[3] != c.channels
            or not jnp.issubdtype(images.dtype, jnp.floating)
        ):
            raise ValueError(
                f"images: expected floats [batch, height, width, {c.channels}], got "
                f"{images.dtype}{list(images.shape)}"
            )
        if statistics is not None:
            self._check(statistics)
        call = _Call(statistics)
        x = constrain(images.astype(c.dtype), "batch", None, None, None)
        x = self.stem(x, call)
        x = jax.lax.reduce_window(
            x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1),
            ((0, 0), (1, 1), (1, 1), (0, 0)),
        )  # fmt: skip
        for block in self.blocks:
            x = constrain(block(x, call), "batch", None, None, "embed")
        logits = self.head(jnp.mean(x.astype(jnp.float32), axis=(1, 2)))
        return constrain(logits, "batch", None), call.used

    def _check(self, statistics: Statistics) -> None:
        norms = [m.scale.shape for _, m in nnx.iter_modules(self) if isinstance(m, Norm)]
        norms = norms if self.config.norm == "batch" else []
        found = [m.mean.shape for m in statistics]
        if sorted(found) != sorted(norms):
            raise ValueError(
                f"statistics: expected those of {len(norms)} batch norms of this network, got "
                f"{len(found)}{'' if len(found) != len(norms) else ' with other channels'}; take "
                "what observe returned"
            )
