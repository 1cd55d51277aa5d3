"""Optimiser state laid out like its parameters, for any Optax transformation.

Optax does not say which leaf of a state belongs to which parameter. Its key path does: a state
that maps over the parameters keeps their paths as suffixes of its own (``1/mu/layers/0/kernel``).
The longest suffix that is a parameter's path names the parameter; then its shape says the spec:
the parameter's own, or, for factored moments, the spec less the entry of the dim that is gone.
"""

from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from jdml.sharding.paths import leaves_with_paths
from jdml.sharding.place import broadcast
from jdml.sharding.specs import as_pytree

PyTree = Any


def optimizer_specs(opt_state: PyTree, params: PyTree, param_specs: PyTree) -> PyTree:
    """A ``PartitionSpec`` for every leaf of an Optax state, in its structure.

    Args:
      opt_state: the state, as arrays or ``jax.eval_shape(tx.init, params)``.
      params: the parameters (or their shapes) that it was made from.
      param_specs: their specs.
    """
    params = as_pytree(params)
    flat = broadcast(param_specs, params)
    known = {
        tuple(path.split("/")): (np.shape(leaf), spec)
        for (path, leaf), spec in zip(leaves_with_paths(params), flat, strict=True)
    }
    found = [
        _match(tuple(path.split("/")), np.shape(leaf), known)
        for path, leaf in leaves_with_paths(opt_state)
    ]
    return jax.tree.unflatten(jax.tree.structure(opt_state), found)


def _match(
    path: tuple[str, ...],
    shape: tuple[int, ...],
    known: dict[tuple[str, ...], tuple[tuple[int, ...], P]],
) -> P:
    for start in range(len(path)):
        if path[start:] in known:
            return _fit(shape, *known[path[start:]])
    if ("<root>",) in known:
        return _fit(shape, *known[("<root>",)])
    return P()


def _fit(shape: tuple[int, ...], param_shape: tuple[int, ...], spec: P) -> P:
    """The parameter's spec for a leaf of its shape, or of its shape less one dim."""
    if shape == param_shape:
        return spec
    entries = tuple(spec) + (None,) * (len(param_shape) - len(spec))
    fits = {
        entries[:dim] + entries[dim + 1 :]
        for dim in range(len(param_shape))
        if param_shape[:dim] + param_shape[dim + 1 :] == shape
    }
    return P(*fits.pop()) if len(fits) == 1 else P()
