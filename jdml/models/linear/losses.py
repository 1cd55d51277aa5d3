"""Losses of linear models, ``φ(a, y)`` of a margin ``a = xᵀw + b`` and a label.

Each is a frozen object whose methods work element by element under ``jit``. Those with ``has_dual``
have what dual methods need as well, for the dual problem

    max_α  D(α) = -(1/n) Σ_i φ*(-α_i) - (λ/2) |w(α)|²,   w(α) = (1/λn) Σ_i α_i x_i,

where ``φ*(u) = sup_a (u a - φ(a))`` and ``y`` is fixed.

References: Shalev-Shwartz & Zhang, "Stochastic Dual Coordinate Ascent Methods for Regularized Loss
Minimization", JMLR 2013; McCullagh & Nelder, "Generalized Linear Models", 1989 (Poisson).
"""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt


class Loss:
    """What every loss has; ``margin`` and ``y`` are ``[n]`` unless a loss says otherwise.

    Attributes:
      name: What the factory is called.
      smoothness: The largest curvature ``sup φ''``; None where there is none.
      differentiable: Whether ``derivative`` is a gradient (else a subgradient).
      quadratic: Whether the curvature is one number, whatever the margin and the label.
      has_dual: Whether the methods of the dual problem are there.
      dual_top: ``yα`` is feasible in ``[0, dual_top]``; None where every α is.
      dual_open: Whether the dual's slope is infinite at the ends of that range.
      num_outputs: Margins of a sample; None stands for one, without a dim of its own.
    """

    name: ClassVar[str]
    differentiable: ClassVar[bool] = True
    quadratic: ClassVar[bool] = False
    has_dual: ClassVar[bool] = True
    dual_top: ClassVar[float | None] = 1.0
    dual_open: ClassVar[bool] = False

    @property
    def smoothness(self) -> float | None:
        return None

    @property
    def num_outputs(self) -> int | None:
        return None

    def value(self, margin: jax.Array, y: jax.Array) -> jax.Array:
        """``φ(a, y)``, ``[n]``."""
        raise NotImplementedError

    def derivative(self, margin: jax.Array, y: jax.Array) -> jax.Array:
        """``∂φ/∂a``, in the margin's shape; a subgradient where there is no gradient."""
        raise NotImplementedError

    def curvature(self, margin: jax.Array, y: jax.Array) -> jax.Array:
        """``∂²φ/∂a²``, ``[n]``; where it jumps, one of its two values."""
        raise NotImplementedError

    def curvature_product(self, margin: jax.Array, y: jax.Array, change: jax.Array) -> jax.Array:
        """``∂²φ/∂a² · change``, in the margin's shape."""
        return self.curvature(margin, y) * change

    def conjugate(self, alpha: jax.Array, y: jax.Array) -> jax.Array:
        """``φ*(-α)``, ``[n]``; infinite where α is not feasible, save for rounding."""
        raise self._no_dual()

    def dual_step(
        self, margin: jax.Array, q: jax.Array, alpha: jax.Array, y: jax.Array
    ) -> jax.Array:
        """SDCA's ``Δ``, which takes ``α_i`` to ``α_i + Δ`` and ``w`` to ``w + Δ x_i / λn``.

        It maximises ``-φ*(-(α + Δ)) - a Δ - q Δ² / 2``, where there is a closed form; where there
        is none it is feasible and does not lessen it.

        Args:
          margin: ``a = x_iᵀ w``.
          q: ``|x_i|² / λn``, >= 0.
          alpha: ``α_i``, feasible.
          y: The label.
        """
        raise self._no_dual()

    def dual_slope(self, alpha: jax.Array, y: jax.Array) -> jax.Array:
        """``∂(-φ*(-α)) / ∂α``; less the margin, it is n times the dual's slope along ``α_i``."""
        raise self._no_dual()

    def dual_curvature(self, alpha: jax.Array, y: jax.Array) -> jax.Array:
        """``∂²φ*(-α) / ∂α²``, >= 0."""
        raise self._no_dual()

    def dual_point(self, margin: jax.Array, y: jax.Array) -> jax.Array:
        """``-φ'(a)``, a feasible α, and the best one where the margin is the optimal one."""
        if not self.has_dual:
            raise self._no_dual()
        return -self.derivative(margin, y)

    def check_labels(self, y: npt.ArrayLike) -> None:
        """Raises ``ValueError`` unless the loss takes these labels."""
        raise NotImplementedError

    def _no_dual(self) -> ValueError:
        return ValueError(
            f"{self.name}() has no dual form here; expected one of squared, logistic, hinge, "
            "squared_hinge, smoothed_hinge. Take a primal method for it."
        )


