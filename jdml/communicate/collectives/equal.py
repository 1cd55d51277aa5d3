"""Telling JAX's types what the bits already are: equal on every worker.

Where each worker decodes the same bytes, its result equals the others' bit for bit, and may leave a
``shard_map`` as one array. The types see that after an all-gather or a sum; after permutations they
do not, and JAX has no operation that says so without sending something.
"""

from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from jdml.communicate.wire import varying_axes


def claim_equal(x: jax.Array, axis: str | tuple[str, ...]) -> jax.Array:
    """``x``, typed as unvarying over ``axis``; costs nothing and sends nothing.

    The caller answers for it: were the workers' bits to differ, each would go on with its own.
    """
    names = (axis,) if isinstance(axis, str) else axis
    varying = varying_axes(x) & set(names)
    return _claim.bind(x, axes=tuple(sorted(varying))) if varying else x


def _typed(aval: Any, *, axes: tuple[str, ...]) -> Any:
    mat = aval.mat
    return aval.update(manual_axis_type=mat.update(varying=mat.varying - set(axes)))


_claim = Primitive("claim_equal")
_claim.def_impl(lambda x, *, axes: x)
_claim.def_abstract_eval(_typed)
mlir.register_lowering(_claim, lambda ctx, x, *, axes: [x])
batching.defvectorized(_claim)
