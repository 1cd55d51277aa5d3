"""The launcher, on scripts too small to need JAX."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jdml import launch

ROOT = Path(__file__).parents[1]
SECONDS = 30  # nothing here takes more than a few; a hang must not stop the suite


def write(tmp_path, text):
    script = tmp_path / "script.py"
    script.write_text("import os, sys, time\nrank = int(os.environ['JDML_PROCESS_ID'])\n" + text)
    return str(script)


def launched(*arguments, env=None):
    begin = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "jdml.launch", *arguments],
        cwd=ROOT,
        env=os.environ | (env or {}),
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    return done, time.monotonic() - begin


def is_running(pid):
    """A process that has ended but that nobody has waited for does not run."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_gone(pids):
    deadline = time.monotonic() + 5
    while (left := [pid for pid in pids if is_running(pid)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


def test_output_carries_the_process_and_arguments_arrive(tmp_path):
    script = write(
        tmp_path,
        "print(rank, 'of', os.environ['JDML_NUM_PROCESSES'], sys.argv[1:], __name__)\n"
        "print('to stderr', file=sys.stderr)\nprint('no newline', end='')\n",
    )
    done, _ = launched("-n", "2", "--", script, "--lr", "0.1", "--", "-n", "7")
    assert done.returncode == 0, done.stderr
    expected = []
    for rank in (0, 1):
        said = f"{rank} of 2 ['--lr', '0.1', '--', '-n', '7'] __main__"
        expected += [f"[{rank}] {said}", f"[{rank}] no newline"]
    assert sorted(done.stdout.splitlines()) == sorted(expected)
    assert sorted(done.stderr.splitlines()) == ["[0] to stderr", "[1] to stderr"]


def test_a_script_finds_its_neighbours_and_a_module_is_found_by_name(tmp_path):
    (tmp_path / "neighbour.py").write_text("print('found', __name__)")
    done, _ = launched("-n", "1", "--", write(tmp_path, "import neighbour\n"))
    assert done.stdout == "[0] found neighbour\n"
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done, _ = launched("-n", "1", "--", "-m", "neighbour", env={"PYTHONPATH": path})
    assert done.stdout == "[0] found __main__\n"


@pytest.mark.parametrize(
    ("end", "code", "how"),
    [
        ("sys.exit(3)", 3, "process 1 exited with code 3"),
        ("raise KeyError('lost')", 1, "process 1 exited with code 1"),
        ("os.kill(os.getpid(), 9)", 137, "process 1 was ended by SIGKILL"),
    ],
)
def test_when_one_dies_all_end_with_its_code(tmp_path, end, code, how):
    script = write(
        tmp_path,
        f"if rank == 1:\n    {end}\nprint(os.getpid(), flush=True)\ntime.sleep(60)\n",
    )
    done, seconds = launched("-n", "3", "--", script)
    assert done.returncode == code
    assert how in done.stderr
    assert seconds < 20
    pids = [int(line.split()[1]) for line in done.stdout.splitlines()]
    assert wait_until_gone(pids) == []


def test_processes_that_ignore_the_request_to_end_are_killed(tmp_path):
    script = write(
        tmp_path,
        "import signal\nready = sys.argv[1]\n"
        "if rank == 0:\n"
        "    signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "    child = os.fork()\n"
        "    os.write(1, f'pid {os.getpid()}\\n'.encode())\n"  # in one piece: two share the pipe
        "    if child: open(ready, 'w').close()\n"
        "    time.sleep(60)\n"
        "while not os.path.exists(ready): time.sleep(0.01)\n"
        "sys.exit(5)\n",
    )
    done, seconds = launched("-n", "2", "--", script, str(tmp_path / "ready"))
    assert done.returncode == 5
    assert seconds < 20
    pids = [int(line.split()[2]) for line in done.stdout.splitlines()]
    assert pids
    assert wait_until_gone(pids) == []


@pytest.mark.parametrize(
    ("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)]
)
def test_stopping_the_launcher_stops_all(tmp_path, sent, code):
    if sent == signal.SIGKILL and sys.platform != "linux":
        pytest.skip("only Linux ends the children of a killed process")
    script = write(tmp_path, "print(os.getpid(), flush=True)\ntime.sleep(60)\n")
    launcher = subprocess.Popen(
        [sys.executable, "-m", "jdml.launch", "-n", "2", "--", script],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert launcher.stdout is not None
        pids = [int(launcher.stdout.readline().split()[1]) for _ in range(2)]
        launcher.send_signal(sent)
        assert launcher.wait(timeout=SECONDS) == code
        assert wait_until_gone(pids) == []
    finally:
        launcher.kill()
        launcher.wait()
        launcher.stdout.close()


def test_what_each_process_is_told(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_a=1 --xla_force_host_platform_device_count=8 --xla_b")
    cpu = launch._environment(rank=1, num=2, num_devices=4, gpu=False, port=1234)
    assert cpu["JDML_COORDINATOR"] == "127.0.0.1:1234"
    assert (cpu["JDML_PROCESS_ID"], cpu["JDML_NUM_PROCESSES"]) == ("1", "2")
    assert (cpu["JAX_PLATFORMS"], cpu["JAX_NUM_CPU_DEVICES"]) == ("cpu", "4")
    assert cpu["XLA_FLAGS"].split() == ["--xla_a=1", "--xla_b"]
    gpu = launch._environment(rank=1, num=2, num_devices=2, gpu=True, port=1234)
    assert gpu["JAX_LOCAL_DEVICE_IDS"] == "2,3"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-n", "0", "--", "x.py"], "expected at least 1, got 0"),
        (["-n", "2"], "SCRIPT"),
        (["--", "x.py"], "-n"),
    ],
)
def test_usage_errors(capsys, arguments, message):
    with pytest.raises(SystemExit):
        launch.main(arguments)
    assert message in capsys.readouterr().err
