"""Objectives on generated data, dense and sparse, against the best solvers of scikit-learn.

What ``benchmarks/objectives.py`` measures at full size, at sizes that take milliseconds.
"""

import functools

import numpy as np
import pytest

from benchmarks.objectives import LOSSES, TARGETS, dense_rows, methods_of, run, sparse_rows
from benchmarks.references import cases, reference
from jdml.models.linear import Weights


@functools.cache
def cases_of(kind):
    rows = dense_rows(600, 20) if kind == "dense" else sparse_rows(500, 300, 6)
    return cases(*rows, 0.01)


@functools.cache
def least(kind, loss):
    case = cases_of(kind)[loss]
    return float(case.problem().value(reference(case)[0]))


def objective(kind, loss, dtype, number=0):
    case = cases_of(kind)[loss]
    found, _ = run(case, methods_of(loss, case)[number], dtype)
    assert found.params.w.dtype == dtype
    params = Weights(*(p if p is None else p.astype(np.float64) for p in found.params))
    return float(case.problem().value(params))


def fast(*names):
    """All losses, those not named in slow tests: compiling is what takes the time."""
    return [pytest.param(v, marks=() if v in names else pytest.mark.slow) for v in LOSSES]


@pytest.mark.parametrize("loss", fast(*(loss for loss in LOSSES if loss != "multinomial")))
def test_dense_rows(loss):
    assert objective("dense", loss, "float64") == pytest.approx(least("dense", loss), rel=1e-8)


@pytest.mark.parametrize("loss", fast("logistic", "hinge"))
def test_sparse_rows(loss):
    assert objective("sparse", loss, "float64") == pytest.approx(least("sparse", loss), rel=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("loss", LOSSES)
def test_in_f32(loss):
    expected = least("dense", loss)
    assert objective("dense", loss, "float32") == pytest.approx(expected, rel=TARGETS["float32"])


@pytest.mark.slow
@pytest.mark.parametrize("loss", [loss for loss in LOSSES if loss != "hinge"])
def test_another_solver(loss):
    found = objective("sparse", loss, "float64", 1)
    assert found == pytest.approx(least("sparse", loss), rel=1e-8)