@dataclasses.dataclass(frozen=True)
class Squared(Loss):
    name = "squared"
    quadratic = True
    dual_top = None

    @property
    def smoothness(self) -> float:
        return 2.0

    def value(self, margin, y):
        return (margin - y) ** 2

    def derivative(self, margin, y):
        return 2 * (margin - y)

    def curvature(self, margin, y):
        return jnp.full_like(margin, 2.0)

    def conjugate(self, alpha, y):
        return alpha**2 / 4 - alpha * y

    def dual_slope(self, alpha, y):
        return y - alpha / 2

    def dual_curvature(self, alpha, y):
        return jnp.full_like(alpha, 0.5)

    def dual_step(self, margin, q, alpha, y):
        return (y - margin - alpha / 2) / (0.5 + q)

    def check_labels(self, y):
        _numbers(self.name, y)


class _Margin(Loss):
    """A loss of ``ya`` alone, with ``y`` in {-1, +1}."""

    def check_labels(self, y):
        found = np.unique(_numbers(self.name, y))
        if not np.isin(found, (-1, 1)).all():
            raise ValueError(
                f"{self.name}(): labels {_some(found)}; expected -1 and +1. Two classes become "
                "these by np.where(y == positive, 1, -1); more than two want multinomial()."
            )


@dataclasses.dataclass(frozen=True)
class Logistic(_Margin):
    name = "logistic"
    dual_open = True

    @property
    def smoothness(self) -> float:
        return 0.25

    def value(self, margin, y):
        return jax.nn.softplus(-y * margin)

    def derivative(self, margin, y):
        return -y * jax.nn.sigmoid(-y * margin)

    def curvature(self, margin, y):
        return jax.nn.sigmoid(margin) * jax.nn.sigmoid(-margin)

    def conjugate(self, alpha, y):
        b, feasible = _within(y * alpha, 1.0)
        entropy = jax.scipy.special.xlogy(b, b) + jax.scipy.special.xlog1py(1 - b, -b)
        return jnp.where(feasible, entropy, jnp.inf)

    def dual_slope(self, alpha, y):
        b = y * alpha
        return y * (jnp.log1p(-b) - jnp.log(b))

    def dual_curvature(self, alpha, y):
        b = y * alpha
        return 1 / (b * (1 - b))

    def dual_step(self, margin, q, alpha, y):
        return (y * jax.nn.sigmoid(-y * margin) - alpha) / jnp.maximum(1.0, 0.25 + q)


@dataclasses.dataclass(frozen=True)
class Hinge(_Margin):
    name = "hinge"
    differentiable = False

    def value(self, margin, y):
        return jnp.maximum(0.0, 1 - y * margin)

    def derivative(self, margin, y):
        return jnp.where(y * margin < 1, -y, jnp.zeros_like(y))

    def curvature(self, margin, y):
        return jnp.zeros_like(margin)

    def conjugate(self, alpha, y):
        b, feasible = _within(y * alpha, 1.0)
        return jnp.where(feasible, -b, jnp.inf)

    def dual_slope(self, alpha, y):
        return y

    def dual_curvature(self, alpha, y):
        return jnp.zeros_like(alpha)

    def dual_step(self, margin, q, alpha, y):
        # A row of zeros (q = 0) is at its best with yα = 1: the quotient is infinite, and clipped.
        return y * jnp.clip((1 - y * margin) / q + y * alpha, 0.0, 1.0) - alpha


