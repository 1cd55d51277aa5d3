"""True distributions with a known optimum, to draw online data from.

Each is a function of the parameters that returns ``draw(key) -> {"x": [batch, d], "y": [batch]}``.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy.typing as npt

Draw = Callable[[jax.Array], dict[str, jax.Array]]


def gaussian_linear(
    w: npt.ArrayLike, batch: int, *, b: float = 0.0, noise: float = 1.0, scale: npt.ArrayLike = 1.0
) -> Draw:
    """``x ~ N(0, diag(scale²))``, ``y = xᵀw + b + noise · N(0, 1)``.

    The expected squared loss ``E (xᵀv + c - y)²`` is least at (w, b), where it is ``noise²``, and
    ``Σ_j scale_j² (v_j - w_j)² + (c - b)²`` more elsewhere.

    Args:
      w: ``[d]``.
      batch: Samples of a draw.
      b: The intercept.
      noise: Standard deviation >= 0 of what the model does not explain.
      scale: Standard deviations of the features, a number or ``[d]``.

    Raises:
      ValueError: an argument is out of its range.
    """
    w, scale = _checked("gaussian_linear", w, batch, scale)
    if noise < 0:
        raise ValueError(f"gaussian_linear(noise={noise}): expected a number >= 0.")

    def draw(key: jax.Array) -> dict[str, jax.Array]:
        of_x, of_y = jax.random.split(key)
        x = scale * jax.random.normal(of_x, (batch, w.shape[0]), w.dtype)
        return {"x": x, "y": x @ w + b + noise * jax.random.normal(of_y, (batch,), w.dtype)}

    return draw


def gaussian_logistic(
    w: npt.ArrayLike, batch: int, *, b: float = 0.0, scale: npt.ArrayLike = 1.0
) -> Draw:
    """``x ~ N(0, diag(scale²))``, ``y = ±1`` with ``P(y = 1 | x) = 1 / (1 + exp(-xᵀw - b))``.

    The expected logistic loss ``E log(1 + exp(-y (xᵀv + c)))`` is least at (w, b).

    Args:
      w: ``[d]``.
      batch: Samples of a draw.
      b: The intercept.
      scale: Standard deviations of the features, a number or ``[d]``.

    Raises:
      ValueError: an argument is out of its range.
    """
    w, scale = _checked("gaussian_logistic", w, batch, scale)

    def draw(key: jax.Array) -> dict[str, jax.Array]:
        of_x, of_y = jax.random.split(key)
        x = scale * jax.random.normal(of_x, (batch, w.shape[0]), w.dtype)
        positive = jax.random.bernoulli(of_y, jax.nn.sigmoid(x @ w + b))
        return {"x": x, "y": jnp.where(positive, 1, -1).astype(w.dtype)}

    return draw


def _checked(
    caller: str, w: npt.ArrayLike, batch: int, scale: npt.ArrayLike
) -> tuple[jax.Array, jax.Array]:
    found = jnp.asarray(w)
    if not jnp.issubdtype(found.dtype, jnp.floating):
        found = found.astype(jnp.result_type(float))
    spread = jnp.asarray(scale, found.dtype)
    if found.ndim != 1 or not found.shape[0] or spread.shape not in ((), found.shape):
        raise ValueError(
            f"{caller}: w of shape {found.shape} and scale of shape {spread.shape}; expected [d] "
            "for w, and a number or [d] for scale."
        )
    if batch < 1:
        raise ValueError(f"{caller}(batch={batch}): expected at least one sample.")
    return found, spread
