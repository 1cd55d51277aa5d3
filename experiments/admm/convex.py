"""Logistic regression and the lasso, on data that come with scikit-learn, and their exact answers.

``sum_k f_k(x) + g(x)``, where worker k's loss f_k is the mean over its samples. The workers have as
many rows each; where the samples do not go round, rows of weight 0 fill up, and the others weigh
the more, so that ``sum_k f_k`` is K times the mean over all samples, exactly.
"""

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jdml.aggregate import prox_l1, prox_l2
from jdml.aggregate.proximal import Proximal
from jdml.partition.samples import permutation

Params = dict[str, Any]


class Problem(NamedTuple):
    """One convex problem over K workers, f64.

    Attributes:
      name: For tables and pictures.
      batch: Arrays of K equal shares.
      start: Where all begin.
      loss_fn: f_k, as ``make_step`` takes it.
      prox: Proximal operator of g.
      objective: ``params -> sum_k f_k + g``, in NumPy.
      best: Its value at the answer of a solver that has all samples.
      solver: Which one.
    """

    name: str
    batch: dict[str, np.ndarray]
    start: Params
    loss_fn: Callable[..., Any]
    prox: Proximal
    objective: Callable[[Params], float]
    best: float
    solver: str


def logistic(num_workers: int, ridge: float, seed: int) -> Problem:
    """Breast cancer (569 samples, 30 features): ``log(1 + exp(-s (w.x + b)))``, a ridge on w."""
    from sklearn.linear_model import LogisticRegression

    x, label = _load("load_breast_cancer")
    s = np.where(label == 1, 1.0, -1.0)

    def loss_fn(params: Params, batch: Any, key: Any) -> Any:
        del key
        margins = batch["y"] * (batch["x"] @ params["w"] + params["b"])
        return jnp.mean(batch["weight"] * jax.nn.softplus(-margins)), {}

    def objective(params: Params) -> float:
        losses = np.logaddexp(0, -s * (x @ params["w"] + params["b"]))
        return num_workers * losses.mean() + ridge / 2 * np.sum(params["w"] ** 2)

    model = LogisticRegression(
        C=num_workers / (len(x) * ridge), solver="newton-cholesky", tol=1e-12, max_iter=1000
    ).fit(x, s)
    return Problem(
        "logistic regression",
        _share(x, s, num_workers, seed),
        {"w": np.zeros(x.shape[1]), "b": np.zeros(())},
        loss_fn,
        prox_l2(ridge, lambda params: {"w": True, "b": False}),
        objective,
        objective({"w": model.coef_[0], "b": model.intercept_[0]}),
        "Newton's method (LogisticRegression)",
    )


def lasso(num_workers: int, sparsity: float, seed: int) -> Problem:
    """Diabetes (442 samples, 10 features, all standardised): ``(w.x - y)^2 / 2``, ``|w|_1``."""
    from sklearn.linear_model import Lasso

    x, target = _load("load_diabetes")
    y = (target - target.mean()) / target.std()

    def loss_fn(params: Params, batch: Any, key: Any) -> Any:
        del key
        errors = batch["x"] @ params["w"] - batch["y"]
        return jnp.mean(batch["weight"] * errors**2) / 2, {}

    def objective(params: Params) -> float:
        errors = x @ params["w"] - y
        return num_workers * (np.mean(errors**2) / 2 + sparsity * np.sum(np.abs(params["w"])))

    model = Lasso(sparsity, fit_intercept=False, tol=1e-14, max_iter=100_000).fit(x, y)
    return Problem(
        "lasso",
        _share(x, y, num_workers, seed),
        {"w": np.zeros(x.shape[1])},
        loss_fn,
        prox_l1(num_workers * sparsity),
        objective,
        objective({"w": model.coef_}),
        "coordinate descent (Lasso)",
    )


def _load(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Features with mean 0 and deviation 1, and what is to be said of them."""
    try:
        from sklearn import datasets
    except ImportError:
        sys.exit("The data come with scikit-learn: pip install 'jdml[experiments]'")
    x, y = getattr(datasets, name)(return_X_y=True)
    return (x - x.mean(axis=0)) / x.std(axis=0), y


def _share(x: np.ndarray, y: np.ndarray, num_workers: int, seed: int) -> dict[str, np.ndarray]:
    """Samples in random order, dealt out in turn."""
    num_rows = -(-len(x) // num_workers)
    places = np.arange(num_workers * num_rows).reshape(num_rows, num_workers).T.reshape(-1)
    order = permutation(len(x), seed, 0)
    rows = order[np.minimum(places, len(x) - 1)]
    weight = np.where(places < len(x), num_workers * num_rows / len(x), 0.0)
    return {"x": x[rows], "y": y[rows], "weight": weight}
