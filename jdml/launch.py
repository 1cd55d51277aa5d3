"""Run a script as several processes on this machine: ``python -m jdml.launch -n 4 -- SCRIPT …``.

Each process runs ``python SCRIPT …`` (or ``python -m module …``) and joins the others when it
calls ``jdml.sharding.initialize()``. Without ``--gpu`` they simulate hosts on the CPU. Lines of
output carry the number of their process. When one process fails, all are ended and its exit code
becomes this program's.
"""

import argparse
import ctypes
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

_GRACE_SECONDS = 3.0  # between asking a process to end and killing it
_PR_SET_PDEATHSIG = 1


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m jdml.launch",
        description="Run a script as several processes on this machine.",
        usage="%(prog)s -n N [--devices-per-process K] [--gpu] [--port PORT] -- SCRIPT [args …]",
    )
    parser.add_argument("-n", "--num-processes", type=_positive, required=True)
    parser.add_argument(
        "--devices-per-process",
        type=_positive,
        default=1,
        help="simulated CPU devices, or with --gpu GPUs, of each process (default 1)",
    )
    parser.add_argument("--gpu", action="store_true", help="give each process GPUs of its own")
    parser.add_argument("--port", type=int, help="of the coordinator on 127.0.0.1 (a free one)")
    parser.add_argument(
        "command", nargs="+", metavar="SCRIPT", help="script, or -m module, and its arguments"
    )
    options = parser.parse_args(arguments)
    return run(
        [sys.executable, "-c", _CHILD, *options.command],
        num_processes=options.num_processes,
        devices_per_process=options.devices_per_process,
        gpu=options.gpu,
        port=options.port,
    )


_CHILD = "import jdml.launch; jdml.launch.child()"


def child() -> None:
    """Run the script of ``sys.argv`` in place of the interpreter, and note how it fails.

    ``sys.exit(3)`` leaves no trace for exit functions, so that JAX would wait for the others.
    """
    del sys.argv[0]
    try:
        if sys.argv[0] == "-m":
            del sys.argv[0]
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            script = Path(sys.argv[0])
            sys.path[0] = str(script.resolve().parent)
            names = sys.modules["__main__"].__dict__
            names["__file__"] = str(script)
            exec(compile(script.read_bytes(), str(script), "exec"), names)
    except SystemExit as leaving:
        if "jdml.sharding.leaving" in sys.modules:
            failed = 0 if leaving.code is None else 1
            code = leaving.code & 0xFF if isinstance(leaving.code, int) else failed
            sys.modules["jdml.sharding.leaving"].note_failure(code)
        raise


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {number}")
    return number


def run(
    command: Sequence[str],
    *,
    num_processes: int,
    devices_per_process: int = 1,
    gpu: bool = False,
    port: int | None = None,
) -> int:
    """Start ``command`` ``num_processes`` times and wait; what ``main`` does after parsing.

    Returns:
      0 if all succeeded; else the exit code of the first that failed (128 + signal if a signal
      ended it); 130 after Ctrl-C.
    """
    port = port or _free_port()
    started: list[subprocess.Popen[bytes]] = []
    pumps: list[threading.Thread] = []
    lock = threading.Lock()
    stopped: list[int] = []
    die_with_parent = _death_with_parent()
    previous = {
        number: signal.signal(number, lambda got, _: stopped.append(got))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        for rank in range(num_processes):
            started.append(
                subprocess.Popen(
                    list(command),
                    env=_environment(rank, num_processes, devices_per_process, gpu, port),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    start_new_session=True,
                    preexec_fn=die_with_parent,
                )
            )
        for rank, process in enumerate(started):
            for source, target in ((process.stdout, sys.stdout), (process.stderr, sys.stderr)):
                pump = threading.Thread(
                    target=_pump, args=(rank, source, target, lock), daemon=True
                )
                pump.start()
                pumps.append(pump)
        code = _wait(started, stopped)
    finally:
        _end(started, stopped[0] if stopped else signal.SIGTERM)
        for pump in pumps:
            pump.join(timeout=_GRACE_SECONDS)
        for number, handler in previous.items():
            signal.signal(number, handler)
    return code


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _environment(rank: int, num: int, num_devices: int, gpu: bool, port: int) -> dict[str, str]:
    environment = dict(os.environ)
    environment |= {
        "JDML_COORDINATOR": f"127.0.0.1:{port}",
        "JDML_NUM_PROCESSES": str(num),
        "JDML_PROCESS_ID": str(rank),
        "PYTHONUNBUFFERED": "1",
    }
    if gpu:
        mine = range(rank * num_devices, (rank + 1) * num_devices)
        environment["JAX_LOCAL_DEVICE_IDS"] = ",".join(map(str, mine))
        return environment
    environment["JAX_PLATFORMS"] = "cpu"
    environment["JAX_NUM_CPU_DEVICES"] = str(num_devices)
    # JAX refuses to be told the number of devices twice.
    flags = re.sub(
        r"--xla_force_host_platform_device_count=\d+", "", environment.get("XLA_FLAGS", "")
    )
    environment["XLA_FLAGS"] = flags.strip()
    return environment


def _death_with_parent() -> Callable[[], object] | None:
    """What has the kernel end a child when the launcher is killed outright (Linux)."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl  # looked up here: between fork and exec as little as possible
    return lambda: prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _pump(rank: int, source: IO[bytes], target: IO[str], lock: threading.Lock) -> None:
    for line in source:
        text = line.decode(errors="replace")
        with lock:
            target.write(f"[{rank}] {text}" if text.endswith("\n") else f"[{rank}] {text}\n")
            target.flush()


def _wait(started: Sequence[subprocess.Popen[bytes]], stopped: list[int]) -> int:
    while True:
        codes = [process.poll() for process in started]
        if stopped:
            name = signal.Signals(stopped[0]).name
            print(f"launch: {name}; ending {len(started)} processes", file=sys.stderr, flush=True)
            return 128 + stopped[0]
        failed = [(rank, code) for rank, code in enumerate(codes) if code]
        if failed:
            rank, code = failed[0]
            how = f"exited with code {code}"
            if code < 0:
                how, code = f"was ended by {signal.Signals(-code).name}", 128 - code
            print(f"launch: process {rank} {how}; ending the others", file=sys.stderr, flush=True)
            return code
        if all(code == 0 for code in codes):
            return 0
        time.sleep(0.05)


def _end(started: Sequence[subprocess.Popen[bytes]], kindly: int) -> None:
    """End what still runs, with its children: first kindly, then not.

    JAX's preemption notice catches SIGTERM and goes on, so the second round is the rule.
    """
    for number in (kindly, signal.SIGKILL):
        deadline = time.monotonic() + _GRACE_SECONDS
        for process in started:
            if process.poll() is None:
                os.killpg(process.pid, number)
        while time.monotonic() < deadline and any(p.poll() is None for p in started):
            time.sleep(0.02)


if __name__ == "__main__":
    sys.exit(main())
