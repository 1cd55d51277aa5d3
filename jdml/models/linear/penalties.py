"""Penalties and constraints on the weights of a linear model, ``R(w)``.

Each is a frozen object and a pytree whose strengths are leaves, so that a path of strengths is one
compiled program. A constraint is the penalty that is 0 where it holds and infinite elsewhere: its
proximal operator is the projection. Projections are Optax's.

Reference: Parikh & Boyd, "Proximal Algorithms", 2014, chapter 6.
"""

import dataclasses
import math
from typing import ClassVar, dataclass_transform

import jax
import jax.numpy as jnp
from optax import projections


class Penalty:
    """What every penalty has; ``w`` is an array of any shape.

    Attributes:
      name: What the factory is called.
      smooth: Whether it has a gradient everywhere.
      separable: Whether it is a sum over elements, so that one element may be treated by itself.
      constraint: Whether it is a constraint; those have ``project`` and ``lmo``.
    """

    name: ClassVar[str]
    smooth: ClassVar[bool] = False
    separable: ClassVar[bool] = True
    constraint: ClassVar[bool] = False

    @property
    def strong_convexity(self) -> jax.Array | float:
        """The largest μ for which ``R - μ/2 |w|²`` is convex."""
        return 0.0

    def value(self, w: jax.Array) -> jax.Array:
        """``R(w)``, a scalar."""
        raise NotImplementedError

    def gradient(self, w: jax.Array) -> jax.Array:
        """``∇R(w)``; refused unless ``smooth``."""
        raise ValueError(f"{self.name} has no gradient; take a method that uses its prox.")

    def prox(self, v: jax.Array, step: jax.Array | float) -> jax.Array:
        """``argmin_z R(z) + |z - v|² / 2 step``; ``step`` may be an array of ``v``'s shape if
        ``separable``."""
        raise NotImplementedError

    def conjugate(self, u: jax.Array) -> jax.Array:
        """``R*(u) = sup_w <u, w> - R(w)``, a scalar; infinite where there is none."""
        raise NotImplementedError

    def project(self, v: jax.Array) -> jax.Array:
        """The nearest point at which the constraint holds."""
        raise ValueError(f"{self.name} is not a constraint; take its prox.")

    def lmo(self, gradient: jax.Array) -> jax.Array:
        """``argmin_s <gradient, s>`` over the constrained set (Frank-Wolfe's oracle)."""
        raise ValueError(f"{self.name} is not a constraint: there is no set to look through.")


@dataclass_transform(frozen_default=True)
def _pytree(cls):
    """Frozen dataclass whose fields are leaves; unflattening checks nothing."""
    cls = dataclasses.dataclass(frozen=True)(cls)
    names = [field.name for field in dataclasses.fields(cls)]
    return jax.tree_util.register_dataclass(cls, data_fields=names, meta_fields=[])


class _ElasticNet(Penalty):
    l1: float | jax.Array
    l2: float | jax.Array

    @property
    def strong_convexity(self):
        return self.l2

    def value(self, w):
        return self.l1 * jnp.sum(jnp.abs(w)) + self.l2 / 2 * jnp.sum(w * w)

    def prox(self, v, step):
        # Shrinking towards 0 leaves what a box does not hold (Moreau's identity).
        held = projections.projection_box(v, -step * self.l1, step * self.l1)
        return ((v - held) / (1 + step * self.l2)).astype(v.dtype)

    def conjugate(self, u):
        # With l2 = 0, 0/0 within the ball of l1 and x/0 outside of it.
        over = jnp.maximum(jnp.abs(u) - self.l1, 0)
        return jnp.sum(jnp.where(over > 0, over**2 / (2 * self.l2), 0.0))


@_pytree
class NoPenalty(_ElasticNet):
    name = "none"
    smooth = True
    l1 = 0.0
    l2 = 0.0

    def gradient(self, w):
        return jnp.zeros_like(w)

    def conjugate(self, u):
        return jnp.where(jnp.any(u != 0), jnp.inf, 0.0).astype(u.dtype)


@_pytree
class L2(_ElasticNet):
    l2: float | jax.Array
    name = "l2"
    smooth = True
    l1 = 0.0

    def gradient(self, w):
        return self.l2 * w


@_pytree
class L1(_ElasticNet):
    l1: float | jax.Array
    name = "l1"
    l2 = 0.0

    def conjugate(self, u):
        outside = jnp.any(jnp.abs(u) > self.l1 * (1 + 16 * jnp.finfo(u.dtype).eps))
        return jnp.where(outside, jnp.inf, 0.0).astype(u.dtype)


