"""A network divided over workers by layer, by tensor and at random: bytes sent, and loss.

python experiments/random_partition/run.py --help
"""

import json
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[2]))  # a clone's root, for `experiments` itself

from experiments.digits import CLASSES, read_digits
from experiments.random_partition import network
from experiments.random_partition.config import Config
from jdml.aggregate import independent_subnets
from jdml.partition.pipeline import one_f_one_b, pipeline
from jdml.partition.samples import permutation
from jdml.partition.subnets import num_kept
from jdml.sharding import collectives, make_mesh, shard
from jdml.train import make_step
from jdml.train.loop import format_bytes

PyTree = Any
Row = dict[str, Any]
Advance = Callable[[PyTree, PyTree, jax.Array], PyTree]
"""``(state, batches [local_steps, ...], key) -> state``"""


def main(config: Config) -> None:
    """Every division, at every rate and seed; a table, a picture."""
    images, labels = read_digits()
    jax.config.update("jax_num_cpu_devices", config.workers)
    console = Console(record=True, width=110, highlight=False)
    rows: list[Row] = []
    for name, make in divisions_of(config).items():
        for rate in config.learning_rates:
            for seed in config.seeds:
                mine = {"division": name, "learning_rate": rate, "seed": seed}
                rows += ({**mine, **row} for row in train(config, make(rate), images, labels, seed))
        last = [r for r in best(rows, name) if r["step"] == config.steps]
        loss = statistics.mean(r["loss"] for r in last)
        console.print(f"{name}: test loss {loss:.4f} at rate {last[0]['learning_rate']:g}")
    config.out.mkdir(parents=True, exist_ok=True)
    console.print(table(config, rows))
    console.save_text(str(config.out / "summary.txt"))
    with (config.out / "metrics.jsonl").open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    try:
        plot(config, rows)
    except ImportError:
        print("No picture: pip install 'jdml[experiments]' brings matplotlib.")


class Division:
    """One way to divide the network: how it starts, goes on and is read, and what that sends."""

    def __init__(
        self,
        mesh: Mesh,
        start: Callable[[PyTree], PyTree],
        advance: Advance,
        whole: Callable[[PyTree], PyTree],
        batch: int,
        sent: Callable[[PyTree, PyTree], float],
    ) -> None:
        self.mesh, self.start, self.advance, self.whole = mesh, start, advance, whole
        self.batch, self.sent = batch, sent


def divisions_of(config: Config) -> dict[str, Callable[[float], Division]]:
    """By name, ``learning rate -> Division``."""
    found: dict[str, Callable[[float], Division]] = {
        "one device": lambda rate: by_tensor(config, rate, 1),
        "by tensor": lambda rate: by_tensor(config, rate, config.workers),
        "by layer": lambda rate: by_layer(config, rate),
    }
    for share in config.backbones:
        found[f"at random, backbone {share:.0%}"] = lambda rate, share=share: at_random(  # type: ignore[misc]
            config, rate, share
        )
    return found


def by_tensor(config: Config, rate: float, num_devices: int) -> Division:
    """Columns of one layer, rows of the next."""
    mesh = make_mesh({"data": 1, "model": num_devices}, devices=jax.devices()[:num_devices])

    def loss_fn(params: PyTree, batch: PyTree, key: Any) -> Any:
        del key
        return network.loss(params, {}, batch), {}

    specs = network.tensor_specs(config.blocks)
    return step_by_step(config, rate, mesh, loss_fn, specs, lambda p: p, lambda p: p)


