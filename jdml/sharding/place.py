"""Placing arrays: existing ones by ``shard``, new ones by ``init``, never whole anywhere.

``init`` compiles the function that makes the model with the layout of its outputs fixed, so XLA
computes on each device only the part that this device keeps. JAX's default random numbers depend
on the position in the array, not on the device: one seed gives the same parameters on every mesh.
(Not so the ``rbg`` generator. And what XLA cannot divide, it computes whole: the QR decomposition
of an orthogonal initialiser.)
"""

import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jdml.sharding.fit import Note, fit, log_notes, padded_shape, require_auto, shape_of
from jdml.sharding.paths import as_pytree, broadcast_specs, leaves_with_paths
from jdml.sharding.rules import OnIndivisible, Rules, valid_policy
from jdml.sharding.specs import plan

PyTree = Any

_log = logging.getLogger("jdml.sharding")


def shardings(specs: PyTree, mesh: Mesh) -> PyTree:
    """The specs as ``NamedSharding`` on the mesh, for ``jit``'s ``in_`` and ``out_shardings``."""
    made: dict[P, NamedSharding] = {}

    def named(spec: P) -> NamedSharding:
        if spec not in made:
            made[spec] = NamedSharding(mesh, spec)
        return made[spec]

    return jax.tree.map(named, specs, is_leaf=lambda x: isinstance(x, P))


def shard(
    tree: PyTree, mesh: Mesh, specs: PyTree, on_indivisible: OnIndivisible = "error"
) -> PyTree:
    """The tree with every leaf placed as its spec says.

    Args:
      tree: arrays on any devices or on the host; an NNX module comes back as a new module.
      mesh: where to.
      specs: in the structure of the tree (of ``nnx.state(module)``), or a prefix of it.
      on_indivisible: ``"replicate"`` leaves a dim whole that its axes do not divide, ``"pad"``
        appends zeros to it; both are logged.

    Raises:
      ValueError: naming the leaf and the dim that the mesh does not divide.
    """
    require_auto(mesh)
    valid_policy(on_indivisible)
    if isinstance(tree, nnx.Pytree):
        graphdef, state = nnx.split(tree)
        with nnx.use_eager_sharding(False):
            return nnx.merge(graphdef, shard(state, mesh, specs, on_indivisible))
    notes: list[Note] = []
    leaves, placed = [], []
    for (path, leaf), spec in zip(
        leaves_with_paths(tree), broadcast_specs(specs, tree), strict=True
    ):
        spec = fit(path, shape_of(leaf), P() if spec is None else spec, mesh, on_indivisible, notes)
        leaves.append(_pad(leaf, padded_shape(shape_of(leaf), spec, mesh)))
        placed.append(NamedSharding(mesh, spec))
    log_notes(notes)
    return jax.tree.unflatten(jax.tree.structure(tree), jax.device_put(leaves, placed))


def init(
    make_model: Callable[..., Any],
    mesh: Mesh,
    rules: Rules | Callable[[PyTree], PyTree],
    *args: Any,
    on_indivisible: OnIndivisible | None = None,
) -> Any:
    """What ``make_model(*args)`` returns, created in shards: no device or host holds it whole.

    Args:
      make_model: returns an NNX module, Linen variables (boxes are kept), or any pytree of arrays;
        it is traced, so it must do without Python side effects.
      mesh: the mesh to create it on.
      rules: logical names → mesh axes; or a function from the abstract result to its specs, as for
        an optimiser state: ``lambda state: optimizer_specs(state, params, param_specs)``.
      *args: passed on, traced: a random key given here is an argument of the compiled program and
        no constant in it, so that a compilation cache serves every seed.
      on_indivisible: overrides that of the rules.
    """
    jitted, finish = _compile_init(make_model, mesh, rules, args, on_indivisible)
    with nnx.use_eager_sharding(False):
        return finish(jitted(*args))


def lower_init(
    make_model: Callable[..., Any],
    mesh: Mesh,
    rules: Rules | Callable[[PyTree], PyTree],
    *args: Any,
    on_indivisible: OnIndivisible | None = None,
) -> jax.stages.Lowered:
    """The program of ``init``, to read its memory use before anything is allocated.

    ``lower_init(...).compile().memory_analysis()`` gives bytes per device.
    """
    jitted, _ = _compile_init(make_model, mesh, rules, args, on_indivisible)
    with nnx.use_eager_sharding(False):
        return jitted.lower(*args)


def unpad(tree: PyTree, like: PyTree) -> PyTree:
    """The tree without what ``on_indivisible="pad"`` appended.

    Args:
      tree: arrays, padded.
      like: the same structure with the shapes to return to.
    """
    tree, like = as_pytree(tree), as_pytree(like)

    def cut(x: Any, target: Any) -> Any:
        return x[tuple(slice(size) for size in shape_of(target))] if x.ndim else x

    return jax.tree.map(cut, tree, like)


def _compile_init(
    make_model: Callable[..., Any],
    mesh: Mesh,
    rules: Rules | Callable[[PyTree], PyTree],
    args: tuple[Any, ...],
    on_indivisible: OnIndivisible | None,
) -> tuple[Any, Callable[[PyTree], Any]]:
    """The jitted function that makes the leaves, and what turns its result into the model."""
    require_auto(mesh)
    graphdefs: list[Any] = []

    def make(*args: Any) -> PyTree:
        model = make_model(*args)
        if isinstance(model, nnx.Pytree):
            graphdef, model = nnx.split(model)
            graphdefs[:] = [graphdef]
        return model

    with nnx.use_eager_sharding(False):
        abstract = jax.eval_shape(make, *args)
    if isinstance(rules, Rules):
        specs, notes = plan(abstract, mesh, rules, on_indivisible)
        log_notes(list(notes))
    else:
        specs = rules(abstract)
    flat = broadcast_specs(specs, abstract)
    padding = on_indivisible or (rules.on_indivisible if isinstance(rules, Rules) else "error")
    for (path, leaf), spec in zip(leaves_with_paths(abstract), flat, strict=True):
        fit(path, leaf.shape, spec, mesh, padding)
    shapes = [
        padded_shape(leaf.shape, spec, mesh)
        for leaf, spec in zip(jax.tree.leaves(abstract), flat, strict=True)
    ]

    def make_padded(*args: Any) -> PyTree:
        leaves, treedef = jax.tree.flatten(make(*args))
        return jax.tree.unflatten(
            treedef, [_pad(x, s) for x, s in zip(leaves, shapes, strict=True)]
        )

    placed = jax.tree.unflatten(
        jax.tree.structure(abstract), [NamedSharding(mesh, spec) for spec in flat]
    )
    jitted = jax.jit(make_padded, out_shardings=placed)
    return jitted, lambda state: nnx.merge(graphdefs[0], state) if graphdefs else state


def _pad(x: Any, shape: tuple[int, ...]) -> Any:
    """``x`` with zeros appended up to ``shape``; host arrays stay on the host."""
    if shape_of(x) == shape:
        return x
    pad = np.pad if isinstance(x, np.ndarray) else jnp.pad
    return pad(x, [(0, new - old) for old, new in zip(x.shape, shape, strict=True)])
