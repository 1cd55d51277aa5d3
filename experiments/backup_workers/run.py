"""Backup workers: time to a loss when the latest gradients of each step are left out.

python experiments/backup_workers/run.py --help
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console
from rich.progress import track
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[2]))  # a clone's root, for `experiments` itself

from experiments.backup_workers.config import Config
from experiments.curves import reached
from experiments.digits import read_digits
from jdml.aggregate import backup_workers
from jdml.communicate.pace import Arrivals, heavy_tailed, log_normal
from jdml.models import ConvNet
from jdml.partition.samples import Sampler, permutation
from jdml.sharding import make_mesh
from jdml.train import make_step

Row = dict[str, Any]


def main(config: Config) -> None:
    """Every b under both kinds of arrivals; a table, a picture."""
    jax.config.update("jax_num_cpu_devices", config.workers)
    console = Console() if sys.stdout.isatty() else Console(width=100)
    console.print(
        f"digits, {config.test_images} images for testing; {config.model.num_params:,} parameters; "
        f"{config.workers} workers of {config.batch} images a step; time is simulated, its unit "
        "the median answer"
    )
    images, labels = read_digits()
    rows: list[Row] = []
    variants = [(name, b) for name in arrivals(config) for b in config.backups]
    for name, b in track(variants, "training", console=console, transient=True):
        trainer = Trainer(config, arrivals(config)[name], b)
        for seed in config.seeds:
            for row in trainer.train(images, labels, seed):
                rows.append({"arrivals": name, "backups": b, "seed": seed, **row})
    write_report(config, rows, console)


def arrivals(config: Config) -> dict[str, Arrivals]:
    """Clocks whose median is 1."""
    least = 2 ** (-1 / config.tail)
    return {
        "log-normal": log_normal(config.sigma),
        "heavy-tailed": heavy_tailed(config.tail, least),
    }


class Trainer:
    """One method, compiled once for all seeds."""

    def __init__(self, config: Config, clock: Arrivals, num_backups: int) -> None:
        self.config = config
        self.mesh = make_mesh({"data": config.workers}, devices=jax.devices()[: config.workers])
        graphdef = nnx.graphdef(nnx.eval_shape(lambda: ConvNet(config.model, rngs=nnx.Rngs(0))))

        def loss_fn(params: Any, batch: Any, key: Any = None) -> tuple[jax.Array, dict]:
            logits = nnx.merge(graphdef, params)(batch["inputs"].astype(jnp.float32) / 16)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
            return jnp.mean(losses), {}

        tx = optax.chain(
            backup_workers("data", num_backups, clock),
            optax.sgd(config.learning_rate, momentum=config.momentum),
        )
        self.init, self.step = make_step(loss_fn, tx, self.mesh)
        self.test_loss = jax.jit(lambda params, batch: loss_fn(params, batch)[0])
        self.weights = jax.jit(
            lambda key: nnx.to_pure_dict(nnx.state(ConvNet(config.model, rngs=nnx.Rngs(key))))
        )

    def train(self, images: np.ndarray, labels: np.ndarray, seed: int) -> Iterator[Row]:
        """A row every few steps: steps, simulated time since the start, test loss."""
        config = self.config
        test, rest = np.split(permutation(len(images), seed, 0), [config.test_images])
        sampler = Sampler(len(rest), config.workers * config.batch, seed)
        placed = NamedSharding(self.mesh, P("data"))
        held_out = {"inputs": images[test], "targets": labels[test]}
        state = self.init(self.weights(jax.random.key(seed)), seed)
        seconds = 0.0
        yield {"step": 0, "time": 0.0, "loss": float(self.test_loss(state.params, held_out))}
        for number in range(1, config.steps + 1):
            chosen = rest[next(sampler)]
            batch = {"inputs": images[chosen], "targets": labels[chosen]}
            state, metrics = self.step(state, jax.device_put(batch, placed))
            seconds += float(metrics["backup_time"])
            if number % config.eval_every == 0:
                loss = float(self.test_loss(state.params, held_out))
                yield {"step": number, "time": seconds, "loss": loss}


def run_of(rows: list[Row], name: str, b: int, seed: int) -> list[Row]:
    """The rows of one run."""
    wanted = (name, b, seed)
    return [r for r in rows if (r["arrivals"], r["backups"], r["seed"]) == wanted]


def to_target(config: Config, rows: list[Row], name: str, b: int, column: str) -> np.ndarray:
    """Steps or time to the target, ``[seed]``."""
    return np.array(
        [reached(run_of(rows, name, b, s), config.target, column) for s in config.seeds]
    )


def write_report(config: Config, rows: list[Row], console: Console) -> None:
    """``metrics.jsonl``, ``summary.txt`` (printed too) and ``backup_workers.png``."""
    config.out.mkdir(parents=True, exist_ok=True)
    with (config.out / "metrics.jsonl").open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    tables = [table_of(config, rows, name) for name in arrivals(config)]
    with (config.out / "summary.txt").open("w") as file:
        for out in (Console(file=file, width=100), console):
            out.print(*tables)
    try:
        plot(config, rows)
    except ImportError:
        console.print("No picture: pip install 'jdml[experiments]' brings matplotlib.")


def table_of(config: Config, rows: list[Row], name: str) -> Table:
    """A line for each b; means over the seeds, and deviations."""
    table = Table(
        title=f"{name} arrivals: simulated time to a test loss of {config.target:g}",
        caption=f"{len(config.seeds)} runs each, mean ± deviation; unit: the median answer",
    )
    headings = ("b", "steps", "time of a step", "time", "of b = 0", "loss at the end")
    for heading in headings:
        table.add_column(heading, justify="right")
    base = to_target(config, rows, name, config.backups[0], "time")
    for b in config.backups:
        runs = [run_of(rows, name, b, seed) for seed in config.seeds]
        steps, time = (to_target(config, rows, name, b, c) for c in ("step", "time"))
        cells = [
            np.array([run[-1]["time"] / run[-1]["step"] for run in runs]),
            time,
            time / base,
            np.array([run[-1]["loss"] for run in runs]),
        ]
        shown = [f"{x.mean():.2f} ± {x.std():.2f}" for x in cells]
        table.add_row(str(b), f"{steps.mean():.0f} ± {steps.std():.0f}", *shown)
    if config.backups[0] != 0:
        table.columns[4].header = f"of b = {config.backups[0]}"
    return table


def plot(config: Config, rows: list[Row]) -> None:
    """Loss against steps and against simulated time, and the time to the target; a row a clock."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, NullLocator

    names = list(arrivals(config))
    figure = Figure(figsize=(11, 3.4 * len(names)), layout="constrained")
    panels = figure.subplots(len(names), 3, squeeze=False)
    for name, (by_step, by_time, bars) in zip(names, panels, strict=True):
        for number, b in enumerate(config.backups):
            runs = [run_of(rows, name, b, seed) for seed in config.seeds]
            loss = np.array([[r["loss"] for r in run] for run in runs]).mean(0)
            time = np.array([[r["time"] for r in run] for run in runs]).mean(0)
            steps = [r["step"] for r in runs[0]]
            by_step.plot(steps, loss, color=f"C{number}", lw=1.2)
            by_time.plot(time, loss, color=f"C{number}", lw=1.2, label=f"b = {b}")
            taken = to_target(config, rows, name, b, "time")
            bars.bar(str(b), taken.mean(), color=f"C{number}", alpha=0.8)
            bars.plot([str(b)] * len(taken), taken, "k.", ms=5)
        for panel in (by_step, by_time):
            panel.axhline(config.target, color="0.4", lw=0.8, ls=":")
            panel.set_yscale("log")
            panel.yaxis.set_major_locator(FixedLocator([0.1, 0.2, 0.3, 0.5, 1, 2]))
            panel.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
            panel.yaxis.set_minor_locator(NullLocator())
            panel.grid(alpha=0.3)
        slowest = [to_target(config, rows, name, b, "time").mean() for b in config.backups]
        by_time.set_xlim(0, 1.2 * np.nanmax([*slowest, 1]))
        by_step.set_ylabel(f"{name} arrivals\ntest loss, nats")
        bars.set_ylabel(f"simulated time to {config.target:g}")
        bars.grid(alpha=0.3, axis="y")
    panels[-1][0].set_xlabel("steps")
    panels[-1][1].set_xlabel("simulated time (median answer = 1)")
    panels[-1][2].set_xlabel("b; dots: single runs")
    panels[0][1].legend(fontsize=8)
    figure.savefig(config.out / "backup_workers.png", dpi=80)


if __name__ == "__main__":
    main(tyro.cli(Config))