def by_layer(config: Config, rate: float) -> Division:
    """A pipeline of one part per device, 1F1B."""
    mesh = make_mesh({"data": 1, "stage": config.workers})
    pipe = pipeline(
        lambda others, batch, key: network.first_part(others["first"], batch["inputs"]),
        lambda layer, x, batch, key: network.block(layer, x),
        lambda others, x, batch, key: (
            network.last_part(others["last"], x, batch["targets"]),
            {},
        ),
        mesh,
        num_layers=config.blocks,
        micro_batches=config.workers,
        schedule=one_f_one_b(),
    )
    names = [f"block{i}" for i in range(config.blocks)]

    def stacked(params: PyTree) -> PyTree:
        layers = jax.tree.map(lambda *x: jnp.stack(x), *(params[name] for name in names))
        return pipe.arrange({"first": params["first"], "last": params["last"], "layers": layers})

    def unstacked(params: PyTree) -> PyTree:
        plain = pipe.restore(params)
        layers = plain.pop("layers")
        parts = {name: jax.tree.map(lambda x, i=i: x[i], layers) for i, name in enumerate(names)}
        return {"first": plain["first"], **parts, "last": plain["last"]}

    dense = {"kernel": P(), "bias": P()}
    specs = pipe.specs({"first": dense, "last": dense, "layers": dense})
    return step_by_step(config, rate, mesh, pipe, specs, stacked, unstacked)


def step_by_step(
    config: Config,
    rate: float,
    mesh: Mesh,
    loss_fn: Callable[..., Any],
    specs: PyTree,
    start: Callable[[PyTree], PyTree],
    whole: Callable[[PyTree], PyTree],
) -> Division:
    """A division under which all devices take one step together."""
    init, step = make_step(
        loss_fn,
        optax.sgd(rate, momentum=config.momentum),
        mesh,
        specs=specs,
        steps_per_call=config.local_steps,
    )

    def sent(state: PyTree, batches: PyTree) -> float:
        return traffic(step.lower(state, batches).compile(), mesh) / config.local_steps

    return Division(
        mesh,
        lambda params: init(start(params), 0),
        lambda state, batches, key: step(state, batches)[0],
        lambda state: whole(step.consensus(state)[0]),
        config.batch,
        sent,
    )


def at_random(config: Config, rate: float, backbone: float) -> Division:
    """Independent subnets around a backbone."""
    mesh = make_mesh({"data": config.workers})
    sizes = {f"hidden{i}": config.width for i in range(config.blocks + 1)}
    take = jax.jit(
        independent_subnets(
            lambda params, scales, batch, key: network.loss(params, scales, batch),
            optax.sgd(rate, momentum=config.momentum),
            mesh,
            network.names_of(config.blocks),
            sizes,
            backbone=backbone,
        )
    )
    key = shard(jax.random.key(0), mesh, P())

    def sent(params: PyTree, batches: PyTree) -> float:
        return traffic(take.lower(params, batches, key).compile(), mesh) / config.local_steps

    return Division(
        mesh,
        lambda params: shard(params, mesh, P()),
        lambda params, batches, key: take(params, batches, shard(key, mesh, P()))[0],
        lambda params: params,
        config.batch * config.workers,
        sent,
    )


def traffic(compiled: Any, mesh: Mesh) -> float:
    """Bytes that a device sends in one call."""
    return sum(c.sent_bytes * (c.count or 1) for c in collectives(compiled, mesh))


