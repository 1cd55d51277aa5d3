"""Ray itself: imported when it is needed, and a session of it on this machine alone."""

import contextlib
import os
import signal
import socket
import threading
import warnings
from collections.abc import Iterator, Mapping
from types import ModuleType

from jdml.communicate.pace.ray_backend.shelf import sweep

LOOPBACK = "127.0.0.1"

ENVIRONMENT = {
    # Else Ray quietly replaces the loopback address by one that others reach.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    # A lost node is noticed after about two seconds instead of half a minute.
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}
"""What Ray reads from the environment when it starts; whatever is set already stays."""


def import_ray() -> ModuleType:
    """The package.

    Raises:
      ImportError: it is not installed; the message says what to install.
    """
    os.environ.setdefault(*next(iter(ENVIRONMENT.items())))  # read once, by the import
    try:
        import ray
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise ImportError(
            "workers and servers as Ray actors need Ray: pip install 'jdml[ray]'. Without it, "
            "run_threads runs workers in this process, and simulate in virtual time."
        ) from error
    return ray


def ray_in_session() -> ModuleType:
    """The package, connected.

    Raises:
      ImportError: it is not installed.
      ValueError: nobody has started a session.
    """
    ray = import_ray()
    if not ray.is_initialized():
        raise ValueError(
            "there is no Ray session. Open one on this machine, `with local_session(num_cpus=4):`, "
            "or join a cluster with ray.init(address=...)."
        )
    return ray


@contextlib.contextmanager
def local_session(
    num_cpus: int,
    *,
    object_store_bytes: int = 500_000_000,
    port: int | None = None,
    temp_dir: str | None = None,
) -> Iterator[ModuleType]:
    """A Ray session on this machine alone: every listener is on the loopback interface.

    Its processes end with it; those of other sessions are left alone.

    Args:
      num_cpus: What Ray counts on; an actor that asks for more than is left is never started.
      object_store_bytes: Shared memory for what travels: some parcels for each worker.
      port: Of Ray's control service, for other processes to join at; ``None`` picks a free one.
      temp_dir: Where Ray keeps its logs and sockets; ``None``: below ``/tmp``. The path must be
        short, because sockets lie in it.

    Yields:
      The package ``ray``.

    Raises:
      ImportError: Ray is not installed.
      ValueError: a session is open already, the port is taken, or Ray was imported before in a way
        in which it listens to the network.
    """
    ray = import_ray()
    if ray.is_initialized():
        raise ValueError("a Ray session is open already; leave it with ray.shutdown() first.")
    if port is not None:
        _check_free(port)
    environment = dict(ENVIRONMENT)
    if port is not None:
        environment["RAY_GCS_SERVER_PORT"] = str(port)
    # Ray ends the process in its own way from then on.
    in_main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM) if in_main else None
    try:
        with _set_in_environment(environment), forks_expected():
            ray.init(
                address="local",
                num_cpus=num_cpus,
                object_store_memory=object_store_bytes,
                include_dashboard=False,
                log_to_driver=False,
                _node_ip_address=LOOPBACK,
                _temp_dir=temp_dir,
            )
        here = ray.util.get_node_ip_address()
        if here != LOOPBACK:
            raise ValueError(
                f"Ray listens at {here}: it was imported before RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER "
                "was set to 0. Import jdml.communicate.pace.ray_backend first, or set it yourself."
            )
        yield ray
    finally:
        ray.shutdown()
        sweep()
        if before is not None:
            signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def forks_expected() -> Iterator[None]:
    """Ray forks its processes off this one, which then begin anew; JAX warns of any fork."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"os\.fork\(\) was called", RuntimeWarning)
        warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
        yield


def _check_free(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError as error:
            raise ValueError(
                f"local_session(port={port}): {LOOPBACK}:{port} cannot be had ({error.strerror}). "
                "End what listens there, choose another port, or leave the choice to Ray with "
                "port=None."
            ) from error


@contextlib.contextmanager
def _set_in_environment(values: Mapping[str, str]) -> Iterator[None]:
    added = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)
