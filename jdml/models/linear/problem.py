"""The problem that fitting a linear model is, as one pytree that any solver takes."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from jdml.models.linear.hessian import hessian
from jdml.models.linear.losses import Loss
from jdml.models.linear.penalties import Penalty
from jdml.models.linear.rows import Rows, as_rows


class Weights(NamedTuple):
    """Parameters of a linear model.

    Attributes:
      w: ``[d]`` or ``[d, outputs]``.
      b: ``[]`` or ``[outputs]``; None without an intercept.
    """

    w: jax.Array
    b: jax.Array | None = None


class LinearProblem:
    """``P(w, b) = Σ_i s_i φ(x_iᵀ w + b, y_i) / Σ_i s_i + R(w)``; the intercept is not penalised.

    A pytree: rows, labels, weights and the penalty's strengths are leaves, so that a jitted
    function that takes the problem is compiled once for all of one shape.

    Args:
      rows: X ``[n, d]``: rows, an array, or a SciPy sparse matrix (``as_rows``).
      y: Labels ``[n]``, such as the loss takes.
      loss: φ.
      penalty: R.
      sample_weight: s ``[n]``, >= 0 and not all 0; by default ones.
      intercept: Whether there is a b. Nothing is appended to the rows.
      class_weight: A factor of s for each label, or "balanced": ``n / (labels · count)``.

    Raises:
      ValueError: shapes that do not fit, labels that the loss does not take, weights out of range,
        and what ``as_rows`` raises.
    """

    def __init__(
        self,
        rows: Any,
        y: npt.ArrayLike,
        loss: Loss,
        penalty: Penalty,
        sample_weight: npt.ArrayLike | None = None,
        intercept: bool = False,
        *,
        class_weight: Mapping[Any, float] | str | None = None,
    ):
        self.rows: Rows = as_rows(rows)
        n = self.rows.shape[0]
        labels = np.asarray(y)
        if labels.shape != (n,):
            raise ValueError(f"y has shape {labels.shape}; expected ({n},), a label for each row.")
        loss.check_labels(labels)
        self.loss = loss
        self.penalty = penalty
        self.intercept = bool(intercept)
        dtype = self.rows.dtype if loss.num_outputs is None else np.int32
        self.y = jnp.asarray(labels.astype(dtype))
        weight = checked_sample_weight(sample_weight, n)
        if class_weight is not None:
            weight = weight * _class_weight(class_weight, labels)
            if not weight.any():
                raise ValueError("class_weight leaves no sample a weight above 0.")
        # Summed in f64: s is as the objective has it, of mean 1, and products divide by n alone.
        self.sample_weight = jnp.asarray((weight * (n / weight.sum())).astype(self.rows.dtype))

    def replace(self, **parts: Any) -> "LinearProblem":
        """The same with other parts, unchecked; ``sample_weight`` must have mean 1."""
        new = object.__new__(LinearProblem)
        for name in _LEAVES + _STATIC:
            setattr(new, name, parts.pop(name, getattr(self, name)))
        if parts:
            raise ValueError(f"replace: no part is called {sorted(parts)}.")
        return new

    @property
    def num_samples(self) -> int:
        return self.rows.shape[0]

    @property
    def dtype(self) -> Any:
        return self.rows.dtype

    def init(self) -> Weights:
        """Zeros."""
        outputs = () if self.loss.num_outputs is None else (self.loss.num_outputs,)
        b = jnp.zeros(outputs, self.dtype) if self.intercept else None
        return Weights(jnp.zeros((self.rows.shape[1], *outputs), self.dtype), b)

    def margins(self, params: Weights) -> jax.Array:
        """``X w + b``, ``[n]`` or ``[n, outputs]``."""
        return with_intercept(self.rows.matvec(params.w), params.b)

    def pull(self, v: jax.Array) -> Weights:
        """What margins pull back, ``(Xᵀ v, Σ_i v_i)``; ``v`` in the margins' shape."""
        return Weights(self.rows.rmatvec(v), jnp.sum(v, axis=0) if self.intercept else None)

    def loss_at(self, margins: jax.Array) -> jax.Array:
        """``Σ_i s_i φ(a_i, y_i) / Σ_i s_i``."""
        return jnp.mean(self.sample_weight * self.loss.value(margins, self.y))

    def slopes(self, margins: jax.Array) -> jax.Array:
        """The gradient of ``loss_at``, in the margins' shape."""
        slopes = self.loss.derivative(margins, self.y)
        return _times(self.sample_weight / self.num_samples, slopes)

    def value(self, params: Weights) -> jax.Array:
        """``P(w, b)``."""
        return self.loss_at(self.margins(params)) + self.penalty.value(params.w)

    def loss_and_gradient(self, params: Weights) -> tuple[jax.Array, Weights]:
        """Of the mean loss alone, without R."""
        margins = self.margins(params)
        return self.loss_at(margins), self.pull(self.slopes(margins))

    def value_and_gradient(self, params: Weights) -> tuple[jax.Array, Weights]:
        """``P`` and its gradient; the penalty must be smooth."""
        value, gradient = self.loss_and_gradient(params)
        whole = gradient._replace(w=gradient.w + self.penalty.gradient(params.w))
        return value + self.penalty.value(params.w), whole

    def curvature_product(self, margins: jax.Array, change: Weights) -> Weights:
        """The Hessian of the mean loss, at these margins, times ``change``."""

        def bend(moved: jax.Array, margins: jax.Array, y: jax.Array, weight: jax.Array):
            moved = self.loss.curvature_product(margins, y, with_intercept(moved, change.b))
            return _times(weight / self.num_samples, moved)

        of_samples = margins, self.y, self.sample_weight
        if hasattr(self.rows, "there_and_back"):  # a stream: one pass, not two
            w, total = self.rows.there_and_back(change.w, bend, *of_samples)
            return Weights(w, total if self.intercept else None)
        return self.pull(bend(self.rows.matvec(change.w), *of_samples))

    def hessian(self, margins: jax.Array) -> jax.Array:
        """The Hessian of the mean loss, at these margins, as a matrix; see ``hessian.py``."""
        return hessian(self, margins)

    def prox(self, params: Weights, step: jax.Array | float) -> Weights:
        """R's proximal operator on w; b stays."""
        return params._replace(w=self.penalty.prox(params.w, step))


