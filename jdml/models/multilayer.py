"""A multilayer perceptron.

    x [batch, inputs]
    relu(x @ kernel [inputs, widths[0]] + bias) → [batch, widths[0]], and so on
    x @ kernel [widths[-1], num_outputs] + bias → float32 [batch, num_outputs]

The hidden layers' logical names alternate, ``mlp``, ``embed``, ``mlp``, …: divided over a ``model``
axis, every second product sums over the axis and the others exchange nothing.
"""

import math
from dataclasses import dataclass
from itertools import pairwise

import jax
import jax.numpy as jnp
from flax import nnx

from jdml.models.transformer.layers import Dense
from jdml.sharding import constrain


@dataclass(frozen=True)
class MLPConfig:
    """The shape of an :class:`MLP`; the defaults have 199,210 parameters.

    Args:
      inputs: features of a sample.
      widths: units of each hidden layer.
      num_outputs: of the linear head.
    """

    inputs: int = 784
    widths: tuple[int, ...] = (200, 200)
    num_outputs: int = 10

    def __post_init__(self) -> None:
        sizes = {"inputs": self.inputs, "num_outputs": self.num_outputs}
        sizes |= {f"widths[{i}]": n for i, n in enumerate(self.widths)}
        for name, size in sizes.items():
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ValueError(f"MLPConfig({name}={size!r}): expected an int >= 1.")

    @property
    def num_params(self) -> int:
        """Number of weights and biases."""
        return sum((a + 1) * b for a, b in pairwise((self.inputs, *self.widths, self.num_outputs)))


class MLP(nnx.Module):
    """Hidden layers with ReLU, a linear head; without hidden layers, a linear model.

    Call inside ``jdml.sharding.use_rules``, or inside ``no_mesh`` on one device.

    Args:
      config: the shape.
      rngs: stream ``params``. Kernels are cut normals with deviation ``sqrt(2 / inputs)``, the
        head's ``sqrt(1 / inputs)`` (He et al., "Delving Deep into Rectifiers", 2015); biases 0.
    """

    def __init__(self, config: MLPConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.names = tuple("mlp" if i % 2 == 0 else "embed" for i in range(len(config.widths)))
        sizes, names = (config.inputs, *config.widths), (None, *self.names)
        self.hidden = nnx.List(
            Dense(
                (sizes[i],),
                (sizes[i + 1],),
                (names[i], names[i + 1]),
                rngs.params(),
                bias=True,
                scale=math.sqrt(2),
            )
            for i in range(len(config.widths))
        )
        outputs = (config.num_outputs,)
        self.head = Dense((sizes[-1],), outputs, (names[-1], None), rngs.params(), bias=True)

    def __call__(self, x: jax.Array) -> jax.Array:
        """float32 [batch, num_outputs] of floats [batch, inputs].

        Raises:
          ValueError: another shape, or not floating.
        """
        if x.shape[1:] != (self.config.inputs,) or not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(
                f"x: expected floats [batch, {self.config.inputs}], got {x.dtype}{list(x.shape)}"
            )
        x = constrain(x.astype(jnp.float32), "batch", None)
        for layer, name in zip(self.hidden, self.names, strict=True):
            x = constrain(jax.nn.relu(layer(x)), "batch", name)
        return constrain(self.head(x), "batch", None)
