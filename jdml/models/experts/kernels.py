"""The experts' parameters: like an MLP's, with a leading dim of experts."""

from typing import NamedTuple

import jax

Names = tuple[str, ...]


class Kernels(NamedTuple):
    """``(silu(x @ gate) * (x @ up)) @ down``; without a gate ``gelu(x @ up) @ down``.

    ``gate``, ``up``: [experts, embed, mlp]; ``down``: [experts, mlp, embed].
    """

    gate: jax.Array | None
    up: jax.Array
    down: jax.Array


UP_NAMES: Names = ("experts", "embed", "mlp")
DOWN_NAMES: Names = ("experts", "mlp", "embed")


def names_of(kernels: Kernels) -> list[Names]:
    """Logical names of the dims of ``present(kernels)``."""
    return [UP_NAMES] * (1 if kernels.gate is None else 2) + [DOWN_NAMES]


def present(kernels: Kernels) -> tuple[jax.Array, ...]:
    """The kernels that there are: the gate, if any, up, down."""
    return tuple(x for x in kernels if x is not None)


def restored(arrays: tuple[jax.Array, ...]) -> Kernels:
    """The inverse of ``present``."""
    return Kernels(None, *arrays) if len(arrays) == 2 else Kernels(*arrays)


def activation(gate: jax.Array | None, up: jax.Array) -> jax.Array:
    """The hidden units, from the products with ``gate`` and ``up``."""
    return jax.nn.gelu(up) if gate is None else jax.nn.silu(gate) * up