@_pytree
class ElasticNet(_ElasticNet):
    l1: float | jax.Array
    l2: float | jax.Array
    name = "elastic_net"


class _Constraint(Penalty):
    constraint = True

    def value(self, w):
        slack = jnp.sqrt(jnp.finfo(w.dtype).eps)
        off = jnp.max(jnp.abs(w - self.project(w)), initial=0.0)
        return jnp.where(off <= slack * (1 + jnp.max(jnp.abs(w), initial=0.0)), 0.0, jnp.inf)

    def prox(self, v, step):
        return self.project(v)

    def conjugate(self, u):
        return jnp.vdot(u, self.lmo(-u))


@_pytree
class Box(_Constraint):
    low: float | jax.Array
    high: float | jax.Array
    name = "box"

    def project(self, v):
        return projections.projection_box(v, self.low, self.high).astype(v.dtype)

    def lmo(self, gradient):
        corner = jnp.where(gradient > 0, self.low, self.high)
        return jnp.where(gradient == 0, jnp.clip(0.0, self.low, self.high), corner).astype(
            gradient.dtype
        )

    def conjugate(self, u):
        # Not <u, lmo(-u)>: 0 times an infinite bound.
        return jnp.sum(jnp.where(u == 0, 0.0, u * jnp.where(u > 0, self.high, self.low)))


@_pytree
class L1Ball(_Constraint):
    radius: float | jax.Array
    name = "l1_ball"
    separable = False

    def project(self, v):
        # Optax's own branches, and a branch outside of jit is compiled at each call.
        onto = jnp.sign(v) * projections.projection_simplex(jnp.abs(v), self.radius)
        return jnp.where(jnp.sum(jnp.abs(v)) <= self.radius, v, onto).astype(v.dtype)

    def lmo(self, gradient):
        flat = gradient.ravel()
        at = jnp.argmax(jnp.abs(flat))
        corner = jnp.where(flat[at] > 0, -self.radius, self.radius).astype(flat.dtype)
        return jnp.zeros_like(flat).at[at].set(corner).reshape(gradient.shape)


@_pytree
class Simplex(_Constraint):
    radius: float | jax.Array
    name = "simplex"
    separable = False

    def project(self, v):
        return projections.projection_simplex(v, self.radius).astype(v.dtype)

    def lmo(self, gradient):
        flat = gradient.ravel()
        corner = jnp.zeros_like(flat).at[jnp.argmin(flat)].set(self.radius)
        return corner.reshape(gradient.shape)


def none() -> NoPenalty:
    """``R = 0``."""
    return NoPenalty()


def l2(strength: float) -> L2:
    """``R = strength/2 |w|²``, ``strength >= 0``."""
    return L2(_strength("l2", strength))


def l1(strength: float) -> L1:
    """``R = strength |w|_1``, ``strength >= 0``."""
    return L1(_strength("l1", strength))


def elastic_net(l1: float, l2: float) -> ElasticNet:
    """``R = l1 |w|_1 + l2/2 |w|²``, both >= 0."""
    return ElasticNet(_strength("elastic_net's l1", l1), _strength("elastic_net's l2", l2))


def box(low: float, high: float) -> Box:
    """Every element within ``[low, high]``; a bound may be infinite, save for Frank-Wolfe."""
    if not low <= high:
        raise ValueError(f"box({low}, {high}): expected low <= high.")
    return Box(float(low), float(high))


def non_negative() -> Box:
    """Every element at least 0."""
    return box(0.0, math.inf)


def l1_ball(radius: float) -> L1Ball:
    """``|w|_1 <= radius``.

    Reference of the projection: Duchi et al., "Efficient Projections onto the l1-Ball for Learning
    in High Dimensions", ICML 2008.
    """
    return L1Ball(_radius("l1_ball", radius))


def simplex(radius: float = 1.0) -> Simplex:
    """``w >= 0`` with ``Σ w = radius``; source as l1_ball."""
    return Simplex(_radius("simplex", radius))


def _strength(name: str, strength: float) -> float:
    if not (math.isfinite(strength) and strength >= 0):
        raise ValueError(f"the strength of {name} is {strength}; expected a number >= 0.")
    return float(strength)


def _radius(name: str, radius: float) -> float:
    if not (math.isfinite(radius) and radius > 0):
        raise ValueError(f"{name}(radius={radius}): expected a number > 0.")
    return float(radius)
