"""The objective against NumPy, its derivatives against differences; bad input."""

import jax
import numpy as np
import pytest
import scipy.sparse

from jdml.models.linear import LinearProblem, Weights, l1, l2, logistic, multinomial, squared

RANDOM = np.random.default_rng(0)
X = RANDOM.standard_normal((20, 4)) * (RANDOM.random((20, 4)) < 0.7)
Y = np.where(RANDOM.random(20) < 0.4, 1, -1)
S = RANDOM.random(20) * 3


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("intercept", [False, True], ids=["through 0", "intercept"])
def test_objective_and_derivatives(sparse, intercept):
    x = scipy.sparse.csr_matrix(X) if sparse else X
    problem = LinearProblem(x, Y, logistic(), l2(0.3), S, intercept)
    w, b = RANDOM.standard_normal(4), 0.7 if intercept else 0.0
    params = Weights(w, np.float64(b) if intercept else None)
    assert jax.tree.structure(problem.init()) == jax.tree.structure(params)
    losses = np.log(1 + np.exp(-Y * (X @ w + b)))
    expected = (S * losses).sum() / S.sum() + 0.15 * (w @ w)  # b is not in the penalty
    value, gradient = problem.value_and_gradient(params)
    assert float(problem.value(params)) == pytest.approx(expected, rel=1e-13)
    assert float(value) == pytest.approx(expected, rel=1e-13)
    wanted = jax.grad(problem.value)(params)
    for found, leaf in zip(gradient, wanted, strict=True):
        assert (found is None) == (leaf is None)
        if found is not None:
            np.testing.assert_allclose(found, leaf, rtol=1e-12)
    change = jax.tree.map(np.ones_like, params)
    product = problem.curvature_product(problem.margins(params), change)
    loss = lambda p: problem.loss_and_gradient(p)[0]  # noqa: E731
    bend = jax.jvp(jax.grad(loss), (params,), (change,))[1]
    for found, leaf in zip(jax.tree.leaves(product), jax.tree.leaves(bend), strict=True):
        np.testing.assert_allclose(found, leaf, rtol=1e-11)


def test_multinomial_has_a_column_for_each_class():
    y = RANDOM.integers(0, 3, 20)
    problem = LinearProblem(X, y, multinomial(3), l2(0.1), intercept=True)
    assert [leaf.shape for leaf in problem.init()] == [(4, 3), (3,)]
    params = Weights(RANDOM.standard_normal((4, 3)), RANDOM.standard_normal(3))
    _, gradient = problem.value_and_gradient(params)
    wanted = jax.grad(problem.value)(params)
    for found, leaf in zip(gradient, wanted, strict=True):
        np.testing.assert_allclose(found, leaf, rtol=1e-12)


def test_gradient_of_multinomial_at_zeros_made_in_the_same_program():
    """A fused softmax of many rows was NaN there: see ``losses._powers``."""
    n, d = 2000, 1000
    x, y = RANDOM.standard_normal((n, d)), RANDOM.integers(0, 3, n)
    problem = LinearProblem(x, y, multinomial(3), l2(0.1), intercept=True)

    @jax.jit
    def gradient(problem):
        return problem.pull(problem.slopes(problem.margins(problem.init())))

    expected = x.T @ (1 / 3 - np.eye(3)[y]) / n
    np.testing.assert_allclose(gradient(problem).w, expected, atol=1e-14)


def test_weights_are_as_good_as_copies():
    counts = RANDOM.integers(1, 4, 20)
    copies = np.repeat(np.arange(20), counts)
    params = Weights(RANDOM.standard_normal(4))
    weighted = LinearProblem(X, Y, squared(), l1(0.2), counts)
    copied = LinearProblem(X[copies], Y[copies], squared(), l1(0.2))
    assert float(weighted.value(params)) == pytest.approx(float(copied.value(params)), rel=1e-13)


def test_class_weights():
    params = Weights(RANDOM.standard_normal(4))
    of_classes = LinearProblem(X, Y, logistic(), l2(0.1), S, class_weight={-1: 0.5, 1: 3.0})
    by_hand = LinearProblem(X, Y, logistic(), l2(0.1), S * np.where(Y > 0, 3.0, 0.5))
    assert float(of_classes.value(params)) == pytest.approx(float(by_hand.value(params)))
    balanced = LinearProblem(X, Y, logistic(), l2(0.1), class_weight="balanced")
    positive = balanced.sample_weight[Y > 0].sum()
    assert float(positive) == pytest.approx(float(balanced.sample_weight[Y < 0].sum()))


def test_is_a_pytree_that_is_compiled_once():
    traces = []

    @jax.jit
    def value(problem, params):
        traces.append(1)
        return problem.value(params)

    for strength in (0.1, 0.2):
        problem = LinearProblem(X, Y, logistic(), l2(strength))
        params = Weights(np.ones(4))
        assert float(value(problem, params)) == pytest.approx(float(problem.value(params)))
    assert len(traces) == 1
    other = problem.replace(penalty=l2(0.0))
    assert float(other.value(params)) < float(problem.value(params))
    with pytest.raises(ValueError, match="penalties"):
        problem.replace(penalties=l2(0.0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": Y[:19]}, r"y has shape \(19,\); expected \(20,\)"),
        ({"y": Y[:, None]}, r"y has shape \(20, 1\)"),
        ({"y": (Y + 1) // 2}, "labels 0, 1"),
        ({"sample_weight": S[:3]}, r"sample_weight has shape \(3,\)"),
        ({"sample_weight": -S}, "rows 0, 1, 2"),
        ({"sample_weight": np.zeros(20)}, "zero for all rows"),
        ({"sample_weight": np.full(20, "a")}, "expected numbers"),
        ({"class_weight": {2: 1.0}}, r"names \[2\]"),
        ({"class_weight": "even"}, "balanced"),
        ({"class_weight": {1: -1.0}}, ">= 0"),
        ({"class_weight": {1: 0, -1: 0}}, "no sample"),
        ({"rows": np.where(np.arange(4) > 2, np.nan, X)}, "NaN or infinity"),
    ],
)
def test_refused(change, message):
    given = {"rows": X, "y": Y, "loss": logistic(), "penalty": l2(1.0)}
    with pytest.raises(ValueError, match=message):
        LinearProblem(**(given | change))
