"""Whether an optimiser acts on each element by itself, so that it may be run on slices."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax

PyTree = Any

_MIXES = (
    *("reduce_", "argmax", "argmin", "cum", "sort", "top_k", "approx_top_k", "fft", "scatter"),
    *("dot_general", "ragged_dot", "conv_general", "select_and_", "triangular_solve", "lu"),
    *("qr", "householder", "cholesky", "eig", "svd", "schur", "hessenberg", "tridiagonal"),
)
"""Beginnings of the names of JAX's primitives that let an element depend on others."""

_SENDS = ("psum", "pmax", "pmin", "all_gather", "all_to_all", "ppermute", "reduce_scatter")


def check_elementwise(inner: optax.GradientTransformationExtraArgs, owned: PyTree) -> None:
    """Raises if an update lets elements of a leaf depend on each other.

    It looks for reductions, products of matrices and the like in the traced program. One that
    communicates is taken to know what it does.

    Args:
      inner: The optimiser.
      owned: The worker's slices of the parameters.
    """

    def update(owned: PyTree) -> PyTree:
        return inner.update(owned, inner.init(owned), owned, value=jnp.zeros(()))

    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), owned)
    names = set(_mixing(jax.make_jaxpr(update)(shapes).jaxpr))
    if names and not any(name.startswith(_SENDS) for name in names):
        raise ValueError(
            "parameter_server: the inner optimiser is not elementwise: it uses "
            f"{', '.join(sorted(names))} on a leaf, of which each worker has only its slice, so "
            "that the workers would find different norms or factors. To clip by the global norm, "
            "pass clip_norm= to parameter_server; for Adafactor, Muon, LAMB and the like use "
            "optax.chain(mean_gradients(axis), inner), whose updates see whole leaves."
        )


def clipped(mean: PyTree, norm: jax.Array, largest: float) -> PyTree:
    """``optax.clip_by_global_norm(largest)`` of slices of gradients of that norm."""
    return jax.tree.map(
        lambda g: jax.lax.select(norm < largest, g, (g / norm.astype(g.dtype)) * largest), mean
    )


def _mixing(jaxpr: Any) -> Iterator[str]:
    """Names of the primitives, at any depth, that mix elements of an array or communicate."""
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        arrays = any(getattr(x.aval, "ndim", 0) for x in equation.invars)
        if name.startswith(_SENDS) or (arrays and name.startswith(_MIXES)):
            yield name
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from _mixing(inner)
