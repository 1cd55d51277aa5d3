"""What a problem offers and a method is; ``solve`` brings the two together.

A method is a frozen dataclass with ``init`` and ``step``, pure functions of the problem and a
state, and ``measure``, what can be said of the state: the objective and a **certificate**, a number
that is 0 at a minimum and tells how far from it one is at most in its terms (the gradient's norm,
the duality gap). ``solve`` takes steps until the certificate is at most ``tol``.
"""

from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp

Params = Any
State = Any


class Problem(Protocol):
    """``P(w, b) = (1/n) Σ_i s_i φ(a_i, y_i) + R(w)`` with ``a = X w + b`` and Σ s = n, a pytree.

    ``jdml.models.linear.LinearProblem`` is one. Parameters are a NamedTuple with leaves ``w`` and
    ``b`` (None without an intercept).
    """

    rows: Any
    y: jax.Array
    loss: Any
    penalty: Any
    sample_weight: jax.Array
    intercept: bool

    @property
    def num_samples(self) -> int: ...
    @property
    def dtype(self) -> Any: ...
    def init(self) -> Params: ...
    def margins(self, params: Params) -> jax.Array: ...
    def pull(self, v: jax.Array) -> Params: ...
    def loss_at(self, margins: jax.Array) -> jax.Array: ...
    def slopes(self, margins: jax.Array) -> jax.Array: ...
    def value(self, params: Params) -> jax.Array: ...
    def loss_and_gradient(self, params: Params) -> tuple[jax.Array, Params]: ...
    def value_and_gradient(self, params: Params) -> tuple[jax.Array, Params]: ...
    def curvature_product(self, margins: jax.Array, change: Params) -> Params: ...
    def hessian(self, margins: jax.Array) -> jax.Array: ...
    def prox(self, params: Params, step: jax.Array | float) -> Params: ...


class Method:
    """What every method has; a method is a frozen dataclass, so that equal ones share a program.

    Attributes:
      name: What the factory is called.
      certificate: What ``measure`` certifies with, in words.
      order, sampling, space: Where it stands in the taxonomy.
      check_every: Steps between certificates, where a certificate costs more than a step.
    """

    name: ClassVar[str]
    certificate: ClassVar[str]
    order: ClassVar[str]
    sampling: ClassVar[str]
    space: ClassVar[str] = "primal"

    def check_every(self, problem: Problem) -> int:
        return 1

    @classmethod
    def refusal(cls, problem: Problem) -> str | None:
        """Why a method of this class cannot do the problem; None if it can."""
        raise NotImplementedError

    def check(self, problem: Problem) -> None:
        """Raises ``ValueError`` if the method cannot do the problem, naming those that can."""
        reason = self.refusal(problem)
        if reason is not None:
            able = ", ".join(methods_for(problem)) or "none"
            raise ValueError(
                f"{self.name} cannot do a {problem.loss.name} loss with penalty "
                f"{problem.penalty.name}: {reason}. Methods that can: {able}."
            )

    def init(self, problem: Problem, params: Params) -> State:
        """The state before the first step; traced."""
        raise NotImplementedError

    def seeded(self, state: State) -> State:
        """The first state with the seed in it; not traced, so that seeds share a program.

        A method that draws keeps its seed in a field that is not compared, its key in the state.
        """
        return state

    def step(self, problem: Problem, state: State) -> State:
        """One step; traced."""
        raise NotImplementedError

    def measure(self, problem: Problem, state: State) -> tuple[jax.Array, jax.Array]:
        """``(objective, certificate)`` of a state, scalars; traced."""
        raise NotImplementedError

    def params(self, problem: Problem, state: State) -> Params:
        """The answer that a state holds; traced."""
        return state.params


def known_methods() -> list[type[Method]]:
    """The classes of all methods imported from jdml, by name."""

    def below(cls):
        for sub in cls.__subclasses__():
            yield from below(sub)
            if "name" in vars(sub) and sub.__module__.startswith("jdml."):
                yield sub

    return sorted(set(below(Method)), key=lambda cls: cls.name)


def methods_for(problem: Problem) -> list[str]:
    """Names of the methods that can do a problem."""
    return [cls.name for cls in known_methods() if cls.refusal(problem) is None]


def smooth_refusal(problem: Problem) -> str | None:
    """Why the objective as a whole has no gradient; None if it has."""
    if not problem.loss.differentiable:
        return f"the {problem.loss.name} loss has no gradient at its corner"
    if not problem.penalty.smooth:
        return f"the penalty {problem.penalty.name} has no gradient everywhere"
    return None


def proximal_refusal(problem: Problem) -> str | None:
    """Why the mean loss has no gradient; the penalty may have none, for every one has a prox."""
    if not problem.loss.differentiable:
        return f"the {problem.loss.name} loss has no gradient at its corner"
    return None


def bounded_refusal(problem: Problem) -> str | None:
    """As ``proximal_refusal``, for methods whose step wants a bound on the curvature."""
    if problem.loss.smoothness is None and problem.loss.differentiable:
        return f"the curvature of the {problem.loss.name} loss has no bound to take a step from"
    return proximal_refusal(problem)


def norm(tree: Params) -> jax.Array:
    """``|·|_2`` over all leaves."""
    return jnp.sqrt(dot(tree, tree))


def dot(a: Params, b: Params) -> jax.Array:
    """``<a, b>`` over all leaves."""
    products = jax.tree.map(jnp.vdot, a, b)
    return sum(jax.tree.leaves(products))  # type: ignore[return-value]


def add(a: Params, scale: jax.Array | float, b: Params) -> Params:
    """``a + scale b``, leaf by leaf."""
    return jax.tree.map(lambda x, y: x + scale * y, a, b)


def stationarity(problem: Problem, params: Params, gradient: Params, step: Any = 1.0) -> jax.Array:
    """How far parameters are from a minimum, by the gradient of the mean loss there.

    ``|∇P|`` where the penalty is smooth, else the prox-gradient norm
    ``|p - prox(p - step ∇f)| / step``; both are 0 at minima alone.
    """
    if problem.penalty.smooth:
        return norm(gradient._replace(w=gradient.w + problem.penalty.gradient(params.w)))
    moved = problem.prox(add(params, -step, gradient), step)
    return norm(add(params, -1.0, moved)) / step
