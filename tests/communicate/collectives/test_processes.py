"""The same exchanges between real processes: Gloo's collectives are others than those in memory."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.mark.slow
def test_every_topology_and_collective_among_four_processes():
    worker = "tests.communicate.collectives.worker"
    done = subprocess.run(
        [sys.executable, "-m", "jdml.launch", "-n", "4", "--", "-m", worker],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
