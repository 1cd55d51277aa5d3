"""One worker that takes means with PyTorch over Gloo: the other side of ``exchange_jdml``.

``all_reduce`` alone, and DistributedDataParallel with its communication hooks: a model whose
backward pass hands over gradients that are there already, so that a round is DDP's exchange.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks import (
    default_hooks,
    powerSGD_hook,
    quantization_hooks,
)
from torch.nn.parallel import DistributedDataParallel

from benchmarks.crew import serve
from benchmarks.namespaces import sent_bytes

NUM_MATRICES = 4
# DDP's default is 25 MB after a first bucket of 1 MB. The hooks of PowerSGD and quantisation wait
# for one exchange in the callback of another, on Gloo's two threads: with two buckets under way
# each may take one, and they wait for ever (seen with torch 2.13). One bucket holds everything.
BUCKET_MB = 512


def bf16_hook(state, bucket):
    """PyTorch's hook under another name: DDP refuses it by its name unless on NCCL."""
    return default_hooks.bf16_compress_hook(state, bucket)


class _Gathered:
    """An all-gather whose future holds one stacked tensor in a list, as NCCL's does."""

    def __init__(self, work: Any) -> None:
        self.work = work

    def get_future(self) -> Any:
        return self.work.get_future().then(lambda done: [torch.stack(list(done.value()))])


class _LikeNCCL:
    """``torch.distributed`` with that all-gather.

    PyTorch's quantisation hooks read the result as NCCL gives it and raise on Gloo's.
    """

    def __getattr__(self, name: str) -> Any:
        return getattr(dist, name)

    def all_gather(self, outputs: Any, x: Any, group: Any = None, async_op: bool = True) -> Any:
        del async_op
        return _Gathered(dist.all_gather(outputs, x, group=group, async_op=True))


def register(model: DistributedDataParallel, hook: str) -> None:
    """Registers the hook of that name; ``"f32"`` is DDP as it is."""
    if hook == "fp16":
        model.register_comm_hook(None, default_hooks.fp16_compress_hook)
    elif hook == "bf16":
        model.register_comm_hook(None, bf16_hook)
    elif hook.startswith("PowerSGD"):
        state = powerSGD_hook.PowerSGDState(
            None, matrix_approximation_rank=int(hook.split()[-1]), start_powerSGD_iter=2
        )
        model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    elif hook in ("int8 per tensor", "int8 per 512"):
        quantization_hooks.dist = _LikeNCCL()  # type: ignore[attr-defined]
        per_tensor = quantization_hooks.quantization_pertensor_hook
        per_channel = quantization_hooks.quantization_perchannel_hook
        model.register_comm_hook(None, per_tensor if hook.endswith("tensor") else per_channel)
    elif hook != "f32":
        raise ValueError(f"no hook {hook!r}")


class _Give(torch.autograd.Function):
    """Zero, whose gradient with respect to each argument is a tensor prepared beforehand."""

    @staticmethod
    def forward(ctx: Any, gradients: list[torch.Tensor], *weights: torch.Tensor) -> torch.Tensor:
        ctx.gradients = gradients
        return torch.zeros((), requires_grad=True)

    @staticmethod
    def backward(ctx: Any, _: torch.Tensor) -> tuple[Any, ...]:
        return None, *ctx.gradients


class _Giving(torch.nn.Module):
    def __init__(self, gradients: list[torch.Tensor]) -> None:
        super().__init__()
        self.gradients = gradients
        self.weights = torch.nn.ParameterList(
            [torch.nn.Parameter(torch.zeros_like(g)) for g in gradients]
        )

    def forward(self) -> torch.Tensor:
        return _Give.apply(self.gradients, *self.weights)


class Worker:
    """Methods ready to run in turns."""

    def __init__(self, job: argparse.Namespace) -> None:
        self.job = job
        self.methods: dict[str, Callable[[], list[torch.Tensor]]] = {}

    def _values(self, worker: int) -> torch.Tensor:
        draw = np.random.default_rng((self.job.seed, worker))
        size = NUM_MATRICES * self.job.side**2
        return torch.from_numpy(draw.standard_normal(size, dtype=np.float32))

    def prepare(self, name: str) -> dict[str, Any]:
        """Runs a method until it has settled; says how wrong its mean is then.

        DDP lays its buckets out anew after the first round, PowerSGD starts in the third.
        """
        x, side = self._values(self.job.worker), self.job.side
        if name == "all_reduce":
            buffer = torch.empty_like(x)

            def once() -> list[torch.Tensor]:
                buffer.copy_(x)
                dist.all_reduce(buffer)
                return [buffer.div_(self.job.num_workers)]

        else:
            gradients = list(x.reshape(NUM_MATRICES, side, side).unbind())
            model = DistributedDataParallel(_Giving(gradients), bucket_cap_mb=BUCKET_MB)
            register(model, name)

            def once() -> list[torch.Tensor]:
                model.zero_grad(set_to_none=False)
                model().backward()
                return [w.grad.reshape(-1) for w in model.module.weights]

        for _ in range(4):
            mean = torch.cat(once())
        exact = sum(self._values(i).double() for i in range(self.job.num_workers))
        exact /= self.job.num_workers
        error = torch.linalg.norm(mean.double() - exact) / torch.linalg.norm(exact)
        self.methods[name] = once
        return {"relative_error": float(error)}

    def round(self, name: str, number: int) -> dict[str, float]:
        """One mean: when it began and ended (a clock that all processes share), bytes sent."""
        del number
        dist.barrier()
        sent, start = sent_bytes(), time.perf_counter()
        self.methods[name]()
        end = time.perf_counter()
        dist.barrier()
        return {"start": start, "end": end, "sent": sent_bytes() - sent}


def main() -> None:
    """Joins the other processes and answers questions."""
    parser = argparse.ArgumentParser()
    for name in ("num-workers", "worker", "side", "seed"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--coordinator", required=True)
    job = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://{job.coordinator}",
        rank=job.worker,
        world_size=job.num_workers,
    )
    worker = Worker(job)
    serve({"prepare": worker.prepare, "round": worker.round})
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