_LEAVES = ("rows", "y", "sample_weight", "penalty")
_STATIC = ("loss", "intercept")


def _flatten(problem: LinearProblem):
    return [getattr(problem, name) for name in _LEAVES], tuple(
        getattr(problem, name) for name in _STATIC
    )


def _unflatten(static, leaves) -> LinearProblem:
    problem = object.__new__(LinearProblem)
    for name, part in zip(_LEAVES + _STATIC, (*leaves, *static), strict=True):
        setattr(problem, name, part)
    return problem


jax.tree_util.register_pytree_node(LinearProblem, _flatten, _unflatten)


def with_intercept(products: jax.Array, b: jax.Array | None) -> jax.Array:
    return products if b is None else products + b


def _times(weights: jax.Array, v: jax.Array) -> jax.Array:
    return weights.reshape(weights.shape + (1,) * (v.ndim - 1)) * v


def checked_sample_weight(weight: npt.ArrayLike | None, n: int) -> np.ndarray:
    """Weights of n rows in f64, ones for None; ``ValueError`` for any that are no weights."""
    if weight is None:
        return np.ones(n)
    found = np.asarray(weight)
    if found.shape != (n,):
        raise ValueError(
            f"sample_weight has shape {found.shape}; expected ({n},), a weight for each row."
        )
    if found.dtype.kind not in "biuf":
        raise ValueError(f"sample_weight has dtype {found.dtype}; expected numbers.")
    found = found.astype(np.float64)
    bad = np.flatnonzero(~(np.isfinite(found) & (found >= 0)))
    if bad.size:
        raise ValueError(
            f"sample_weight of rows {', '.join(map(str, bad[:10]))} is not a number >= 0."
        )
    if not found.any():
        raise ValueError("sample_weight is zero for all rows; expected some above 0.")
    return found


def _class_weight(weights: Mapping[Any, float] | str, labels: np.ndarray) -> np.ndarray:
    found, which, counts = np.unique(labels, return_inverse=True, return_counts=True)
    if isinstance(weights, str):
        if weights != "balanced":
            raise ValueError(f'class_weight={weights!r}; expected "balanced" or a dict.')
        return (len(labels) / (len(found) * counts))[which]
    unknown = [label for label in weights if label not in found]
    if unknown:
        raise ValueError(
            f"class_weight names {unknown}, which are no labels; those are {found.tolist()}."
        )
    factors = np.array([weights.get(label, 1.0) for label in found.tolist()], np.float64)
    if not (np.isfinite(factors) & (factors >= 0)).all():
        raise ValueError(f"class_weight={dict(weights)}: expected numbers >= 0.")
    return factors[which]
