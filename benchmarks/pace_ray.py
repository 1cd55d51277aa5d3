"""A server in another process, beside Ray's own put and get, and beside PyTorch RPC.

Rows of ``python -m benchmarks.pace``. All take turns, round by round, with the same 50 MB, so that
a busy machine slows all of them; ratios are medians of each round's. Ray's own: 50 MB of update are
put and got, and then 50 MB of parameters, which is what a push and a pull move; nothing is applied.
PyTorch's rows are left out where it is not installed.
"""

import contextlib
import importlib.util
import os
import socket
import statistics
import sys
import time
from collections.abc import Callable, Iterator

from benchmarks.crew import Crew, crew_of
from benchmarks.pace import Figure, fifty_megabytes
from jdml.communicate.pace import Rule, add, asynchronous
from jdml.communicate.pace.connection import Connection
from jdml.communicate.pace.ray_backend import local_session, ray_server

TRIES = 25
WARM_UP = 20  # until the server has seen every page of the shared memory that is passed around
SCALE = 0.25


def ray_row() -> list[Figure]:
    params = fifty_megabytes()
    megabytes = sum(x.nbytes for x in params.values()) / 1e6
    updates = [fifty_megabytes(seed) for seed in (1, 2)]
    ours: list[float] = []
    own: list[float] = []
    torch: list[float] = []
    with contextlib.ExitStack() as stack:
        peers = stack.enter_context(_torch_peers([x.size for x in params.values()]))
        ray = stack.enter_context(local_session(num_cpus=2, object_store_bytes=400_000_000))
        server = ray_server(params, Rule(asynchronous(), add(SCALE)), 1)
        line = Connection(server, 0)
        version = line.pull().version
        for i in range(TRIES + WARM_UP):
            update = updates[i % 2]
            began = time.perf_counter()
            line.push(*line.encode(update), version)
            snapshot = line.pull()
            ours.append(time.perf_counter() - began)
            version = snapshot.version
            del snapshot  # so that Ray may use its memory again

            began = time.perf_counter()
            for tree in (update, params):
                ray.get(ray.put(tuple(tree.values())))
            own.append(time.perf_counter() - began)

            if peers is not None:
                torch.append(peers.ask("exchange")[1])
        server.stop()
    ours, own, torch = ours[WARM_UP:], own[WARM_UP:], torch[WARM_UP:]
    milliseconds = 1e3 * statistics.median(ours)
    figures = [
        Figure(
            "push and pull, Ray",
            milliseconds,
            "ms",
            note=f"{megabytes:.0f} MB each, applied; {2 * megabytes / milliseconds:.1f} GB/s",
        ),
        Figure(
            "rate of Ray's put and get",
            statistics.median(b / a for a, b in zip(ours, own, strict=True)),
            "of it",
            0.7,
            "at least",
            f"{1e3 * statistics.median(own):.0f} ms for the same bytes, nothing applied",
        ),
    ]
    if torch:
        figures.append(
            Figure(
                "rate of PyTorch RPC's parameter server",
                statistics.median(b / a for a, b in zip(ours, torch, strict=True)),
                "of it",
                1.0,
                "at least",
                f"{1e3 * statistics.median(torch):.0f} ms for the same bytes, applied in place",
            )
        )
    return figures


@contextlib.contextmanager
def _torch_peers(sizes: list[int]) -> Iterator[Crew | None]:
    """A server and a worker over PyTorch RPC on the loopback interface, if there is PyTorch."""
    if importlib.util.find_spec("torch") is None:
        yield None
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "benchmarks.pace_rpc_torch", "--port", str(port)]
    command += ["--sizes", *map(str, sizes)]
    environment = os.environ | {"TP_SOCKET_IFNAME": "lo", "GLOO_SOCKET_IFNAME": "lo"}
    with crew_of([[*command, "--rank", str(rank)] for rank in (0, 1)], environment) as peers:
        yield peers


ROWS: dict[str, Callable[[], list[Figure]]] = {}
"""By name, as in ``benchmarks.pace``; empty where Ray is not installed."""
if importlib.util.find_spec("ray") is not None:
    ROWS["ray"] = ray_row
