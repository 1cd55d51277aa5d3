"""One layer's forward and backward as separate functions, and what must be kept between them.

``jax.vjp`` gives a pullback whose leaves are all that the backward pass needs. Of these,

- parameters, and whatever is made of them, the batch and the key alone (a kernel cast to bfloat16,
  a dropout mask, a causal mask), are not kept: the backward pass has those and makes it again;
- what depends on the layer's input is kept.

Splitting the backward pass is a cut through its equations: those that the input's gradient needs
are ``B``; those that only the parameters' gradient needs are ``W``. Values that B computes and W
uses cross from one to the other. Nothing is computed twice but what comes of parameters, batch and
key. An equation that makes both, such as a ``jax.lax.scan`` over parameters, belongs to B whole;
calls and ``jax.checkpoint`` are opened first.

Reference: Qi et al., "Zero bubble pipeline parallelism", 2023, split what each layer's backward
does by hand.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend.core import Literal

PyTree = Any
Leaves = list[Any]
_OPENED = frozenset({"jit", "pjit", "closed_call", "core_call", "checkpoint", "remat", "remat2"})


class Layer(NamedTuple):
    """The functions of a layer; leaves that are kept are lists of arrays.

    Attributes:
      forward: ``(params, x, extras) -> (y, kept, kept_for_w)``.
      backward: ``(params, extras, kept, dy) -> (dx, dparams)``, unsplit: ``kept_for_w`` is empty.
      backward_input: ``(params, extras, kept, kept_for_w, dy) -> (dx, crossing)``.
      backward_params: ``(params, extras, kept_for_w, crossing) -> dparams``.
      kept, kept_for_w, crossing: Shapes and dtypes of what is kept from F to B, from F to W, and
        from B to W.
    """

    forward: Callable[..., tuple[PyTree, Leaves, Leaves]]
    backward: Callable[..., tuple[PyTree, PyTree]]
    backward_input: Callable[..., tuple[PyTree, Leaves]]
    backward_params: Callable[..., PyTree]
    kept: list[jax.ShapeDtypeStruct]
    kept_for_w: list[jax.ShapeDtypeStruct]
    crossing: list[jax.ShapeDtypeStruct]


def make_layer(
    apply: Callable[[PyTree, PyTree, PyTree], PyTree],
    params: PyTree,
    x: PyTree,
    extras: PyTree,
    split: bool,
) -> Layer:
    """Traces ``y = apply(params, x, extras)`` once and takes it apart.

    Args:
      apply: One layer.
      params: One layer's parameters: arrays, or their shapes and dtypes.
      x: Its input; ``y`` has the same structure, shapes and dtypes.
      extras: What is at hand in the backward pass too (batch, key); not differentiated.
      split: Whether B and W are separate; else everything kept is in ``kept``.
    """
    pullback: list[Any] = []

    def with_pullback(params: PyTree, x: PyTree, extras: PyTree) -> tuple[PyTree, Leaves]:
        y, pull = jax.vjp(lambda params, x: apply(params, x, extras), params, x)
        leaves, treedef = jax.tree.flatten(pull)
        pullback[:] = [treedef]
        return y, leaves

    traced = jax.make_jaxpr(with_pullback)(params, x, extras)
    (treedef,) = pullback
    x_leaves, x_tree = jax.tree.flatten(x)
    p_leaves, p_tree = jax.tree.flatten(params)
    num_p, num_x = len(p_leaves), len(x_leaves)
    graph = _Graph(traced)
    x_vars = graph.invars[num_p : num_p + num_x]
    given_vars = graph.invars[:num_p] + graph.invars[num_p + num_x :]
    y_vars, residuals = graph.outvars[:num_x], graph.outvars[num_x:]
    of_input = graph.reached_from(x_vars)
    stored = list(dict.fromkeys(v for v in residuals if not _is_literal(v) and v in of_input))
    remade = graph.needed_for([v for v in residuals if _is_literal(v) or v not in of_input], ())

    def backward_flat(given: Leaves, kept: Leaves, dy: Leaves) -> tuple[Leaves, Leaves]:
        env = graph.run(remade, given_vars, given) | dict(zip(stored, kept, strict=True))
        pull = jax.tree.unflatten(treedef, [_read(env, v) for v in residuals])
        dparams, dx = pull(jax.tree.unflatten(x_tree, dy))
        return jax.tree.leaves(dx), jax.tree.leaves(dparams)

    shapes = [_shape(v) for v in stored]
    given_leaves = p_leaves + jax.tree.leaves(extras)
    back = _Graph(_opened(backward_flat, given_leaves, shapes, x_leaves))
    num_given = len(given_leaves)
    back_given = back.invars[:num_given]
    back_stored = back.invars[num_given : num_given + len(stored)]
    back_dy = back.invars[num_given + len(stored) :]
    dx_vars, dp_vars = back.outvars[:num_x], back.outvars[num_x:]
    b_eqns = back.needed_for(dx_vars, ())
    # What B makes of more than parameters, batch and key is handed over; the rest W makes again.
    not_given = back.reached_from(back_stored + back_dy)
    made_by_b = {v for i in b_eqns for v in back.eqns[i].outvars} & not_given
    w_eqns = back.needed_for(dp_vars, made_by_b)
    used_by_w = back.inputs_of(w_eqns, dp_vars)
    handed = made_by_b.union(back_dy) if split else set()
    crossing = [v for v in used_by_w if v in handed]
    for_w = [s for s, v in zip(stored, back_stored, strict=True) if split and v in used_by_w]
    for_b = [s for s in stored if s not in set(for_w)]
    inside = dict(zip(stored, back_stored, strict=True))

    def given_of(params: PyTree, extras: PyTree) -> Leaves:
        return jax.tree.leaves(params) + jax.tree.leaves(extras)

    def forward(params: PyTree, x: PyTree, extras: PyTree) -> tuple[PyTree, Leaves, Leaves]:
        arguments = jax.tree.leaves(params) + jax.tree.leaves(x) + jax.tree.leaves(extras)
        needed = graph.needed_for([*y_vars, *stored], ())
        env = graph.run(needed, graph.invars, arguments)
        y = jax.tree.unflatten(x_tree, [_read(env, v) for v in y_vars])
        return y, [env[v] for v in for_b], [env[v] for v in for_w]

    def backward(params: PyTree, extras: PyTree, kept: Leaves, dy: PyTree) -> tuple[PyTree, PyTree]:
        flat_dx, flat_dp = backward_flat(given_of(params, extras), kept, jax.tree.leaves(dy))
        return jax.tree.unflatten(x_tree, flat_dx), jax.tree.unflatten(p_tree, flat_dp)

    def backward_input(
        params: PyTree, extras: PyTree, kept: Leaves, kept_for_w: Leaves, dy: PyTree
    ) -> tuple[PyTree, Leaves]:
        names = back_given + [inside[v] for v in for_b + for_w] + back_dy
        values = given_of(params, extras) + kept + kept_for_w + jax.tree.leaves(dy)
        env = back.run(b_eqns, names, values)
        dx = jax.tree.unflatten(x_tree, [_read(env, v) for v in dx_vars])
        return dx, [env[v] for v in crossing]

    def backward_params(
        params: PyTree, extras: PyTree, kept_for_w: Leaves, crossed: Leaves
    ) -> PyTree:
        names = back_given + [inside[v] for v in for_w] + crossing
        env = back.run(w_eqns, names, given_of(params, extras) + kept_for_w + crossed)
        return jax.tree.unflatten(p_tree, [_read(env, v) for v in dp_vars])

    return Layer(
        forward,
        backward,
        backward_input,
        backward_params,
        [_shape(v) for v in for_b],
        [_shape(v) for v in for_w],
        [_shape(v) for v in crossing],
    )


class _Graph:
    """The equations of a traced function, and which of them depend on what."""

    def __init__(self, traced: Any) -> None:
        self.eqns: list[Any] = list(traced.jaxpr.eqns)
        self.invars: list[Any] = list(traced.jaxpr.invars)
        self.outvars: list[Any] = list(traced.jaxpr.outvars)
        self.consts = dict(zip(traced.jaxpr.constvars, traced.consts, strict=True))

    def reached_from(self, variables: Iterable[Any]) -> set[Any]:
        """These variables and all that is made of them."""
        reached = set(variables)
        for eqn in self.eqns:
            if any(not _is_literal(v) and v in reached for v in eqn.invars):
                reached.update(eqn.outvars)
        return reached

    def needed_for(self, variables: Iterable[Any], known: Iterable[Any]) -> list[int]:
        """Equations, in order, that these variables need where ``known`` ones are at hand."""
        known = set(known)
        wanted = {v for v in variables if not _is_literal(v)} - known
        needed = []
        for i in reversed(range(len(self.eqns))):
            if not wanted.isdisjoint(self.eqns[i].outvars):
                needed.append(i)
                wanted |= {v for v in self.eqns[i].invars if not _is_literal(v)} - known
        return needed[::-1]

    def inputs_of(self, equations: Iterable[int], outputs: Iterable[Any]) -> dict[Any, None]:
        """Variables that these equations and outputs read and the equations do not make."""
        equations = list(equations)
        made = {v for i in equations for v in self.eqns[i].outvars}
        read = [v for i in equations for v in self.eqns[i].invars] + list(outputs)
        return dict.fromkeys(v for v in read if not _is_literal(v) and v not in made)

    def run(
        self, equations: Iterable[int], variables: Sequence[Any], values: Leaves
    ) -> dict[Any, Any]:
        """What the equations make of the values of these variables."""
        env = self.consts | dict(zip(variables, values, strict=True))
        _run([self.eqns[i] for i in equations], env, opened=False)
        return env


def _opened(f: Callable[..., Any], *arguments: PyTree) -> Any:
    """``f`` traced, with the calls in it replaced by what they call."""
    traced = jax.make_jaxpr(f)(*arguments)

    def flat(*values: Any) -> list[Any]:
        env = dict(zip(traced.jaxpr.constvars, traced.consts, strict=True))
        env |= dict(zip(traced.jaxpr.invars, values, strict=True))
        _run(traced.jaxpr.eqns, env, opened=True)
        return [_read(env, v) for v in traced.jaxpr.outvars]

    return jax.make_jaxpr(flat)(*jax.tree.leaves(arguments))


def _run(equations: Iterable[Any], env: dict[Any, Any], opened: bool) -> None:
    """Evaluates equations of a jaxpr in order, as JAX's own interpreter does."""
    for eqn in equations:
        values = [_read(env, v) for v in eqn.invars]
        inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
        if opened and eqn.primitive.name in _OPENED and inner is not None:
            body = getattr(inner, "jaxpr", inner)
            within = dict(zip(body.constvars, getattr(inner, "consts", ()), strict=True))
            within |= dict(zip(body.invars, values, strict=True))
            _run(body.eqns, within, opened)
            results = [_read(within, v) for v in body.outvars]
        else:
            with eqn.ctx.manager:
                params = eqn.primitive.get_bind_params(eqn.params)
                results = eqn.primitive.bind(*values, **params)
            if not eqn.primitive.multiple_results:
                results = [results]
        env.update(zip(eqn.outvars, results, strict=True))


def _read(env: dict[Any, Any], variable: Any) -> Any:
    return variable.val if _is_literal(variable) else env[variable]


def _is_literal(variable: Any) -> bool:
    return isinstance(variable, Literal)


def _shape(variable: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(variable.aval.shape, variable.aval.dtype)
