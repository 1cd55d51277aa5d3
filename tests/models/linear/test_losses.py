"""Losses against differences, suprema and maxima found by brute force."""

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from jdml.models.linear import losses
from jdml.models.linear.losses import (
    hinge,
    logistic,
    multinomial,
    poisson,
    smoothed_hinge,
    squared,
    squared_hinge,
)

SCALAR = [squared(), logistic(), hinge(), squared_hinge(), smoothed_hinge(0.3), poisson()]
DUAL = SCALAR[:-1]
MARGINS = np.linspace(-3.03, 3.01, 53)  # meets no corner


def labels_of(loss):
    return {"squared": [-1.3, 0.0, 2.1], "poisson": [0.0, 1.0, 7.0]}.get(loss.name, [-1.0, 1.0])


def grid(loss):
    a, y = np.meshgrid(MARGINS, labels_of(loss))
    return a.ravel(), y.ravel()


def feasible_alphas(loss, y):
    """α with φ*(-α) finite, its bounds left out for their own test."""
    if loss.name == "squared":
        return np.linspace(-2.0, 2.0, 9)
    return y * np.linspace(0.02, 5.0 if loss.name == "squared_hinge" else 0.98, 9)


@pytest.mark.parametrize("loss", SCALAR, ids=lambda loss: loss.name)
def test_derivative_and_curvature_are_those_of_the_value(loss):
    a, y = grid(loss)
    h = 1e-6
    slope = (loss.value(a + h, y) - loss.value(a - h, y)) / (2 * h)
    np.testing.assert_allclose(loss.derivative(a, y), slope, rtol=1e-7, atol=1e-7)
    bend = (loss.derivative(a + h, y) - loss.derivative(a - h, y)) / (2 * h)
    np.testing.assert_allclose(loss.curvature(a, y), bend, rtol=1e-7, atol=1e-7)
    if loss.smoothness is not None:
        fine = np.linspace(-3, 3, 2001)
        largest = max(np.max(loss.curvature(fine, np.full_like(fine, y))) for y in labels_of(loss))
        assert largest == pytest.approx(loss.smoothness, rel=1e-5)


def test_values_written_out():
    y, a = np.array([1.0, -1.0]), np.array([0.25, 3.0])
    np.testing.assert_allclose(squared().value(a, y), [0.5625, 16.0])
    np.testing.assert_allclose(logistic().value(a, y), np.log(1 + np.exp(-y * a)))
    np.testing.assert_allclose(hinge().value(a, y), [0.75, 4.0])
    np.testing.assert_allclose(squared_hinge().value(a, y), [0.5625, 16.0])
    np.testing.assert_allclose(smoothed_hinge(1.0).value(a, y), [0.75**2 / 2, 3.5])
    np.testing.assert_allclose(poisson().value(a, abs(y)), np.exp(a) - a)
    assert np.isfinite(logistic().value(np.array([-1e4, 1e4]), np.array([1.0, 1.0]))).all()


def test_multinomial_against_differences():
    loss, random = multinomial(3), np.random.default_rng(0)
    a, change = random.standard_normal((2, 7, 3))
    y = random.integers(0, 3, 7)
    exponentials = np.exp(a)
    expected = -np.log(exponentials[np.arange(7), y] / exponentials.sum(1))
    np.testing.assert_allclose(loss.value(a, y), expected, rtol=1e-13)
    h = 1e-6
    along = (loss.value(a + h * change, y) - loss.value(a - h * change, y)) / (2 * h)
    np.testing.assert_allclose((loss.derivative(a, y) * change).sum(1), along, rtol=1e-7, atol=1e-8)
    bend = (loss.derivative(a + h * change, y) - loss.derivative(a - h * change, y)) / (2 * h)
    np.testing.assert_allclose(loss.curvature_product(a, y, change), bend, rtol=1e-6, atol=1e-8)
    matrix = loss.curvature(a, y)
    np.testing.assert_allclose(np.einsum("nij,nj->ni", matrix, change), bend, atol=1e-8)
    assert np.linalg.eigvalsh(matrix).max() <= loss.smoothness


@pytest.mark.parametrize("loss", DUAL, ids=lambda loss: loss.name)
def test_conjugate_is_the_supremum(loss):
    for y in labels_of(loss):
        for alpha in feasible_alphas(loss, y):

            def lower(a, alpha=alpha, y=y):
                return float(loss.value(a, y)) + alpha * a

            best = scipy.optimize.minimize_scalar(
                lower, bounds=(-40, 40), method="bounded", options={"xatol": 1e-10}
            )
            corner = min(lower(a) for a in (0.0, 1.0, -1.0))
            found = float(loss.conjugate(np.float64(alpha), np.float64(y)))
            assert found == pytest.approx(-min(best.fun, corner), abs=1e-8)