@dataclasses.dataclass(frozen=True)
class SquaredHinge(_Margin):
    name = "squared_hinge"
    dual_top = math.inf

    @property
    def smoothness(self) -> float:
        return 2.0

    def value(self, margin, y):
        return jnp.maximum(0.0, 1 - y * margin) ** 2

    def derivative(self, margin, y):
        return -2 * y * jnp.maximum(0.0, 1 - y * margin)

    def curvature(self, margin, y):
        return jnp.where(y * margin < 1, 2.0, 0.0).astype(margin.dtype)

    def conjugate(self, alpha, y):
        b, feasible = _within(y * alpha, math.inf)
        return jnp.where(feasible, b**2 / 4 - b, jnp.inf)

    def dual_slope(self, alpha, y):
        return y - alpha / 2

    def dual_curvature(self, alpha, y):
        return jnp.full_like(alpha, 0.5)

    def dual_step(self, margin, q, alpha, y):
        b = y * alpha
        return y * jnp.maximum(-b, (1 - y * margin - b / 2) / (0.5 + q))


@dataclasses.dataclass(frozen=True)
class SmoothedHinge(_Margin):
    gamma: float
    name = "smoothed_hinge"

    @property
    def smoothness(self) -> float:
        return 1 / self.gamma

    def value(self, margin, y):
        short = jnp.maximum(0.0, 1 - y * margin)
        return jnp.where(short < self.gamma, short**2 / (2 * self.gamma), short - self.gamma / 2)

    def derivative(self, margin, y):
        return -y * jnp.clip((1 - y * margin) / self.gamma, 0.0, 1.0)

    def curvature(self, margin, y):
        short = 1 - y * margin
        curved = (short > 0) & (short < self.gamma)
        return jnp.where(curved, 1 / self.gamma, 0.0).astype(margin.dtype)

    def conjugate(self, alpha, y):
        b, feasible = _within(y * alpha, 1.0)
        return jnp.where(feasible, self.gamma * b**2 / 2 - b, jnp.inf)

    def dual_slope(self, alpha, y):
        return y - self.gamma * alpha

    def dual_curvature(self, alpha, y):
        return jnp.full_like(alpha, self.gamma)

    def dual_step(self, margin, q, alpha, y):
        b = y * alpha
        return y * jnp.clip((1 - y * margin - self.gamma * b) / (self.gamma + q) + b, 0, 1) - alpha


@dataclasses.dataclass(frozen=True)
class Poisson(Loss):
    name = "poisson"
    has_dual = False

    def value(self, margin, y):
        return jnp.exp(margin) - y * margin

    def derivative(self, margin, y):
        return jnp.exp(margin) - y

    def curvature(self, margin, y):
        return jnp.exp(margin)

    def check_labels(self, y):
        found = _numbers(self.name, y)
        if (found < 0).any():
            raise ValueError(
                f"poisson(): the labels' least is {found.min():g}; expected counts, >= 0."
            )


@dataclasses.dataclass(frozen=True)
class Multinomial(Loss):
    num_classes: int
    name = "multinomial"
    has_dual = False

    @property
    def smoothness(self) -> float:
        return 0.5

    @property
    def num_outputs(self) -> int:
        return self.num_classes

    def value(self, margin, y):
        own = jnp.take_along_axis(margin, y[..., None], axis=-1)[..., 0]
        top, powers = _powers(margin)
        return jnp.log(jnp.sum(powers, axis=-1)) + (top[..., 0] - own)

    def derivative(self, margin, y):
        own = jax.nn.one_hot(y, self.num_classes, dtype=margin.dtype)
        return _softmax(margin) - own

    def curvature(self, margin, y):
        """``diag(p) - p pᵀ``, ``[n, classes, classes]``."""
        p = _softmax(margin)
        return p[..., None] * (jnp.eye(self.num_classes, dtype=p.dtype) - p[..., None, :])

    def curvature_product(self, margin, y, change):
        p = _softmax(margin)
        return p * (change - jnp.sum(p * change, axis=-1, keepdims=True))

    def check_labels(self, y):
        found = np.unique(_numbers(self.name, y))
        if not (np.isin(found, np.arange(self.num_classes))).all():
            raise ValueError(
                f"multinomial({self.num_classes}): labels {_some(found)}; expected the whole "
                f"numbers 0 to {self.num_classes - 1}. np.unique(y, return_inverse=True)[1] "
                "numbers any labels so."
            )


