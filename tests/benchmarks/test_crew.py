"""A crew answers in its order, and says who failed and why."""

import sys
import time

import pytest

from benchmarks.crew import crew_of

WORKER = """
import sys, time
from benchmarks.crew import serve

def fail(worker):
    if worker == sys.argv[1]:
        print("out of paper", file=sys.stderr)
        sys.exit(3)
    time.sleep(60)

print("no answer, and no end of line", end="")
serve({
    "name": lambda: sys.argv[1],
    "add": lambda a, b: {"sum": a + b},
    "fail": fail,
    "sleep": lambda: time.sleep(60),
})
"""


def crew(num_workers: int, **options):
    return crew_of([[sys.executable, "-c", WORKER, str(i)] for i in range(num_workers)], **options)


def test_every_worker_answers_in_order():
    with crew(3) as three:
        assert three.ask("name") == ["0", "1", "2"]
        assert three.ask("add", a=1, b=2) == [{"sum": 3}] * 3


def test_the_one_that_failed_is_named_though_others_wait():
    start = time.monotonic()
    with (
        crew(2) as two,
        pytest.raises(RuntimeError, match=r"(?s)worker 1 ended with status 3.*out of paper"),
    ):
        two.ask("fail", worker="1")
    assert time.monotonic() - start < 40


def test_no_answer_in_time():
    with crew(1) as one, pytest.raises(RuntimeError, match=r"did not answer 'sleep'"):
        one.ask("sleep", timeout_s=0.2)
