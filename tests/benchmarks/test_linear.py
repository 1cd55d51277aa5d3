"""The benchmark of linear models runs, small, and its methods reach what they are compared at."""

import json

import jax
import pytest

from benchmarks import linear


@pytest.mark.slow
def test_every_method_reaches_the_accuracy():
    options = linear.Options(samples=300, features=4, tries=1)
    with jax.enable_x64(True):
        figures = linear.measure(options)
    assert len(figures) == 6
    for figure in figures:
        # Not below the minimum, save for rounding.
        assert -1e-12 <= figure.relative_error <= options.accuracy
        assert figure.seconds > 0
        assert (figure.ratio is None) == figure.name.startswith("scikit-learn")
        if figure.ratio is not None:
            assert figure.solve_seconds <= figure.seconds
            assert figure.compile_seconds > 0
    assert json.dumps([figure._asdict() for figure in figures])
