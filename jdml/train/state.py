"""The training state, and where each of its leaves lives.

A leaf whose JAX type varies over the worker axis after a step differs from worker to worker: it is
stored with a leading worker dim, sharded over that axis. Every other leaf is stored once. Nothing
is declared: one abstract step, repeated until nothing changes, tells which are which. Where several
axes make up the workers, a leaf that varies over one of them is stored for every worker.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from jdml.communicate.wire import per_worker, varies
from jdml.sharding.fit import axes_of, num_parts
from jdml.sharding.paths import leaves_with_paths
from jdml.train.validate import Axis

PyTree = Any


class TrainState(NamedTuple):
    """Everything that a run needs to go on: a pytree of arrays.

    Attributes:
      step: int32 ``[]``, number of steps taken.
      params: The trained parameters; a per-worker leaf has a leading worker dim.
      opt_state: The Optax state (moments, residuals, anchors, dual variables), likewise.
      model_state: What the model updates without gradients (batch statistics); ``()`` if none.
      key: Typed PRNG key ``[]`` from which each step's keys are derived.
    """

    step: Any
    params: PyTree
    opt_state: PyTree
    model_state: PyTree
    key: Any


class WorkerRegion(NamedTuple):
    """A ``shard_map`` that is manual over the worker axis (or axes) alone."""

    mesh: Mesh
    axis: Axis

    def run(
        self, f: Callable[..., PyTree], args: PyTree, arg_flags: PyTree, out_flags: PyTree
    ) -> PyTree:
        """``f(*args)`` on every worker; flagged leaves carry the leading worker dim outside."""

        def body(*stacked: PyTree) -> PyTree:
            outputs = f(*self._unstack(stacked, arg_flags))
            return jax.tree.map(
                lambda x, flag: per_worker(x, self.axis)[None] if flag else x, outputs, out_flags
            )

        return jax.shard_map(
            body,
            mesh=self.mesh,
            in_specs=self._specs(arg_flags),
            out_specs=self._specs(out_flags),
            axis_names=set(axes_of(self.axis)),
        )(*args)

    def trace(
        self, f: Callable[..., PyTree], args: PyTree, arg_flags: PyTree
    ) -> tuple[PyTree, PyTree]:
        """Shapes of ``f``'s outputs on one worker, and which of them vary over the workers."""
        seen: list[PyTree] = []

        def body(*stacked: PyTree) -> tuple[()]:
            outputs = f(*self._unstack(stacked, arg_flags))
            seen.append(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), outputs))
            seen.append(jax.tree.map(lambda x: varies(x, self.axis), outputs))
            return ()

        mapped = jax.shard_map(
            body,
            mesh=self.mesh,
            in_specs=self._specs(arg_flags),
            out_specs=(),
            axis_names=set(axes_of(self.axis)),
        )
        num_workers = num_parts(self.axis, self.mesh)
        jax.eval_shape(mapped, *stack_shapes(args, arg_flags, num_workers))
        shapes, flags = seen
        return shapes, flags

    def _specs(self, flags: PyTree) -> PyTree:
        return jax.tree.map(lambda f: PartitionSpec(self.axis) if f else PartitionSpec(), flags)

    @staticmethod
    def _unstack(stacked: PyTree, flags: PyTree) -> PyTree:
        return jax.tree.map(lambda x, flag: x[0] if flag else x, stacked, flags)


def stack_shapes(tree: PyTree, flags: PyTree, num_workers: int) -> PyTree:
    """Adds the leading worker dim to the shapes of flagged leaves."""

    def stack(x: Any, flag: bool) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((num_workers, *x.shape) if flag else x.shape, x.dtype)

    return jax.tree.map(stack, tree, flags)


def find_storage(
    region: WorkerRegion,
    init: Callable[[PyTree], PyTree],
    update: Callable[[PyTree, PyTree, PyTree], tuple[PyTree, PyTree]],
    params: PyTree,
) -> tuple[PyTree, PyTree, PyTree]:
    """Which leaves of the parameters and of the optimiser state differ from worker to worker.

    Args:
      region: Where both functions run.
      init: ``params -> opt_state`` on one worker.
      update: ``(gradients, params, opt_state) -> (params, opt_state)`` on one worker.
      params: Shapes and dtypes of the parameters.

    Returns:
      ``(opt_state shapes, params flags, opt_state flags)``; a flag is True for a per-worker leaf.

    Raises:
      ValueError: a leaf changes shape or dtype over a step; names it.
    """
    params_flags = jax.tree.map(lambda _: False, params)
    always = jax.tree.map(lambda _: True, params)
    opt_state, opt_flags = region.trace(init, (params,), (params_flags,))
    while True:
        shapes, flags = region.trace(
            update, (params, params, opt_state), (always, params_flags, opt_flags)
        )
        _check_stable((params, opt_state), shapes)
        grown = jax.tree.map(lambda a, b: a or b, (params_flags, opt_flags), flags)
        if grown == (params_flags, opt_flags):
            return opt_state, params_flags, opt_flags
        params_flags, opt_flags = grown


def _check_stable(before: PyTree, after: PyTree) -> None:
    for name, old, new in zip(("params", "opt_state"), before, after, strict=True):
        structures: list[Any] = [jax.tree.structure(old), jax.tree.structure(new)]
        if structures[0] != structures[1]:
            raise ValueError(
                f"The transformation's update changed the structure of {name}: {structures[0]} "
                f"before, {structures[1]} after. Its state must keep one structure."
            )
        for (path, x), (_, y) in zip(leaves_with_paths(old), leaves_with_paths(new), strict=True):
            if (x.shape, x.dtype) != (y.shape, y.dtype):
                raise ValueError(
                    f"{name} leaf {path!r} is {x.dtype}{list(x.shape)} before a step and "
                    f"{y.dtype}{list(y.shape)} after it. A transformation's update must keep "
                    "shapes and dtypes; cast the new value."
                )


def strong(tree: PyTree) -> PyTree:
    """The same values without weak types, which would make the second step compile anew."""
    return jax.tree.map(lambda x: jax.lax.convert_element_type(x, jnp.result_type(x)), tree)
