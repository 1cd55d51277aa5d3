"""One Ray session for a module: it takes seconds to start."""

import importlib.util

import pytest

from jdml.communicate.pace.ray_backend import local_session


def pytest_collection_modifyitems(items):
    """Skips what needs Ray where there is none; CI installs it."""
    if importlib.util.find_spec("ray") is not None:
        return
    reason = "needs Ray: pip install 'jdml[ray]'"
    for item in items:
        if "session" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session", autouse=True)
def nobody_waits():
    """Ray's workers are usually nice (15), and would starve beside whatever else runs here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_worker_niceness", "0")
        yield


@pytest.fixture(scope="module")
def session():
    """The package ``ray``, connected to a session on this machine."""
    with local_session(num_cpus=2, object_store_bytes=200_000_000) as ray:
        yield ray
