"""Slow tests see what goes over the wire in programs that are compiled as users' are."""

import pytest

from tests.compiling import compiling_lightly

LIGHTLY = ("test_power_sgd", "test_topologies", "test_mix")
"""Dear to compile; of means and factors rather than of bits."""


@pytest.fixture(autouse=True)
def slow_ones_compiled_as_users_do(request, compiling_for_tpu):
    marks = {mark.name for mark in request.node.iter_markers()}
    if "tpu_compile" in marks:
        yield
        return
    with compiling_lightly("slow" not in marks or request.module.__name__.endswith(LIGHTLY)):
        yield
