"""Placing arrays: existing ones by ``shard``, new ones by ``init``, never whole anywhere."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jdml.sharding.paths import leaves_with_paths
from jdml.sharding.rules import Rules
from jdml.sharding.specs import check_fits
from jdml.sharding.specs import specs as specs_of

PyTree = Any


def shardings(specs: PyTree, mesh: Mesh) -> PyTree:
    """The specs as ``NamedSharding``s on the mesh."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=_is_spec)


def shard(tree: PyTree, mesh: Mesh, specs: PyTree) -> PyTree:
    """The tree with every leaf placed as its spec says; an NNX module comes back as one.

    Raises:
      ValueError: naming the leaf and dim that the mesh does not divide.
    """
    if isinstance(tree, nnx.Module):
        graphdef, state = nnx.split(tree)
        with nnx.use_eager_sharding(False):
            return nnx.merge(graphdef, shard(state, mesh, specs))
    leaves, treedef = jax.tree.flatten(tree)
    flat = broadcast(specs, tree)
    for (path, leaf), spec in zip(leaves_with_paths(tree), flat, strict=True):
        check_fits(path, np.shape(leaf), spec, mesh)
    return jax.tree.unflatten(
        treedef, jax.device_put(leaves, [NamedSharding(mesh, s) for s in flat])
    )


def broadcast(specs: PyTree, tree: PyTree) -> list[P]:
    """One spec per leaf of the tree; one spec may stand for a whole subtree."""
    flat: list[P] = []
    jax.tree.map(
        lambda s, sub: flat.extend([s] * len(jax.tree.leaves(sub))), specs, tree, is_leaf=_is_spec
    )
    return flat


def init(make_model: Callable[..., Any], mesh: Mesh, rules: Rules, *args: Any) -> Any:
    """What ``make_model(*args)`` returns, created in shards: no device or host holds it whole.

    Args:
      make_model: returns an NNX module, Linen variables, or any pytree of arrays; runs under jit.
      mesh: the mesh to create it on.
      rules: logical names → mesh axes.
      *args: passed on; a random key given here is traced, so a new seed needs no new compile.
    """
    graphdefs: list[Any] = []

    def build(*args: Any) -> PyTree:
        model = make_model(*args)
        if isinstance(model, nnx.Module):
            graphdef, model = nnx.split(model)
            graphdefs.append(graphdef)
        return model

    with nnx.use_eager_sharding(False):
        abstract = jax.eval_shape(build, *args)
        placed = shardings(specs_of(abstract, mesh, rules), mesh)
        state = jax.jit(build, out_shardings=placed)(*args)
        return nnx.merge(graphdefs[0], state) if graphdefs else state


def _is_spec(x: Any) -> bool:
    return isinstance(x, P)