def squared() -> Squared:
    """``φ = (a - y)²``, ``y`` any number. Ridge and lasso regression."""
    return Squared()


def logistic() -> Logistic:
    """``φ = log(1 + e^{-ya})``, ``y`` in {-1, +1}."""
    return Logistic()


def hinge() -> Hinge:
    """``φ = max(0, 1 - ya)``, ``y`` in {-1, +1}; not differentiable. The SVM."""
    return Hinge()


def squared_hinge() -> SquaredHinge:
    """``φ = max(0, 1 - ya)²``, ``y`` in {-1, +1}."""
    return SquaredHinge()


def smoothed_hinge(gamma: float = 1.0) -> SmoothedHinge:
    """The hinge with its corner rounded over a width of ``gamma > 0``, ``y`` in {-1, +1}.

    ``φ = 0`` where ``ya >= 1``, ``1 - ya - γ/2`` where ``ya <= 1 - γ``, between them
    ``(1 - ya)² / 2γ``.
    """
    if not (math.isfinite(gamma) and gamma > 0):
        raise ValueError(f"smoothed_hinge(gamma={gamma}): expected > 0. At 0 it is hinge().")
    return SmoothedHinge(float(gamma))


def poisson() -> Poisson:
    """``φ = e^a - ya``, ``y >= 0``: counts of mean ``e^a``, ``log y!`` left out. Primal only."""
    return Poisson()


def multinomial(num_classes: int) -> Multinomial:
    """``φ = log Σ_c e^{a_c} - a_y``, margins ``[n, classes]``, ``y`` in 0 .. classes - 1.

    Primal only.
    """
    if num_classes < 2:
        raise ValueError(f"multinomial({num_classes}): expected at least 2 classes.")
    return Multinomial(int(num_classes))


def _powers(margin: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``m = max_c a_c``, ``[n, 1]``, and ``e^(a_c - m)``.

    The maximum is written out as comparisons. XLA's CPU back end hands ``exp(Xw - max(Xw))`` to
    YNNPACK as one operation, which is all NaN for the weights that are one constant (``init``'s
    zeros in the same program) and thousands of rows, on jax 0.10.2 and 0.12.0.1; these it leaves.
    """
    fixed = jax.lax.stop_gradient(margin)
    low = jnp.array(-jnp.inf, margin.dtype)
    top = jax.lax.reduce(fixed, low, lambda a, b: jnp.where(a > b, a, b), (margin.ndim - 1,))
    return top[..., None], jnp.exp(margin - top[..., None])


def _softmax(margin: jax.Array) -> jax.Array:
    _, powers = _powers(margin)
    return powers / jnp.sum(powers, axis=-1, keepdims=True)


def _numbers(name: str, y: npt.ArrayLike) -> np.ndarray:
    found = np.asarray(y)
    if found.dtype.kind not in "biuf":
        raise ValueError(f"{name}(): labels of type {found.dtype}; expected numbers.")
    bad = np.flatnonzero(~np.isfinite(found))
    if bad.size:
        raise ValueError(f"{name}(): labels of rows {_some(bad)} are not finite.")
    return found


def _some(values: np.ndarray, most: int = 5) -> str:
    shown = ", ".join(f"{v:g}" for v in values[:most])
    return shown if len(values) <= most else f"{shown}, … ({len(values)} in all)"


def _within(b: jax.Array, top: float) -> tuple[jax.Array, jax.Array]:
    """``b`` held to ``[0, top]``, and whether it was there save for rounding."""
    slack = 16 * jnp.finfo(b.dtype).eps
    return jnp.clip(b, 0.0, top), (b >= -slack) & (b <= top + slack)