@pytest.mark.parametrize("loss", DUAL, ids=lambda loss: loss.name)
def test_conjugate_at_and_beyond_the_bounds(loss):
    y = np.float64(-1.0)
    at_zero = float(loss.conjugate(np.float64(0.0), y))
    assert at_zero == 0.0  # the losses' infimum is 0
    if loss.name == "squared":
        return
    assert np.isinf(loss.conjugate(np.float64(1e-3), y))  # yα < 0
    assert np.isfinite(loss.conjugate(-y * 1e-16, y))  # that is rounding
    top = float(loss.conjugate(y * 1.0, y))
    assert np.isfinite(top)
    beyond = loss.conjugate(y * 1.001, y)
    assert np.isfinite(beyond) == (loss.name == "squared_hinge")


@pytest.mark.parametrize("loss", DUAL, ids=lambda loss: loss.name)
def test_fenchel_young_is_tight_at_the_dual_point(loss):
    a, y = grid(loss)
    alpha = loss.dual_point(a, y)
    np.testing.assert_allclose(
        loss.value(a, y) + loss.conjugate(alpha, y), -alpha * a, rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("loss", DUAL, ids=lambda loss: loss.name)
def test_dual_step_against_the_best_in_one_dimension(loss):
    random = np.random.default_rng(1)
    for y in labels_of(loss):
        for alpha in feasible_alphas(loss, y)[::2]:
            for q in (0.0, 1e-3, 0.7, 30.0):
                a = 0.0 if q == 0 else float(random.normal(scale=2))

                def gain(step, y=y, alpha=alpha, q=q, a=a):
                    dual = -loss.conjugate(np.float64(alpha + step), np.float64(y))
                    return float(dual - a * step - q * step**2 / 2)

                step = float(loss.dual_step(*map(jnp.float64, (a, q, alpha, y))))
                assert np.isfinite(loss.conjugate(np.float64(alpha + step), np.float64(y)))
                low, high = sorted((-alpha, y - alpha))  # α from 0 to y
                if loss.name in ("squared", "squared_hinge"):
                    low, high = (
                        (-50, 50) if loss.name == "squared" else sorted((-alpha, y * 60 - alpha))
                    )
                best = -scipy.optimize.minimize_scalar(
                    lambda s, gain=gain: -gain(s),
                    bounds=(low, high),
                    method="bounded",
                    options={"xatol": 1e-11},
                ).fun
                best = max(best, gain(low), gain(high))
                if loss.name == "logistic":  # no closed form: no worse, and better by far from it
                    assert gain(step) >= gain(0.0) - 1e-15
                    assert gain(step) - gain(0.0) >= 0.05 * (best - gain(0.0)) - 1e-12
                else:
                    assert gain(step) >= best - 1e-12 * (1 + abs(best))


def test_those_without_a_dual_name_those_with_one():
    one = np.ones(1)
    for loss in (poisson(), multinomial(3)):
        assert not loss.has_dual
        for call in (
            lambda loss=loss: loss.conjugate(one, one),
            lambda loss=loss: loss.dual_step(one, one, one, one),
            lambda loss=loss: loss.dual_point(one, one),
        ):
            with pytest.raises(ValueError, match="smoothed_hinge"):
                call()


@pytest.mark.parametrize(
    ("loss", "labels", "message"),
    [
        (logistic(), [0, 1, 1], "labels 0, 1; expected -1 and"),
        (hinge(), [1, 2, 3, 4, 5, 6, 7], r"… \(7 in all\)"),
        (squared_hinge(), ["a", "b"], "expected numbers"),
        (squared(), [0.0, np.nan, np.inf], "rows 1, 2 are not finite"),
        (poisson(), [2, -3], "least is -3"),
        (multinomial(3), [0, 3], "whole numbers 0 to 2"),
        (multinomial(3), [0.5, 1], "whole numbers 0 to 2"),
    ],
)
def test_labels_that_a_loss_does_not_take(loss, labels, message):
    with pytest.raises(ValueError, match=message):
        loss.check_labels(np.array(labels))


def test_parameters_out_of_range():
    for gamma in (0.0, -1.0, np.nan, np.inf):
        with pytest.raises(ValueError, match="smoothed_hinge"):
            smoothed_hinge(gamma)
    with pytest.raises(ValueError, match="at least 2 classes"):
        multinomial(1)
    assert {type(loss).name for loss in SCALAR} <= set(dir(losses))
