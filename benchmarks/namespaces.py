"""Processes on one machine that talk over real links of a chosen speed.

Each worker gets a network namespace and a host name of its own, so that nothing can take a short
cut through shared memory or the loopback device, and the kernel's interface counters say what a
worker sent. A further namespace holds the bridge that joins them: no packet leaves this group,
and the machine's own network is not touched. Linux and root only; elsewhere `linked_workers`
raises `NamespacesUnavailable`, with the reason.

A worker's host name must resolve to its address on the link, since that is where Gloo listens:
``ip netns exec`` mounts ``/etc/netns/NAME/hosts`` over ``/etc/hosts`` for that purpose.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

INTERFACE = "e0"
_PREFIX = "jdml"
_HOSTS = Path("/etc/netns")
_COMMAND_TIMEOUT_S = 30


class NamespacesUnavailable(RuntimeError):
    """This machine or this user may not make network namespaces."""


@dataclass(frozen=True)
class LinkedWorker:
    """One network namespace with one link to the others; ``namespace`` is its host name too."""

    namespace: str
    address: str

    def command(self, *args: str) -> list[str]:
        """The command line that runs `args` inside the namespace, as the process itself."""
        rename_and_run = 'hostname "$0" && exec "$@"'
        inside = ["unshare", "--uts", "sh", "-c", rename_and_run, self.namespace, *args]
        return ["ip", "netns", "exec", self.namespace, *inside]


def sent_bytes() -> int:
    """Bytes sent so far over the link; call it inside a worker."""
    return int(Path(f"/sys/class/net/{INTERFACE}/statistics/tx_bytes").read_text())


@contextlib.contextmanager
def linked_workers(
    num_workers: int, megabits_per_s: float | None = None
) -> Iterator[list[LinkedWorker]]:
    """Makes `num_workers` namespaces joined by a bridge, and removes them whatever happens.

    Args:
      num_workers: 1 to 250.
      megabits_per_s: what each worker may send, in 10^6 bit/s; None leaves links as fast as they
        are.

    Raises:
      NamespacesUnavailable: not Linux, a tool is missing, or the kernel refused.
    """
    if not 1 <= num_workers <= 250:
        raise ValueError(f"num_workers must be between 1 and 250, got {num_workers}")
    if megabits_per_s is not None and megabits_per_s <= 0:
        raise ValueError(f"megabits_per_s must be positive, got {megabits_per_s}")
    _require_tools()
    _remove_abandoned()
    # The process id in the name keeps concurrent runs apart and tells whose namespaces are stale.
    group = f"{_PREFIX}-{os.getpid()}-{time.monotonic_ns() % 10**6}"
    workers = [LinkedWorker(f"{group}-w{i}", f"10.77.0.{i + 1}") for i in range(num_workers)]
    with _terminated_means_cleaned():
        try:
            try:
                _build(f"{group}-bridge", workers, megabits_per_s)
            except subprocess.CalledProcessError as error:
                raise NamespacesUnavailable(
                    "network namespaces are not permitted here (root on Linux is needed): "
                    f"{' '.join(error.cmd)!r} said {error.stderr.strip()!r}"
                ) from error
            yield workers
        finally:
            _remove([f"{group}-bridge", *(worker.namespace for worker in workers)])


def shape(workers: Sequence[LinkedWorker], megabits_per_s: float | None) -> None:
    """Sets what each worker may send from now on, in 10^6 bit/s; None lifts the limit.

    A link that was idle sends a burst at full speed: 10 ms' worth, but 64 KiB at least, or packets
    of that size would be taken apart, and 256 KiB at most, or it would be a present.
    """
    for worker in workers:
        device = ["tc", "-n", worker.namespace, "qdisc"]
        if megabits_per_s is None:
            with contextlib.suppress(subprocess.CalledProcessError):  # there is none
                _run(*device, "delete", "dev", INTERFACE, "root")
            continue
        burst = min(max(64 * 1024, round(megabits_per_s * 1e6 / 8 * 0.010)), 256 * 1024)
        rate = ["tbf", "rate", f"{megabits_per_s}mbit", "burst", f"{burst}b", "latency", "400ms"]
        _run(*device, "replace", "dev", INTERFACE, "root", *rate)


def run_together(
    commands: Sequence[Sequence[str]], timeout_s: float, env: dict[str, str] | None = None
) -> list[str]:
    """Runs the commands at once and returns what each printed; the first failure ends them all.

    Raises:
      RuntimeError: a command failed or the time was up; carries the end of its standard error.
    """
    with contextlib.ExitStack() as stack:
        outputs = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in commands]
        errors = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in commands]
        processes = []
        stack.callback(_end, processes)
        for command, out, err in zip(commands, outputs, errors, strict=True):
            processes.append(subprocess.Popen(command, stdout=out, stderr=err, env=env))
        deadline = time.monotonic() + timeout_s
        while any(process.poll() is None for process in processes):
            if any(process.poll() for process in processes):
                break
            if time.monotonic() > deadline:
                tails = "\n".join(f"[{i}] {_tail(err)}" for i, err in enumerate(errors))
                raise RuntimeError(f"workers still running after {timeout_s:.0f} s\n{tails}")
            time.sleep(0.05)
        for i, process in enumerate(processes):
            if process.poll():
                code = process.returncode
                raise RuntimeError(f"worker {i} ended with status {code}\n{_tail(errors[i])}")
        for out in outputs:
            out.seek(0)
        return [out.read() for out in outputs]


def _build(bridge: str, workers: list[LinkedWorker], megabits_per_s: float | None) -> None:
    _run("ip", "netns", "add", bridge)
    _run("ip", "-n", bridge, "link", "add", "br0", "type", "bridge")
    _run("ip", "-n", bridge, "link", "set", "br0", "up")
    hosts = "127.0.0.1 localhost\n" + "".join(f"{w.address} {w.namespace}\n" for w in workers)
    for i, worker in enumerate(workers):
        name = worker.namespace
        folder = _HOSTS / name
        try:
            folder.mkdir(parents=True)
            (folder / "hosts").write_text(hosts)
        except OSError as error:
            raise NamespacesUnavailable(f"cannot write {folder}/hosts: {error}") from error
        _run("ip", "netns", "add", name)
        peer = ["peer", "name", INTERFACE, "netns", name]
        _run("ip", "-n", bridge, "link", "add", f"p{i}", "type", "veth", *peer)
        _run("ip", "-n", bridge, "link", "set", f"p{i}", "master", "br0", "up")
        _run("ip", "-n", name, "addr", "add", f"{worker.address}/24", "dev", INTERFACE)
        _run("ip", "-n", name, "link", "set", "lo", "up")
        _run("ip", "-n", name, "link", "set", INTERFACE, "up")
    if megabits_per_s is not None:
        shape(workers, megabits_per_s)


def _remove(namespaces: list[str]) -> None:
    """Ends what still runs in the namespaces and deletes them; absent ones are no error."""
    present = {line.split()[0] for line in _run("ip", "netns", "list").splitlines() if line}
    for name in namespaces:
        if name in present:
            for pid in _run("ip", "netns", "pids", name).split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            _run("ip", "netns", "delete", name)
        shutil.rmtree(_HOSTS / name, ignore_errors=True)
    with contextlib.suppress(OSError):  # not empty: somebody else's
        _HOSTS.rmdir()


def _remove_abandoned() -> None:
    """Removes what a run that was killed outright left behind, and nothing of a living one."""
    names = {line.split()[0] for line in _run("ip", "netns", "list").splitlines() if line}
    if _HOSTS.is_dir():
        names |= {path.name for path in _HOSTS.iterdir()}
    abandoned = []
    for name in sorted(names):
        prefix, _, rest = name.partition("-")
        pid = rest.partition("-")[0]
        if prefix == _PREFIX and pid.isdigit() and not Path(f"/proc/{pid}").exists():
            abandoned.append(name)
    if abandoned:
        _remove(abandoned)


def _require_tools() -> None:
    if sys.platform != "linux":
        raise NamespacesUnavailable(f"network namespaces need Linux, this is {sys.platform}")
    missing = [tool for tool in ("ip", "tc", "unshare", "hostname") if shutil.which(tool) is None]
    if missing:
        raise NamespacesUnavailable(
            f"missing {', '.join(missing)} (in the packages iproute2, util-linux, hostname)"
        )
    if os.geteuid() != 0:
        raise NamespacesUnavailable("making network namespaces needs root")


def _run(*command: str) -> str:
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=_COMMAND_TIMEOUT_S
    )
    return done.stdout


def _end(processes: list[subprocess.Popen]) -> None:
    for process in processes:
        if process.poll() is None:
            process.kill()
    for process in processes:
        process.wait()


def _tail(file, num_chars: int = 3000) -> str:
    file.seek(0)
    return file.read()[-num_chars:]


@contextlib.contextmanager
def _terminated_means_cleaned() -> Iterator[None]:
    """SIGTERM raises SystemExit, as Ctrl-C raises KeyboardInterrupt, so that `finally` runs."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(signum, frame):
        raise SystemExit(128 + signum)

    previous = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