def train(
    config: Config, division: Division, images: np.ndarray, labels: np.ndarray, seed: int
) -> Iterator[Row]:
    """A row for each tenth of a run."""
    order = permutation(len(images), seed, 0)
    test, rest = np.split(order, [config.test_images])
    draws = np.random.default_rng(seed)
    one_hot = np.eye(CLASSES, dtype=np.float32)
    per_device = P(None, "data")

    def batches() -> PyTree:
        rows = rest[draws.integers(0, len(rest), (config.local_steps, division.batch))]
        return shard(
            {"inputs": images[rows], "targets": one_hot[labels[rows]]}, division.mesh, per_device
        )

    params = network.init_params(jax.random.key(seed), config.width, config.blocks)
    state = division.start(params)
    sent = division.sent(state, batches())
    num_rounds = config.steps // config.local_steps
    for number in range(1, num_rounds + 1):
        key = jax.random.fold_in(jax.random.key(seed), number)
        state = jax.block_until_ready(division.advance(state, batches(), key))
        if number % max(1, num_rounds // 10) == 0 or number == num_rounds:
            whole = jax.tree.map(np.asarray, division.whole(state))
            loss, wrong = score(whole, images[test], one_hot[labels[test]])
            step = number * config.local_steps
            yield {
                "step": step,
                "bytes_sent": sent * step,
                "loss": float(loss),
                "error": float(wrong),
            }


@jax.jit
def score(params: PyTree, images: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Test loss of the whole network, and the share of images that it gets wrong."""
    x = network.hidden(params, {}, images)
    logits = x @ params["last"]["kernel"] + params["last"]["bias"]
    wrong = jnp.argmax(logits, -1) != jnp.argmax(targets, -1)
    return network.last_part(params["last"], x, targets), jnp.mean(wrong)


def best(rows: list[Row], division: str) -> list[Row]:
    """The rows of the rate with the least mean loss at the end."""
    mine = [r for r in rows if r["division"] == division]
    end = max(r["step"] for r in mine)

    def mean_loss(rate: float) -> float:
        losses = [r["loss"] for r in mine if (r["learning_rate"], r["step"]) == (rate, end)]
        return float(np.nan_to_num(np.mean(losses), nan=np.inf))

    rate = min({r["learning_rate"] for r in mine}, key=mean_loss)
    return [r for r in mine if r["learning_rate"] == rate]


def share_of_edges(config: Config, division: str) -> float:
    """Edges between hidden layers on one device, of all."""
    if division == "one device":
        return 1.0
    if "backbone" not in division:
        return 1 / config.workers
    share = float(division.rpartition(" ")[2].rstrip("%")) / 100
    return (sum(num_kept(config.width, config.workers, share)) / config.width) ** 2


def table(config: Config, rows: list[Row]) -> Table:
    """Test loss, error and bytes of each division at its best rate."""
    found = Table(title=f"digits, {config.workers} devices, {config.steps} steps")
    for column in ("division", "rate", "hidden edges on a device", "sent a step", "loss", "error"):
        found.add_column(column)
    for name in dict.fromkeys(r["division"] for r in rows):
        last = [r for r in best(rows, name) if r["step"] == config.steps]
        losses = [r["loss"] for r in last]
        found.add_row(
            name,
            f"{last[0]['learning_rate']:g}",
            f"{share_of_edges(config, name):.1%}",
            format_bytes(round(last[0]["bytes_sent"] / config.steps)),
            f"{statistics.mean(losses):.3f} ({min(losses):.3f} to {max(losses):.3f})",
            f"{statistics.mean(r['error'] for r in last):.1%}",
        )
    return found


def plot(config: Config, rows: list[Row]) -> None:
    """Loss against steps, and against bytes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for number, name in enumerate(dict.fromkeys(r["division"] for r in rows)):
        by_step: dict[int, list[Row]] = {}
        for row in best(rows, name):
            by_step.setdefault(row["step"], []).append(row)
        losses = [statistics.mean(r["loss"] for r in mine) for mine in by_step.values()]
        style = {"color": f"C{number}", "label": name, "marker": ".", "markersize": 4}
        if "backbone" not in name:
            style["linestyle"] = ("-", "--", ":")[number % 3]
        panels[0].plot(list(by_step), losses, **style)
        sent = [mine[0]["bytes_sent"] / 1e6 for mine in by_step.values()]
        if sent[-1]:
            panels[1].plot(sent, losses, **style)
    panels[0].set(xlabel="steps", ylabel="test loss", yscale="log")
    panels[1].set(xlabel="megabytes sent by a device", xscale="log")
    panels[0].legend(fontsize=7)
    for panel in panels:
        panel.grid(alpha=0.3)
    figure.savefig(config.out / "random_partition.png", dpi=110)


if __name__ == "__main__":
    main(tyro.cli(Config))
