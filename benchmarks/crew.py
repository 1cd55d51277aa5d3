"""Processes that answer questions, so that a benchmark can say whose turn it is.

The benchmark writes one line of JSON to each process and reads one back: ``Crew.ask`` on its side,
``serve`` on theirs. Several crews may stand side by side in the same namespaces, which lets methods
of different programs alternate round by round: who is not asked waits for its next line and takes
no processor time.
"""

from __future__ import annotations

import contextlib
import json
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO, Any

# Libraries print to standard output too (Gloo says who is connected); these lines are answers.
_MARK = "@answer "


class _Member:
    """One process, and the thread that reads its answers."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str] | None, errors: IO[str]):
        self.errors = errors
        self.answers: queue.Queue[str | None] = queue.Queue()
        self.process = subprocess.Popen(
            list(command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=None if env is None else dict(env),
        )
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            # Another thread of the process may have printed without a line's end.
            _, mark, answer = line.partition(_MARK)
            if mark:
                self.answers.put(answer)
        self.answers.put(None)

    def tell(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line)
        self.process.stdin.flush()

    def hang_up(self) -> None:
        """No more questions: ``serve`` returns."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.close()

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.reader.join(timeout=1)
        assert self.process.stdout is not None
        self.process.stdout.close()

    def tail(self, num_chars: int = 3000) -> str:
        """The end of its standard error."""
        self.errors.seek(0)
        return self.errors.read()[-num_chars:]


@contextlib.contextmanager
def crew_of(
    commands: Sequence[Sequence[str]],
    env: Mapping[str, str] | None = None,
    timeout_s: float = 300.0,
) -> Iterator[Crew]:
    """Starts the commands together, and ends them whatever happens.

    Args:
      commands: One command line per process; each must call :func:`serve`.
      env: Their environment.
      timeout_s: How long one answer may take.
    """
    members: list[_Member] = []
    with contextlib.ExitStack() as stack:
        try:
            for command in commands:
                errors = stack.enter_context(tempfile.TemporaryFile("w+"))
                members.append(_Member(command, env, errors))
            yield Crew(members, timeout_s)
        finally:
            for member in members:
                member.hang_up()
            deadline = time.monotonic() + 5
            for member in members:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    member.process.wait(timeout=max(0.1, deadline - time.monotonic()))
            for member in members:
                member.end()


class Crew:
    """Processes that answer questions; :func:`crew_of` starts them."""

    def __init__(self, members: Sequence[_Member], timeout_s: float) -> None:
        self._members = members
        self._timeout_s = timeout_s

    def ask(self, do: str, timeout_s: float | None = None, **arguments: Any) -> list[Any]:
        """Puts one question to every process and returns the answers, in their order.

        Raises:
          RuntimeError: a process ended or did not answer in time; carries the end of its standard
            error.
        """
        line = json.dumps({"do": do, **arguments}) + "\n"
        for i, member in enumerate(self._members):
            try:
                member.tell(line)
            except OSError:
                raise self._failure(i) from None
        limit = timeout_s or self._timeout_s
        deadline = time.monotonic() + limit
        answers: dict[int, Any] = {}
        while len(answers) < len(self._members):
            # In turns: the one that ended explains why the others wait.
            waiting = [i for i in range(len(self._members)) if i not in answers]
            for i in waiting:
                with contextlib.suppress(queue.Empty):
                    text = self._members[i].answers.get(timeout=0.02)
                    if text is None:
                        raise self._failure(i)
                    answers[i] = json.loads(text)
            if len(answers) < len(self._members) and time.monotonic() > deadline:
                tails = "\n".join(f"[{i}] {self._members[i].tail()}" for i in waiting)
                raise RuntimeError(f"workers {waiting} did not answer {do!r} in {limit} s\n{tails}")
        return [answers[i] for i in range(len(self._members))]

    def _failure(self, i: int) -> RuntimeError:
        member = self._members[i]
        with contextlib.suppress(subprocess.TimeoutExpired):
            member.process.wait(timeout=5)
        code = member.process.returncode
        return RuntimeError(f"worker {i} ended with status {code}\n{member.tail()}")


def serve(handlers: Mapping[str, Callable[..., Any]]) -> None:
    """Answers questions until there are no more: ``handlers[do](**arguments)``, as JSON."""
    for line in sys.stdin:
        question = json.loads(line)
        answer = handlers[question.pop("do")](**question)
        print(_MARK + json.dumps(answer), flush=True)
