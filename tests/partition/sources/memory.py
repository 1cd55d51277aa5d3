"""Resident memory in MB, as Linux counts it, and Python processes that are asked for theirs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

needs_proc = pytest.mark.skipif(
    not Path("/proc/self/smaps_rollup").exists(),
    reason="resident sizes are read from Linux's /proc",
)


def start(program: str, *arguments: str) -> subprocess.Popen:
    """A Python process that runs the program with pipes to talk to it."""
    here = Path(__file__).parents[3]
    environment = {**os.environ, "PYTHONPATH": str(here), "OPENBLAS_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )


def run(program: str, *arguments: str) -> list[float]:
    """The numbers that the program printed."""
    process = start(program, *arguments)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out
    return [float(word) for word in out.split()]


MEASURE = """
import pathlib

def held(what, file="smaps_rollup"):
    "Of Rss, Pss_Anon or (of status) VmHWM, in MB."
    for line in pathlib.Path("/proc/self", file).read_text().splitlines():
        if line.startswith(what + ":"):
            return int(line.split()[1]) / 1024

def mapped(what, folder):
    "The same of the files in a folder that are mapped."
    total, inside = 0, False
    for line in pathlib.Path("/proc/self/smaps").read_text().splitlines():
        first = line.split(None, 1)[0]
        if not first.endswith(":"):
            inside = folder in line
        elif inside and first == what + ":":
            total += int(line.split()[1]) / 1024
    return total

def forget_peak():
    "VmHWM counts from now."
    pathlib.Path("/proc/self/clear_refs").write_text("5")
"""
