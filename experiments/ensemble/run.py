"""EC-DNN beside model averaging, on digits that the workers share unevenly.

python experiments/ensemble/run.py --help
"""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx
from jax.sharding import Mesh

sys.path.insert(0, str(Path(__file__).parents[2]))  # a clone's root, for `experiments` itself

from experiments.digits import Digits, divide, read_digits
from experiments.ensemble.config import Config
from jdml.aggregate import DistillEnsemble, average_params, distill_ensemble, ensemble
from jdml.models import ConvNet
from jdml.sharding import collectives, make_mesh
from jdml.train import make_step
from jdml.train.loop import format_bytes

METHODS = ("averaging", "EC-DNN", "EC-DNN, inputs shared")
Row = dict[str, Any]


def main(config: Config) -> None:
    """Every method on every division; a table, a picture."""
    images, labels = read_digits()
    jax.config.update("jax_num_cpu_devices", config.workers)
    mesh = make_mesh({"data": config.workers}, devices=jax.devices()[: config.workers])
    print(
        f"digits: {len(images):,} images, {config.test_images} of them for testing; "
        f"{config.model.num_params:,} parameters; {config.workers} workers"
    )
    rows: list[Row] = []
    for name in METHODS:
        trainer = make_trainer(config, name, mesh)
        for alpha in config.alphas:
            for seed in config.seeds:
                digits = divide(
                    images,
                    labels,
                    alpha,
                    seed,
                    mesh,
                    batch=config.batch,
                    test_images=config.test_images,
                )
                for row in trainer(digits, seed):
                    rows.append({"method": name, "alpha": alpha, "seed": seed, **row})
            last = [r for r in rows if (r["method"], r["alpha"]) == (name, alpha)][-1]
            print(
                f"{name}, alpha {alpha}: trained {len(config.seeds)} times; each device sent "
                f"{format_bytes(last['bytes_sent'])} in {config.rounds} rounds"
            )
    write_report(config, rows)


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Mean over samples, in nats; targets are probabilities."""
    return jnp.mean(optax.softmax_cross_entropy(logits, targets))


def make_trainer(config: Config, name: str, mesh: Mesh) -> Callable[[Digits, int], Iterator[Row]]:
    """``(digits, seed) -> a row per round``; compiled once for all divisions."""
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: ConvNet(config.model, rngs=nnx.Rngs(0))))

    def apply_fn(params: Any, inputs: jax.Array, key: jax.Array | None) -> jax.Array:
        del key
        return nnx.merge(graphdef, params)(inputs.astype(jnp.float32) / 16)

    distil = distill_ensemble(
        apply_fn,
        cross_entropy,
        mesh,
        local_steps=config.local_steps,
        distill_steps=config.distill_steps,
        num_batches=config.num_batches,
        weight=config.weight,
        of="probabilities",
        share="inputs" if "shared" in name else "own",
    )
    tx = optax.sgd(config.learning_rate, momentum=config.momentum)
    averaging = name == "averaging"
    if averaging:
        tx = optax.chain(tx, average_params("data", every=config.steps_per_round))
    init, step = make_step(distil.loss_fn, tx, mesh)
    weights = jax.jit(
        lambda key: nnx.to_pure_dict(nnx.state(ConvNet(config.model, rngs=nnx.Rngs(key))))
    )

    def train(digits: Digits, seed: int) -> Iterator[Row]:
        state = init(weights(jax.random.key(seed)), seed)
        batch = next(digits.batches)
        if averaging:  # what is in a branch happens once a round; losses are added up anyway
            compiled = step.lower(state, batch).compile()
            sent = sum(c.sent_bytes for c in collectives(compiled, mesh) if c.conditional)
        else:
            sent = distil.exchange(state.params, batch).sent
        yield {"round": 0, "bytes_sent": 0, **score(distil, state.params, digits)}
        for number in range(1, config.rounds + 1):
            if averaging:
                before = {}
                for i in range(config.steps_per_round):
                    if i == config.steps_per_round - 1:  # what will be averaged, but for one step
                        before = score(distil, state.params, digits, "before_")
                    state, _ = step(state, next(digits.batches))
                    jax.block_until_ready(state)
            else:
                state, _ = distil.round(step, state, digits.batches)
                before = {}
            after = score(distil, state.params, digits)
            yield {"round": number, "bytes_sent": number * sent, **after, **before}

    return train


def score(distil: DistillEnsemble, params: Any, digits: Digits, prefix: str = "") -> Row:
    """Accuracy of the workers' models, one by one and together, on the test images."""
    logits = distil.outputs(params, digits.test_images)
    together = ensemble(logits, 0, of="probabilities")
    right = np.asarray(jnp.argmax(logits, -1) == digits.test_labels).mean(axis=1)
    together_right = np.asarray(jnp.argmax(together, -1) == digits.test_labels).mean()
    return {f"{prefix}one_model": right.mean().item(), f"{prefix}ensemble": together_right.item()}


