"""All processes meet at the coordinator's address before JAX's own service starts there.

JAX aborts the whole interpreter when a process does not come in time, and does not say which.
Here process 0 listens first and knows who came, so that everybody gets an exception that names
the missing; the port is then free for JAX.
"""

import contextlib
import socket
import time

_GREETING = "jdml"
_GO, _NO = b"go\n", b"no "
_RETRY_SECONDS = 0.05


def meet(coordinator: str, num_processes: int, process_id: int, timeout: float) -> None:
    """Return when all processes are there; process 0 is the one that listens.

    Args:
      coordinator: ``"host:port"`` of process 0, as the others reach it.
      num_processes: processes in all.
      process_id: number of this one.
      timeout: seconds to wait for the others, or for process 0.

    Raises:
      TimeoutError: process 0 cannot be reached, or some process did not come; which.
      RuntimeError: two processes have the same number, or count differently many processes.
      OSError: process 0 cannot listen at the address (port in use, host not its own).
    """
    host, _, port = coordinator.rpartition(":")
    host = host.strip("[]")
    if not host or not port.isdigit():
        raise ValueError(f"expected a coordinator as 'host:port', got {coordinator!r}")
    deadline = time.monotonic() + timeout
    if process_id == 0:
        _gather(host, int(port), num_processes, deadline, timeout)
    else:
        _join(host, int(port), num_processes, process_id, deadline, timeout)


def _left(deadline: float) -> float:
    return max(deadline - time.monotonic(), 0.001)


def _line(connection: socket.socket, seconds: float) -> str:
    """One line from the other side; empty if it says nothing or goes away."""
    connection.settimeout(seconds)
    data = b""
    try:
        while not data.endswith(b"\n") and len(data) < 1000:
            received = connection.recv(1000)
            if not received:
                break
            data += received
    except OSError:
        return ""
    return data.decode(errors="replace").strip()


def _listen(host: str, port: int) -> socket.socket:
    if host in ("127.0.0.1", "localhost"):
        return socket.create_server((host, port))
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))


def _gather(host: str, port: int, num: int, deadline: float, timeout: float) -> None:
    present: dict[int, socket.socket] = {}
    problem = ""
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(_listen(host, port))
        while len(present) < num - 1 and not problem:
            server.settimeout(_left(deadline))
            try:
                connection, _ = server.accept()
            except TimeoutError:
                missing = sorted(set(range(1, num)) - set(present))
                raise TimeoutError(
                    f"process 0 waited {timeout:g} s at {host}:{port} for {num - 1} others; "
                    f"process {', '.join(map(str, missing))} did not come. Were they started, with "
                    "the same coordinator address, and do they call initialize()?"
                ) from None
            stack.enter_context(connection)
            words = _line(connection, min(5.0, _left(deadline))).split()
            if len(words) != 3 or words[0] != _GREETING:
                continue  # some other program that tried the port
            rank, count = int(words[1]), int(words[2])
            if count != num:
                problem = f"process 0 expects {num} processes, process {rank} expects {count}"
            elif rank in present or not 0 < rank < num:
                problem = f"two processes call themselves process {rank} (of {num})"
            else:
                present[rank] = connection
        told = [*present.values(), connection] if problem else list(present.values())
        for other in told:
            with contextlib.suppress(OSError):
                other.sendall(_NO + problem.encode() + b"\n" if problem else _GO)
        for other in told:  # closed first on their side: no TIME_WAIT on ours
            _line(other, 1.0)
    if problem:
        raise RuntimeError(f"{problem}; start each with its own process_id and one num_processes")


def _join(host: str, port: int, num: int, rank: int, deadline: float, timeout: float) -> None:
    reason = ""
    while time.monotonic() < deadline:
        try:
            with socket.create_connection((host, port), timeout=_left(deadline)) as connection:
                connection.sendall(f"{_GREETING} {rank} {num}\n".encode())
                answer = _line(connection, _left(deadline))
        except OSError as error:
            reason = str(error)
        else:
            if answer.encode() + b"\n" == _GO:
                return
            if answer.startswith(_NO.decode()):
                raise RuntimeError(answer[len(_NO) :])
            reason = "it closed the connection before all processes were there"
        time.sleep(_RETRY_SECONDS)
    raise TimeoutError(
        f"process {rank} of {num} could not meet process 0 at {host}:{port} within {timeout:g} s "
        f"({reason}). Is process 0 running there, does the name resolve to it, and is the port "
        "open between the hosts?"
    )
