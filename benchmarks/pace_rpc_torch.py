"""A parameter server over PyTorch RPC: what ``benchmarks.pace_ray`` compares with.

Rank 0 holds the parameters and applies what it is sent, rank 1 pushes a gradient and pulls the
parameters, each by one ``rpc_sync``: the pattern of PyTorch's tutorials. Run by that benchmark.
"""

from __future__ import annotations

import argparse
import os
import time

import torch
from torch.distributed import rpc

from benchmarks.crew import serve

SCALE = 0.25
held: list[torch.Tensor] = []


def push(update: list[torch.Tensor]) -> None:
    for x, u in zip(held, update, strict=True):
        x.add_(u, alpha=SCALE)


def pull() -> list[torch.Tensor]:
    return held


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--sizes", type=int, nargs="+", required=True, help="f32 of each leaf")
    options = parser.parse_args()
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(options.port)})
    torch.manual_seed(options.rank)
    leaves = [torch.randn(size) for size in options.sizes]
    held.extend(leaves)
    rpc.init_rpc(("server", "worker")[options.rank], rank=options.rank, world_size=2)

    def exchange() -> float | None:
        """Seconds of a push and the pull after it."""
        if options.rank == 0:
            return None
        began = time.perf_counter()
        rpc.rpc_sync("server", push, args=(leaves,))
        pulled = rpc.rpc_sync("server", pull)
        seconds = time.perf_counter() - began
        assert [x.numel() for x in pulled] == options.sizes
        return seconds

    serve({"exchange": exchange})
    rpc.shutdown(graceful=False)


if __name__ == "__main__":
    main()
