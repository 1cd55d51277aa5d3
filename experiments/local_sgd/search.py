"""The search for learning rates: six runs for each method, on half the steps and another seed.

python experiments/local_sgd/search.py
"""

import dataclasses
import itertools
import sys
from pathlib import Path

import jax
import tyro
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[2]))  # a clone's root, for `experiments` itself

from experiments.local_sgd.config import Config
from experiments.local_sgd.methods import METHODS, Method
from experiments.local_sgd.run import make_task, slug, train

PEAKS = (4e-3, 8e-3, 12e-3, 16e-3, 24e-3, 32e-3)
PEAKS_WITH_OUTER = (4e-3, 8e-3, 12e-3)
OUTER = ((0.7, 0.9), (0.7, 0.8))


def candidates(method: Method) -> list[tuple[str, Method]]:
    """Six of each kind; with e3m0 none, they take what is found for f32."""
    if method.compressed:
        return []
    if method.outer is None:
        return [(f"{p:g}", dataclasses.replace(method, peak=p)) for p in PEAKS]
    return [
        (f"{p:g}, outer {o[0]:g} / {o[1]:g}", dataclasses.replace(method, peak=p, outer=o))
        for p, o in itertools.product(PEAKS_WITH_OUTER, OUTER)
    ]


def main(config: Config) -> None:
    """Trains all candidates (a finished run is read, not repeated); a table of the losses."""
    jax.config.update("jax_num_cpu_devices", config.workers)
    console = Console(highlight=False, soft_wrap=True)
    task = make_task(config)
    console.print(task.summary)
    table = Table(title=f"Validation loss after {config.steps} steps, seed {config.seed}")
    table.add_column("method")
    table.add_column("learning rate")
    table.add_column("loss", justify="right")
    for name in config.methods:
        losses = {}
        for label, method in candidates(METHODS[name]):
            folder = config.out / slug(name) / slug(label.replace("/", "-"))
            rows = train(task, method, folder, f"{name} at {label}", console)
            if rows[-1]["step"] < config.steps:
                return
            losses[label] = rows[-1]["val_loss"]
        for label, loss in losses.items():
            best = loss == min(losses.values())
            table.add_row(name, label, f"{loss:.4f}", style="bold" if best else None)
    console.print(table)


DEFAULT = Config(
    out=Path("runs/local_sgd/search"), steps=2400, seed=1, eval_every=10**6, save_every=0
)


if __name__ == "__main__":
    main(tyro.cli(Config, default=DEFAULT))
