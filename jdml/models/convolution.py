"""A small convolutional network for images: convolutions, one hidden layer, a linear head.

The channels' logical names alternate, ``embed``, ``mlp``, ``embed``, …, from layer to layer, so
that the presets of ``jdml.sharding`` divide it as they divide a transformer. It does not annotate
activations: it is called anywhere, and the partitioner lays them out after the parameters.
"""

import math
from dataclasses import dataclass
from itertools import pairwise

import jax
import jax.numpy as jnp
from flax import nnx

from jdml.models.transformer.layers import param, truncated_normal

_KERNEL = 3


@dataclass(frozen=True)
class ConvNetConfig:
    """The shape of a :class:`ConvNet`; the defaults fit 8 × 8 grey images and have 38,282 weights.

    Args:
      height: of an image, in pixels.
      width: of an image, in pixels.
      channels: of an image.
      widths: channels after each convolution; every convolution but the first halves the image.
      hidden: width of the hidden layer.
      num_classes: number of logits.
    """

    height: int = 8
    width: int = 8
    channels: int = 1
    widths: tuple[int, ...] = (16, 32)
    hidden: int = 64
    num_classes: int = 10

    def __post_init__(self) -> None:
        sizes = {k: v for k, v in vars(self).items() if k != "widths"}
        sizes |= {f"widths[{i}]": n for i, n in enumerate(self.widths)}
        for name, size in sizes.items():
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ValueError(f"ConvNetConfig({name}={size!r}): expected an int >= 1.")
        if not self.widths:
            raise ValueError("ConvNetConfig(widths=()): expected at least one convolution.")

    @property
    def last_image(self) -> tuple[int, int]:
        """Height and width after the last convolution."""
        shrink = 2 ** (len(self.widths) - 1)
        return -(-self.height // shrink), -(-self.width // shrink)

    @property
    def num_params(self) -> int:
        """Number of weights and biases."""
        layers = [_KERNEL**2 * a * b + b for a, b in pairwise((self.channels, *self.widths))]
        flat = math.prod(self.last_image) * self.widths[-1]
        return sum(layers) + (flat + 1) * self.hidden + (self.hidden + 1) * self.num_classes


class Convolution(nnx.Module):
    """``relu(x * kernel + bias)``, 3 × 3, same padding.

    Parameters: ``kernel`` f32 [3, 3, inputs, outputs], ``bias`` f32 [outputs].

    Args:
      inputs: channels of ``x``.
      outputs: channels of the result.
      names: logical names of the two.
      stride: pixels from one result to the next.
      key: typed key.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        names: tuple[str | None, str | None],
        stride: int,
        key: jax.Array,
    ):
        self.stride = stride
        shape = (_KERNEL, _KERNEL, inputs, outputs)
        std = math.sqrt(2 / math.prod(shape[:3]))
        self.kernel = param(truncated_normal(key, shape, std), (None, None, *names))
        self.bias = param(jnp.zeros((outputs,), jnp.float32), names[1:])

    def __call__(self, x: jax.Array) -> jax.Array:
        """``x`` [batch, height, width, inputs] → [batch, height / stride, …, outputs]."""
        x = jax.lax.conv_general_dilated(
            x,
            self.kernel[...],
            window_strides=(self.stride, self.stride),
            padding="SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return jax.nn.relu(x + self.bias[...])


class Linear(nnx.Module):
    """``x @ kernel + bias`` over the last dims of ``x``.

    Parameters: ``kernel`` f32 [*inputs, outputs], ``bias`` f32 [outputs].

    Args:
      inputs: sizes of the contracted dims, the last ones of ``x``.
      outputs: size of the dim that replaces them.
      names: logical names of the kernel's dims.
      scale: the kernel's deviation is ``scale / sqrt(fan in)``.
      key: typed key.
    """

    def __init__(
        self,
        inputs: tuple[int, ...],
        outputs: int,
        names: tuple[str | None, ...],
        scale: float,
        key: jax.Array,
    ):
        std = scale / math.sqrt(math.prod(inputs))
        self.kernel = param(truncated_normal(key, (*inputs, outputs), std), names)
        self.bias = param(jnp.zeros((outputs,), jnp.float32), names[-1:])

    def __call__(self, x: jax.Array) -> jax.Array:
        """``x`` [batch, *inputs] → [batch, outputs]."""
        kernel = self.kernel[...]
        return x.reshape(len(x), -1) @ kernel.reshape(-1, kernel.shape[-1]) + self.bias[...]


class ConvNet(nnx.Module):
    """Convolutions with ReLU, a hidden layer with ReLU, logits.

    Parameters, with the names of their dims (channels' names alternate)::

        convolutions.i.kernel  [3, 3, widths[i-1], widths[i]]  (None, None, "embed", "mlp")
        hidden.kernel          [height', width', widths[-1], hidden]
        head.kernel            [hidden, num_classes]           the last dim is not named
        and a bias of each layer's outputs

    Args:
      config: the shape.
      rngs: stream ``params``. Kernels are cut normals with deviation ``sqrt(2 / fan in)``, the
        head's ``sqrt(1 / fan in)`` (He et al., "Delving Deep into Rectifiers", 2015); biases 0.
    """

    def __init__(self, config: ConvNetConfig, *, rngs: nnx.Rngs):
        self.config = config
        channels = (config.channels, *config.widths)
        names = (None, *("embed" if i % 2 == 0 else "mlp" for i in range(len(channels))))
        self.convolutions = nnx.List(
            Convolution(a, b, (names[i], names[i + 1]), 1 if i == 0 else 2, rngs.params())
            for i, (a, b) in enumerate(pairwise(channels))
        )
        inner, outer = names[len(channels) - 1], names[len(channels)]
        self.hidden = Linear(
            (*config.last_image, channels[-1]),
            config.hidden,
            (None, None, inner, outer),
            math.sqrt(2),
            rngs.params(),
        )
        self.head = Linear((config.hidden,), config.num_classes, (outer, None), 1.0, rngs.params())

    def __call__(self, images: jax.Array) -> jax.Array:
        """Logits.

        Args:
          images: floats [batch, height, width, channels].

        Returns:
          float32 [batch, num_classes].

        Raises:
          ValueError: images of another shape, or not floating.
        """
        c = self.config
        if images.shape[1:] != (c.height, c.width, c.channels) or not jnp.issubdtype(
            images.dtype, jnp.floating
        ):
            raise ValueError(
                f"images: expected floats [batch, {c.height}, {c.width}, {c.channels}], got "
                f"{images.dtype}{list(images.shape)}"
            )
        x = images.astype(jnp.float32)
        for convolution in self.convolutions:
            x = convolution(x)
        return self.head(jax.nn.relu(self.hidden(x)))
