"""What goes over the wire is looked at in programs that are compiled as users' are."""

import pytest

LIGHTLY = ("test_power_sgd", "test_topologies", "test_mix")
"""Dear to compile; of means and factors rather than of bits."""


@pytest.fixture(scope="module", autouse=True)
def compiled_as_users_do(request):
    if not request.module.__name__.endswith(LIGHTLY):
        request.getfixturevalue("compiled_fully")
