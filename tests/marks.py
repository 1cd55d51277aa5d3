"""Marks that many test files put on single cases."""

import pytest


def slow(*values):
    """A case of a parametrised test that ``make test-slow`` runs."""
    return pytest.param(*values, marks=pytest.mark.slow)
