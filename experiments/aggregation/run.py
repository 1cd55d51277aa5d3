"""Every way to combine the workers' answers, in one table: loss, rounds, bytes, what it keeps.

python experiments/aggregation/run.py --help
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
from jax.sharding import Mesh
from rich.console import Console
from rich.progress import track
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[2]))  # a clone's root, for `experiments` itself

from experiments.aggregation.config import Config
from experiments.aggregation.methods import ENSEMBLES, METHODS, SGD
from experiments.digits import Digits, divide, read_digits
from jdml.aggregate import distill_ensemble, ensemble, vote
from jdml.models import ConvNet
from jdml.sharding import make_mesh
from jdml.train import MetricsLog, fit, make_step

Row = dict[str, Any]

ALONE = "alone: mean of models"
DISTILL = "EC-DNN"
LOCAL_STEPS, DISTILL_STEPS, RELABELLED = 16, 32, 4


def main(config: Config) -> None:
    """All methods, all seeds; a table, a picture."""
    jax.config.update("jax_num_cpu_devices", config.workers)
    console = Console() if sys.stdout.isatty() else Console(width=120)
    console.print(
        f"digits, {config.test_images} images for testing; {config.model.num_params:,} parameters; "
        f"{config.workers} workers of {config.batch} images a step, {config.steps} steps"
    )
    images, labels = read_digits()
    rows: list[Row] = []
    trained = [n for n in config.methods if not n.startswith("alone")]
    trained += [ALONE] if len(trained) < len(config.methods) else []
    for name in track(trained, "training", console=console, transient=True):
        rows += train(config, name, images, labels)
    order = {name: number for number, name in enumerate(config.methods)}
    rows = [row for row in rows if row["method"] in order]
    write_report(config, sorted(rows, key=lambda row: order[row["method"]]), console)


class Data:
    """A run's batches as :func:`jdml.train.fit` takes them; not resumed here."""

    def __init__(self, digits: Digits) -> None:
        self.batches = digits.batches

    def __next__(self) -> Any:
        return next(self.batches)

    def state(self) -> dict[str, Any]:
        return {}


def train(config: Config, name: str, images: np.ndarray, labels: np.ndarray) -> Iterator[Row]:
    """A row per seed and answer: what the method, or the models trained alone, end with."""
    mesh = make_mesh({"data": config.workers}, devices=jax.devices()[: config.workers])
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: ConvNet(config.model, rngs=nnx.Rngs(0))))

    def apply_fn(params: Any, inputs: jax.Array, key: Any = None) -> jax.Array:
        return nnx.merge(graphdef, params)(inputs.astype(jnp.float32) / 16)

    distil = distill_ensemble(
        apply_fn,
        lambda logits, targets: jnp.mean(optax.softmax_cross_entropy(logits, targets)),
        mesh,
        local_steps=LOCAL_STEPS,
        distill_steps=DISTILL_STEPS,
        num_batches=RELABELLED,
        of="probabilities",
    )
    tx = METHODS[name].tx() if name in METHODS else optax.sgd(SGD, momentum=0.9)
    init, step = make_step(distil.loss_fn, tx, mesh)
    for seed in config.seeds:
        digits = divide(
            images, labels, config.alpha, seed, mesh, batch=config.batch,
            test_images=config.test_images,
        )  # fmt: skip
        params = nnx.to_pure_dict(nnx.state(ConvNet(config.model, rngs=nnx.Rngs(seed))))
        state = init(params, seed)
        kept = bytes_per_device(state) / bytes_per_device(params)
        if name == DISTILL:
            batch = next(digits.batches)
            rounds = config.steps // (LOCAL_STEPS + DISTILL_STEPS)
            sent = rounds * distil.exchange(state.params, batch).sent
            for _ in range(rounds):
                state, _ = distil.round(step, state, digits.batches)
        else:
            state, rounds, sent = fitted(config, step, state, Data(digits), mesh)
        for answer, values in answers(name, apply_fn, step, state, digits).items():
            yield {
                "method": answer,
                "seed": seed,
                "rounds": rounds,
                "bytes_sent": sent,
                "copies": kept,
                **values,
            }


def fitted(config: Config, step: Any, state: Any, data: Data, mesh: Mesh) -> tuple[Any, int, int]:
    """``(state, rounds, bytes a device sent)``; a round is a step that sends more than the loss."""
    log = MetricsLog(None)
    quiet = Console(quiet=True)
    state, _ = fit(step, state, data, config.steps, mesh=mesh, log=log, console=quiet)
    # The mean of the loss is a few bytes; the smallest exchange, 1 % of the model, is some hundred.
    rounds = sum(row["bytes_per_step"] > 256 for row in log.rows)
    return state, rounds, log.rows[-1]["bytes_sent"] if rounds else 0


