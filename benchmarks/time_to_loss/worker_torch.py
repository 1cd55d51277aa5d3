"""One worker that trains the twin with DistributedDataParallel over Gloo."""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from benchmarks.crew import serve
from benchmarks.exchange_torch import BUCKET_MB, register
from benchmarks.namespaces import sent_bytes
from benchmarks.time_to_loss.problem import (
    BETAS,
    CLIP,
    EPSILON,
    WEIGHT_DECAY,
    Problem,
    Shape,
    is_decayed,
)
from benchmarks.time_to_loss.twin import Twin, to_jdml, to_torch

ALONE = "alone"
"""The step without its exchange (``no_sync``), each worker for itself."""


class Worker:
    """A model and its optimiser."""

    def __init__(self, job: argparse.Namespace) -> None:
        self.problem = Problem(job.problem, job.worker, job.num_workers)
        self.shape = Shape(**json.loads(job.shape))
        self.job = job
        self.alone = False

    def start(self, name: str) -> dict[str, Any]:
        """Back to the initial weights, with this hook."""
        self.alone = name == ALONE
        model = Twin(self.shape)
        model.load_state_dict(to_torch(self.problem.weights, self.shape))
        # DDP's own buckets overlap the exchange with the backward pass; see BUCKET_MB for the rest.
        one_bucket = name.startswith(("PowerSGD", "int8"))
        options = {"bucket_cap_mb": BUCKET_MB} if one_bucket else {}
        self.model = DistributedDataParallel(model, **options)
        if not self.alone:
            register(self.model, name)
        named = list(model.named_parameters())
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [p for n, p in named if is_decayed(n)], "weight_decay": WEIGHT_DECAY},
                {"params": [p for n, p in named if not is_decayed(n)], "weight_decay": 0.0},
            ],
            betas=BETAS,
            eps=EPSILON,
        )
        self.number = 0
        return {"num_params": sum(p.numel() for p in model.parameters())}

    def train(self, steps: int) -> dict[str, Any]:
        """The next steps: losses, when each ended (a clock that all share), bytes sent."""
        losses, ends = [], []
        sent, begin = sent_bytes(), time.perf_counter()
        for _ in range(steps):
            tokens = torch.from_numpy(self.problem.train[self.number]).long()
            for group in self.optimizer.param_groups:
                group["lr"] = float(self.problem.rates[self.number])
            self.optimizer.zero_grad()
            with self.model.no_sync() if self.alone else contextlib.nullcontext():
                loss = self.model(tokens)
                loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
            self.optimizer.step()
            # jdml's metrics are means over the workers, too; alone, this is where they meet.
            mean = loss.detach().clone()
            dist.all_reduce(mean)
            losses.append(float(mean) / self.job.num_workers)
            ends.append(time.perf_counter())
            self.number += 1
        return {"losses": losses, "begin": begin, "ends": ends, "sent": sent_bytes() - sent}

    @torch.no_grad()
    def validate(self) -> float:
        """Mean loss on the held-out text."""
        losses = [self.model.module(torch.from_numpy(rows).long()) for rows in self.problem.valid]
        mean = torch.stack(losses).mean()
        dist.all_reduce(mean)
        return float(mean) / self.job.num_workers

    def gradient(self, path: str) -> float:
        """Writes the mean gradient of step 0 at the initial weights; returns the loss there."""
        self.start("f32")
        loss = self.model(torch.from_numpy(self.problem.train[0]).long())
        loss.backward()
        if self.job.worker == 0:
            tensors = {n: p.grad for n, p in self.model.module.named_parameters()}
            np.savez(path, **to_jdml(tensors, self.problem.weights))
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        return float(mean) / self.job.num_workers


def main() -> None:
    """Joins the other processes and answers questions."""
    parser = argparse.ArgumentParser()
    for name in ("num-workers", "worker"):
        parser.add_argument(f"--{name}", type=int, required=True)
    for name in ("coordinator", "problem", "shape"):
        parser.add_argument(f"--{name}", required=True)
    job = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://{job.coordinator}",
        rank=job.worker,
        world_size=job.num_workers,
    )
    worker = Worker(job)
    questions = ("start", "train", "validate", "gradient")
    serve({name: getattr(worker, name) for name in questions})
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