class Line(NamedTuple):
    """One line of the table and of the picture."""

    label: str
    method: str
    column: str
    style: str
    colour: str


LINES = (
    Line("averaging", "averaging", "one_model", "-", "C0"),
    Line("  before it: one model", "averaging", "before_one_model", "", ""),
    Line("  before it: their ensemble", "averaging", "before_ensemble", ":", "C0"),
    Line("EC-DNN: ensemble", "EC-DNN", "ensemble", "-", "C1"),
    Line("EC-DNN: one model", "EC-DNN", "one_model", "--", "C1"),
    Line("EC-DNN, inputs shared: ensemble", "EC-DNN, inputs shared", "ensemble", "-", "C2"),
    Line("EC-DNN, inputs shared: one model", "EC-DNN, inputs shared", "one_model", "--", "C2"),
)


def curve(rows: list[Row], method: str, alpha: float, column: str) -> np.ndarray:
    """``[seed, round]``, from round 1."""
    mine = [r for r in rows if (r["method"], r["alpha"]) == (method, alpha)]
    seeds = list(dict.fromkeys(r["seed"] for r in mine))
    return np.array(
        [[r[column] for r in mine if r["seed"] == seed and r["round"]] for seed in seeds]
    )


def write_report(config: Config, rows: list[Row]) -> None:
    """``metrics.jsonl``, ``summary.txt`` (printed too) and ``ensemble.png``."""
    config.out.mkdir(parents=True, exist_ok=True)
    with (config.out / "metrics.jsonl").open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    shown = sorted({n for n in (1, 2, 3, 5, config.rounds) if n <= config.rounds})
    text = []
    for alpha in config.alphas:
        text.append(
            f"Test accuracy in %, alpha {alpha}: mean of {len(config.seeds)} runs ± deviation"
        )
        text.append(f"{'':32}" + "".join(f"{f'round {n}':>14}" for n in shown))
        for line in LINES:
            values = 100 * curve(rows, line.method, alpha, line.column)
            cells = [f"{values[:, n - 1].mean():.1f} ± {values[:, n - 1].std():.1f}" for n in shown]
            text.append(f"{line.label:32}" + "".join(f"{c:>14}" for c in cells))
        text.append("")
    (config.out / "summary.txt").write_text("\n".join(text))
    print("\n".join(text))
    try:
        plot(config, rows)
    except ImportError:
        print("No picture: pip install 'jdml[experiments]' brings matplotlib.")


def plot(config: Config, rows: list[Row]) -> None:
    """Error against rounds and against bytes, a row of panels for each division."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, NullLocator

    figure = Figure(figsize=(10, 3.6 * len(config.alphas)), layout="constrained")
    panels = figure.subplots(len(config.alphas), 2, sharey="row", squeeze=False)
    for alpha, (by_round, by_bytes) in zip(config.alphas, panels, strict=True):
        for line in LINES:
            if not line.style:
                continue
            values = 100 * (1 - curve(rows, line.method, alpha, line.column))
            rounds = np.arange(1, config.rounds + 1)
            sent = curve(rows, line.method, alpha, "bytes_sent")[0]
            for panel, xs in ((by_round, rounds), (by_bytes, sent)):
                if line.style == ":" and panel is by_bytes:
                    continue
                panel.plot(
                    xs,
                    values.mean(0),
                    line.style,
                    color=line.colour,
                    label=line.label.replace("  before it: their", "averaging, just before it:"),
                    marker="o",
                    markersize=3,
                )
                panel.fill_between(
                    xs, values.min(0), values.max(0), color=line.colour, alpha=0.12, lw=0
                )
        by_round.set_ylabel(f"test error, %  (alpha {alpha})")
        by_round.set_yscale("log")
        by_round.yaxis.set_major_locator(FixedLocator([1, 2, 3, 5, 10, 20, 30, 50]))
        by_round.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
        by_round.yaxis.set_minor_locator(NullLocator())
        by_bytes.xaxis.set_major_formatter(lambda x, _: format_bytes(x).replace(".00", ""))
        for panel in (by_round, by_bytes):
            panel.grid(alpha=0.3)
    panels[-1][0].set_xlabel("rounds")
    panels[-1][1].set_xlabel("bytes that each device has sent")
    handles = panels[0][0].get_legend_handles_labels()  # all lines; of bytes, one is left out
    panels[0][1].legend(*handles, fontsize=8, loc="upper right")
    figure.suptitle("Averaging parameters and EC-DNN; bands: least and greatest of the runs")
    figure.savefig(config.out / "ensemble.png", dpi=80)


if __name__ == "__main__":
    main(tyro.cli(Config))
