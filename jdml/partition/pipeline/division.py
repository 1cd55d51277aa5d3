"""Which layers are in which part of the model, and stacks of layers laid out by part.

A stack ``[layers, ...]`` becomes ``[chunks, stages, layers of a part, ...]``: dim 1 is divided over
the stage axis, so that each stage holds its parts and no layer ever moves. Parts with fewer layers
than the largest are filled up with zeros, which are not computed with.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from jdml.sharding.paths import leaves_with_paths

PyTree = Any


@dataclass(frozen=True)
class Division:
    """How many layers each part has.

    Attributes:
      num_stages: Stages.
      layers: Layers of each part, in the model's order; part p is on stage ``p % num_stages``.
    """

    num_stages: int
    layers: tuple[int, ...]

    @property
    def chunks(self) -> int:
        """Parts of each stage."""
        return len(self.layers) // self.num_stages

    @property
    def num_layers(self) -> int:
        """Of the whole model."""
        return sum(self.layers)

    @property
    def size(self) -> int:
        """Layers of the largest part."""
        return max(self.layers)

    @property
    def equal(self) -> bool:
        """Whether all parts have as many layers."""
        return min(self.layers) == self.size

    @property
    def counts(self) -> NDArray[np.int32]:
        """Layers by ``[chunk, stage]``."""
        return np.array(self.layers, np.int32).reshape(self.chunks, self.num_stages)

    @property
    def offsets(self) -> NDArray[np.int32]:
        """Layers before the part, by ``[chunk, stage]``."""
        before = np.concatenate([[0], np.cumsum(self.layers)[:-1]])
        return before.astype(np.int32).reshape(self.chunks, self.num_stages)

    @cached_property
    def places(self) -> NDArray[np.int64]:
        """Where each layer lies among the ``chunks · stages · size`` places."""
        return np.concatenate([p * self.size + np.arange(n) for p, n in enumerate(self.layers)])

    def arrange(self, stack: PyTree) -> PyTree:
        """``[layers, ...]`` → ``[chunks, stages, size, ...]``."""
        check_stack(stack, self.num_layers)
        lead = (self.chunks, self.num_stages, self.size)

        def leaf(x: Any) -> Any:
            if self.equal:
                return x.reshape(*lead, *x.shape[1:])
            xp: Any = jnp if isinstance(x, jax.Array) else np
            source = np.full(len(self.layers) * self.size, self.num_layers)
            source[self.places] = np.arange(self.num_layers)
            padded = xp.concatenate([x, xp.zeros((1, *x.shape[1:]), x.dtype)])
            return padded[source].reshape(*lead, *x.shape[1:])

        return jax.tree.map(leaf, stack)

    def restore(self, stack: PyTree) -> PyTree:
        """The inverse of :meth:`arrange`."""
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[3:])[self.places], stack)


def divide(num_layers: int, num_stages: int, chunks: int) -> Division:
    """Equal parts.

    Raises:
      ValueError: the parts do not divide the layers; names the nearest numbers that they do, and
        an unequal division.
    """
    parts = num_stages * chunks
    if num_layers % parts or not num_layers:
        down, rest = divmod(num_layers, parts)
        unequal = tuple(down + (p < rest) for p in range(parts))
        near = " or ".join(str(n * parts) for n in (down, down + 1) if n)
        hint = f", or say how many each gets: layers={unequal}" if down else ""
        raise ValueError(
            f"pipeline: {num_layers} layers for {parts} parts ({num_stages} stages × {chunks} "
            f"chunks), which do not divide them. Use {near} layers{hint}."
        )
    return Division(num_stages, (num_layers // parts,) * parts)


def division_of(layers: Sequence[int], num_stages: int, chunks: int) -> Division:
    """The division into parts of so many layers.

    Raises:
      ValueError: not one count for each part, or one below 1.
    """
    parts = num_stages * chunks
    if len(layers) != parts or any(not isinstance(n, int) or n < 1 for n in layers):
        raise ValueError(
            f"pipeline: layers={tuple(layers)}; expected {parts} ints of at least 1, the layers of "
            f"each part in the model's order ({num_stages} stages × {chunks} chunks)."
        )
    return Division(num_stages, tuple(layers))


def num_layers_of(stack: PyTree) -> int:
    """Dim 0 of a stack's first leaf."""
    leaves = leaves_with_paths(stack)
    if not leaves or not np.ndim(leaves[0][1]):
        raise ValueError(
            "pipeline: the stack of layers has no leaves with a leading dim of layers."
        )
    return int(leaves[0][1].shape[0])


def check_stack(stack: PyTree, num_layers: int) -> None:
    """Every leaf has ``num_layers`` as its dim 0."""
    num_layers_of(stack)
    for path, x in leaves_with_paths(stack):
        if not np.ndim(x) or x.shape[0] != num_layers:
            raise ValueError(
                f"pipeline: leaf {path!r} of the stack has shape {np.shape(x)}; expected "
                f"[{num_layers} layers, ...]. Stack every leaf of a layer along dim 0."
            )
