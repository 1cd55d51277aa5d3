"""Tables read by rows: parameters that a function indexes by numbers it is given.

Inside a region that is manual over one axis, where two more are automatic, XLA's partitioner ends
the process on such a read, for it cannot divide both the table's rows and what they are read for.
So the stages put these tables together before their first tick.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import Literal
from jax.sharding import PartitionSpec as P

from jdml.sharding.constrain import automatic_axes

PyTree = Any
Leaves = frozenset[int]


def tables(f: Callable[..., Any], others: PyTree, *arguments: PyTree) -> Leaves:
    """Indices of the leaves of ``others`` that ``f(others, *arguments)`` gathers from.

    Or that it makes of them what it gathers from, as logits are of a head's kernel.
    """
    traced = jax.make_jaxpr(f)(others, *arguments).jaxpr
    num_leaves = len(jax.tree.leaves(others))
    made_of = [frozenset({i}) if i < num_leaves else _NONE for i in range(len(traced.invars))]
    return _follow(traced, made_of)[0]


def put_together(others: PyTree, indices: Leaves) -> PyTree:
    """These leaves whole on every device where the partitioner has two axes to divide them over."""
    if len(automatic_axes()) < 2:
        return others
    leaves, treedef = jax.tree.flatten(others)
    for i in indices:
        leaves[i] = jax.lax.with_sharding_constraint(leaves[i], P())
    return jax.tree.unflatten(treedef, leaves)


_NONE: Leaves = frozenset()
_READS = ("gather", "dynamic_slice")


def _follow(jaxpr: Any, made_of: list[Leaves]) -> tuple[Leaves, list[Leaves]]:
    """``(leaves gathered from, leaves of which each result is made)``."""
    known = dict(zip(jaxpr.invars, made_of, strict=True))
    found = _NONE

    def leaves_of(variables: list[Any]) -> list[Leaves]:
        return [_NONE if isinstance(v, Literal) else known.get(v, _NONE) for v in variables]

    for eqn in jaxpr.eqns:
        name, inputs = eqn.primitive.name, leaves_of(eqn.invars)
        if name in _READS:
            found |= inputs[0]
        if name in _READS or name == "shard_map":  # no partitioner divides what is in a region
            continue
        bodies = [(body, inputs[1:]) for body in eqn.params.get("branches", ())]
        bodies += [(eqn.params[k], inputs) for k in ("jaxpr", "call_jaxpr") if k in eqn.params]
        results = [_NONE if bodies else _NONE.union(*inputs)] * len(eqn.outvars)
        for closed, given in bodies:
            body = getattr(closed, "jaxpr", closed)
            if (len(body.invars), len(body.outvars)) != (len(given), len(results)):
                results = [_NONE.union(*inputs)] * len(results)
                continue
            read, made = _follow(body, given)
            found |= read
            results = [a | b for a, b in zip(results, made, strict=True)]
        known |= dict(zip(eqn.outvars, results, strict=True))
    return found, leaves_of(jaxpr.outvars)
