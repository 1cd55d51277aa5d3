"""Penalties and constraints: what each operator claims to be the best of is the best of."""

import jax
import numpy as np
import pytest

from jdml.models.linear.penalties import (
    box,
    elastic_net,
    l1,
    l1_ball,
    l2,
    non_negative,
    none,
    simplex,
)

PENALTIES = [none(), l2(0.7), l1(0.4), elastic_net(0.3, 0.5)]
CONSTRAINTS = [box(-0.5, 0.8), non_negative(), l1_ball(1.1), simplex(1.3)]
RANDOM = np.random.default_rng(0)
POINTS = RANDOM.standard_normal((3, 6))


def name(penalty):
    return penalty.name


def objective(penalty, z, v, step):
    return float(penalty.value(z) + ((z - v) ** 2).sum() / (2 * step))


@pytest.mark.parametrize("penalty", PENALTIES + CONSTRAINTS, ids=name)
def test_prox_is_the_best_point(penalty):
    project = jax.jit(penalty.project) if penalty.constraint else lambda z: z
    for v in POINTS:
        z = np.asarray(penalty.prox(v, 0.6))
        best = objective(penalty, z, v, 0.6)
        assert np.isfinite(best)
        for size in (1e-3, 0.1, 1.0):
            for other in z + size * RANDOM.standard_normal((40, 6)):
                other = np.asarray(project(other))
                assert objective(penalty, other, v, 0.6) >= best - 1e-12


@pytest.mark.parametrize("penalty", PENALTIES + CONSTRAINTS, ids=name)
def test_moreau_relates_prox_and_conjugate(penalty):
    """``v - prox_R(v)`` is the prox of R*, and Fenchel-Young is tight there."""
    for v in POINTS:
        z = np.asarray(penalty.prox(v, 1.0))
        u = v - z
        both = float(penalty.value(z) + penalty.conjugate(u))
        assert both == pytest.approx(float(z @ u), abs=1e-12)


@pytest.mark.parametrize("penalty", PENALTIES, ids=name)
def test_gradient_of_the_smooth(penalty):
    if not penalty.smooth:
        with pytest.raises(ValueError, match="no gradient"):
            penalty.gradient(POINTS[0])
        return
    expected = jax.grad(penalty.value)(POINTS[0])
    np.testing.assert_allclose(penalty.gradient(POINTS[0]), expected, atol=1e-14)


@pytest.mark.parametrize("constraint", [box(-0.5, 0.8), l1_ball(1.1), simplex(1.3)], ids=name)
def test_lmo_is_least_of_all_feasible(constraint):
    for gradient in POINTS:
        s = np.asarray(constraint.lmo(gradient))
        assert float(constraint.value(s)) == 0.0
        for other in RANDOM.standard_normal((40, 6)):
            assert gradient @ np.asarray(constraint.project(3 * other)) >= gradient @ s - 1e-12


def test_constraints_are_infinite_outside():
    outside = {"box": -0.6, "l1_ball": 0.2, "simplex": 0.3}
    for constraint in CONSTRAINTS:
        if constraint.name in outside:
            assert np.isinf(constraint.value(np.full(6, outside[constraint.name])))
    assert np.isinf(non_negative().value(np.array([1.0, -1e-3])))


def test_strengths_are_leaves_of_one_program():
    traces = []

    @jax.jit
    def value(penalty, w):
        traces.append(1)
        return penalty.value(w)

    w = POINTS[0]
    assert float(value(l2(2.0), w)) == pytest.approx(float(w @ w))
    assert float(value(l2(4.0), w)) == pytest.approx(2 * float(w @ w))
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: l2(-1e-9), "strength of l2 is -1e-09"),
        (lambda: l1(float("nan")), "strength of l1"),
        (lambda: elastic_net(0.1, -1.0), "elastic_net's l2"),
        (lambda: box(1.0, 0.0), "low <= high"),
        (lambda: l1_ball(0.0), "l1_ball"),
        (lambda: simplex(-1.0), "simplex"),
        (lambda: l2(1.0).project(POINTS[0]), "not a constraint"),
        (lambda: l1(1.0).lmo(POINTS[0]), "no set"),
    ],
)
def test_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
