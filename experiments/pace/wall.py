"""The same training in wall time: a thread or a process for each worker."""

import functools
from collections import Counter
from typing import Any

from experiments.pace.config import Config
from experiments.pace.methods import Method, method
from experiments.pace.task import Digits, digits
from jdml.communicate.pace import Arrivals, Server, SgdWorker


def in_threads(
    config: Config, problem: Digits, chosen: Method, model: Arrivals, seed: int
) -> tuple[Any, Counter[int]]:
    """The run, and how stale its updates were."""
    from jdml.communicate.pace.threads import run_threads

    task = problem.make_task(chosen.tx)
    server = Server(problem.params, chosen.rule, config.num_workers)
    workers = [SgdWorker(k, task) for k in range(config.num_workers)]
    run = run_threads(server, workers, **_options(config, problem, model, seed))
    return run, server.staleness


def in_processes(
    config: Config, problem: Digits, chosen: Method, name: str, model: Arrivals, seed: int
) -> tuple[Any, Counter[int]]:
    """The same over Ray, in an open session."""
    from jdml.communicate.pace.ray_backend import ray_server, run_ray

    server = ray_server(problem.params, chosen.rule, config.num_workers)
    try:
        make = functools.partial(make_worker, config, name, seed)
        run = run_ray(server, make, num_devices=1, **_options(config, problem, model, seed))
        return run, server.staleness
    finally:
        server.stop()


def make_worker(config: Config, name: str, seed: int, number: int) -> SgdWorker:
    """One of them, made where it computes."""
    problem = digits(config.num_workers, config.batch, config.hidden, seed)
    chosen = method(name, config.num_workers, config.learning_rate, config.compensation)
    return SgdWorker(number, problem.make_task(chosen.tx))


def session(config: Config) -> Any:
    """An open Ray session, to be used as a context."""
    from jdml.communicate.pace.ray_backend import local_session

    return local_session(num_cpus=config.num_workers)


def _options(config: Config, problem: Digits, model: Arrivals, seed: int) -> dict[str, Any]:
    """A worker computes, and sleeps for its delay besides."""
    scale = config.step_wall_seconds
    return {
        "seconds": config.length,
        "slow_down": lambda key, step, n: scale * model(key, step, n),
        "evaluate": problem.loss,
        "evaluate_every_seconds": config.length / config.evaluations,
        "seed": seed,
    }
