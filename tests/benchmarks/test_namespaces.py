"""Namespaces come up joined, count what is sent, and are gone afterwards however the body ends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import namespaces
from benchmarks.namespaces import (
    NamespacesUnavailable,
    linked_workers,
    run_together,
    sent_bytes,
    shape,
)

ROOT = Path(__file__).resolve().parents[2]


def left_behind(pid: int) -> list[str]:
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True)
    names = [line.split()[0] for line in listed.stdout.splitlines() if line]
    hosts = Path("/etc/netns")
    names += [path.name for path in hosts.iterdir()] if hosts.is_dir() else []
    return [name for name in names if name.startswith(f"jdml-{pid}-")]


@pytest.fixture
def permitted() -> None:
    try:
        with linked_workers(1):
            pass
    except NamespacesUnavailable as reason:
        pytest.skip(f"no network namespaces on this machine: {reason}")


@pytest.mark.usefixtures("permitted")
def test_each_worker_has_its_own_name_and_one_link():
    show = "cat /proc/sys/kernel/hostname; getent hosts $(hostname); ls /sys/class/net"
    with linked_workers(2) as workers:
        printed = run_together([w.command("sh", "-c", show) for w in workers], timeout_s=30)
        for worker, text in zip(workers, printed, strict=True):
            name, hosts, *interfaces = text.splitlines()
            assert name == worker.namespace
            assert hosts.split() == [worker.address, worker.namespace]
            assert sorted(interfaces) == ["e0", "lo"]
    assert not left_behind(os.getpid())


@pytest.mark.usefixtures("permitted")
def test_counter_sees_what_is_sent_and_the_rate_holds():
    num_bytes, megabits_per_s = 2_000_000, 40.0
    receive = (
        "import socket\n"
        "server = socket.create_server(('', 5000))\n"
        "peer = server.accept()[0]\n"
        "while peer.recv(1 << 16): pass\n"
        "peer.send(b'!')\n"
    )
    send = (
        "import socket, sys, time\n"
        "from benchmarks.namespaces import sent_bytes\n"
        "for _ in range(100):\n"
        "    try: peer = socket.create_connection((sys.argv[1], 5000)); break\n"
        "    except ConnectionRefusedError: time.sleep(0.1)\n"
        "before, start = sent_bytes(), time.perf_counter()\n"
        f"peer.sendall(bytes({num_bytes})); peer.shutdown(socket.SHUT_WR); peer.recv(1)\n"
        "print(sent_bytes() - before, time.perf_counter() - start)\n"
    )
    with linked_workers(2, megabits_per_s) as workers:
        commands = [
            workers[0].command(sys.executable, "-c", receive),
            workers[1].command(sys.executable, "-c", send, workers[0].address),
        ]
        printed = run_together(commands, 60, dict(os.environ, PYTHONPATH=str(ROOT)))
    sent, seconds = map(float, printed[1].split())
    assert num_bytes <= sent <= 1.07 * num_bytes + 2000
    # A full bucket of 64 KiB leaves at once; the rest may not go faster than the rate.
    assert seconds >= 0.95 * (num_bytes - 64 * 1024) * 8 / (megabits_per_s * 1e6)


@pytest.mark.usefixtures("permitted")
def test_the_rate_changes_while_the_namespaces_live():
    with linked_workers(1, 10.0) as workers:

        def shaped() -> str:
            show = ["tc", "-n", workers[0].namespace, "qdisc", "show", "dev", "e0"]
            return subprocess.run(show, capture_output=True, text=True, check=True).stdout

        assert "tbf" in shaped()
        assert "rate 10Mbit" in shaped()
        shape(workers, 250.0)
        assert "rate 250Mbit" in shaped()
        shape(workers, None)
        assert "tbf" not in shaped()
        shape(workers, None)  # there is nothing to lift


@pytest.mark.usefixtures("permitted")
def test_removed_after_an_error_with_a_process_still_inside():
    started = []

    def fail_with_a_process_inside() -> None:
        with linked_workers(2) as workers:
            started.append(subprocess.Popen(workers[0].command("sleep", "600")))
            time.sleep(0.2)
            raise KeyError

    with pytest.raises(KeyError):
        fail_with_a_process_inside()
    (stray,) = started
    assert stray.wait(timeout=10) == -signal.SIGKILL
    assert not left_behind(os.getpid())


@pytest.mark.usefixtures("permitted")
@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGINT])
def test_removed_when_the_run_is_terminated(end):
    script = (
        "import signal, time\n"
        # A shell's background jobs, and so their children, ignore Ctrl-C.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from benchmarks.namespaces import linked_workers\n"
        "with linked_workers(2):\n"
        "    print('up', flush=True)\n"
        "    time.sleep(600)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=ROOT,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        assert left_behind(process.pid)
        process.send_signal(end)
        try:
            assert process.wait(timeout=30) != 0
        finally:
            process.kill()
    assert not left_behind(process.pid)


@pytest.mark.usefixtures("permitted")
def test_next_run_removes_what_a_killed_one_left():
    script = (
        "import os\n"
        "from benchmarks.namespaces import linked_workers\n"
        "with linked_workers(1):\n"
        "    print(os.getpid(), flush=True)\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    killed = int(done.stdout)
    with linked_workers(1):
        assert not left_behind(killed)


def test_first_failure_ends_the_others_and_says_why():
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=r"(?s)worker 1 ended with status 3.*out of paper"):
        run_together([["sleep", "60"], ["sh", "-c", "echo out of paper >&2; exit 3"]], 30)
    assert time.monotonic() - start < 20


def test_workers_that_never_end_are_ended():
    with pytest.raises(RuntimeError, match="still running after"):
        run_together([["sleep", "60"]], timeout_s=0.2)


def test_says_why_it_cannot(monkeypatch):
    monkeypatch.setattr(namespaces.shutil, "which", lambda tool: None if tool == "tc" else tool)
    with pytest.raises(NamespacesUnavailable, match=r"missing tc .*iproute2"), linked_workers(1):
        pass


@pytest.mark.skipif(sys.platform != "linux", reason="asks for root only where that would help")
def test_needs_root(monkeypatch):
    monkeypatch.setattr(namespaces.shutil, "which", lambda tool: tool)
    monkeypatch.setattr(namespaces.os, "geteuid", lambda: 1000)
    with pytest.raises(NamespacesUnavailable, match="root"), linked_workers(1):
        pass


@pytest.mark.parametrize(("num_workers", "rate"), [(0, None), (251, None), (2, 0.0), (2, -1.0)])
def test_bad_arguments(num_workers, rate):
    with pytest.raises(ValueError, match="must be"), linked_workers(num_workers, rate):
        pass


def test_counter_outside_a_worker_names_the_interface():
    if Path("/sys/class/net/e0").exists():
        pytest.skip("this machine has an interface called e0")
    with pytest.raises(OSError, match="e0"):
        sent_bytes()