def bytes_per_device(tree: Any) -> int:
    """Bytes of the first device's shards."""
    leaves = [
        x for x in jax.tree.leaves(tree) if not jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
    ]
    return sum(jnp.asarray(x).addressable_shards[0].data.nbytes for x in leaves)


def answers(name: str, apply_fn: Any, step: Any, state: Any, digits: Digits) -> dict[str, Row]:
    """Test loss and accuracy of what is used in the end: the workers' mean model, if not said."""
    images, labels = digits.test_images, digits.test_labels

    def score(logits: jax.Array) -> Row:
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        right = np.asarray(jnp.argmax(logits, -1) == labels).mean()
        return {"loss": float(losses.mean()), "accuracy": float(right)}

    mean, _ = step.consensus(state)
    if name in METHODS:
        return {name: score(apply_fn(mean, images))}
    logits = jax.lax.map(lambda p: apply_fn(p, images), state.params)
    if name == DISTILL:  # every worker has one model of its own: their average score
        each = [score(own) for own in logits]
        return {name: {k: float(np.mean([s[k] for s in each])) for k in each[0]}}
    voted = vote(logits, 0)
    return {
        ALONE: score(apply_fn(mean, images)),
        "alone: ensemble": score(ensemble(logits, 0, of="log_probabilities")),
        "alone: vote": {"loss": float("nan"), "accuracy": float(np.mean(voted == labels))},
    }


def write_report(config: Config, rows: list[Row], console: Console) -> None:
    """``metrics.jsonl``, ``summary.txt`` (printed too) and ``aggregation.png``."""
    config.out.mkdir(parents=True, exist_ok=True)
    with (config.out / "metrics.jsonl").open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    table = table_of(config, rows)
    with (config.out / "summary.txt").open("w") as file:
        for out in (Console(file=file, width=120), console):
            out.print(table)
    try:
        plot(config, rows)
    except ImportError:
        console.print("No picture: pip install 'jdml[experiments]' brings matplotlib.")


def mean_of(rows: list[Row], name: str, column: str) -> float:
    """Over the seeds."""
    return float(np.mean([row[column] for row in rows if row["method"] == name]))


def table_of(config: Config, rows: list[Row]) -> Table:
    """A line per method."""
    table = Table(
        title=f"Digits after {config.steps} steps: means of {len(config.seeds)} runs",
        caption="copies: bytes of the state on a device, in copies of the parameters",
    )
    table.add_column("method", no_wrap=True)
    for heading in ("test loss", "accuracy", "rounds", "MB sent", "copies"):
        table.add_column(heading, justify="right")
    table.add_column("keeps besides parameters and optimiser")
    for name in config.methods:
        loss = mean_of(rows, name, "loss")
        table.add_row(
            name,
            "" if np.isnan(loss) else f"{loss:.3f}",
            f"{100 * mean_of(rows, name, 'accuracy'):.1f} %",
            f"{mean_of(rows, name, 'rounds'):.0f}",
            f"{mean_of(rows, name, 'bytes_sent') / 1e6:.3f}",
            f"{mean_of(rows, name, 'copies'):.2f}",
            METHODS[name].keeps if name in METHODS else ENSEMBLES[name],
        )
    return table


def plot(config: Config, rows: list[Row]) -> None:
    """Test loss against bytes, a point per method, a dot per run."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, NullLocator

    figure = Figure(figsize=(11, 6), layout="constrained")
    panel = figure.subplots()
    names = [n for n in config.methods if not np.isnan(mean_of(rows, n, "loss"))]
    names = [n for n in names if mean_of(rows, n, "bytes_sent")]
    for number, name in enumerate(names):
        mine = [row for row in rows if row["method"] == name]
        colour, marker = f"C{number % 10}", "os^D"[number // 10]
        megabytes = mean_of(rows, name, "bytes_sent") / 1e6
        panel.plot([megabytes] * len(mine), [r["loss"] for r in mine], ".", color=colour, ms=4)
        loss = mean_of(rows, name, "loss")
        panel.plot(megabytes, loss, marker, color=colour, ms=8, label=name)
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.yaxis.set_major_locator(FixedLocator([0.05, 0.1, 0.2, 0.3, 0.5, 1, 2]))
    panel.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
    panel.yaxis.set_minor_locator(NullLocator())
    panel.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    panel.set_xlabel("MB that a device sent")
    panel.set_ylabel(f"test loss after {config.steps} steps, nats; dots: single runs")
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(config.out / "aggregation.png", dpi=80)


if __name__ == "__main__":
    main(tyro.cli(Config))
