"""Consensus ADMM: two convex models beside an exact solver, a network beside synchronous SGD.

python experiments/admm/run.py --help
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
from rich import box
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[2]))  # a clone's root, for `experiments` itself

from experiments.admm import picture
from experiments.admm.config import VARIANTS, Config
from experiments.admm.convex import Problem, lasso, logistic
from experiments.digits import divide, read_digits
from jdml.aggregate import average_params, consensus_admm, mean_gradients
from jdml.models import ConvNet
from jdml.sharding import collectives, make_mesh
from jdml.train import make_step
from jdml.train.loop import format_bytes

Row = dict[str, Any]

AGREE = 1e-6
"""Relative difference of the objective from the exact solver's."""
METHODS = ("ADMM", "averaging", "synchronous SGD")


def main(config: Config) -> None:
    """Both halves; tables, pictures."""
    jax.config.update("jax_num_cpu_devices", config.workers)
    mesh = make_mesh({"data": config.workers}, devices=jax.devices()[: config.workers])
    console = Console(record=True, width=120, highlight=False)
    rows: list[Row] = []
    with jax.enable_x64(True):
        for problem in (
            logistic(config.workers, config.ridge, config.seeds[0]),
            lasso(config.workers, config.sparsity, config.seeds[0]),
        ):
            of_problem = [
                {"problem": problem.name, "variant": name, **row}
                for name in config.variants
                for row in solve(config, problem, name, mesh)
            ]
            console.print(convex_table(config, problem, of_problem))
            rows += of_problem
    images, labels = read_digits()
    network_rows: list[Row] = []
    for method in METHODS:
        for seed in config.seeds:
            of_run = train(config, method, images, labels, seed, mesh)
            network_rows += ({"method": method, "seed": seed, **row} for row in of_run)
    console.print(network_table(config, network_rows))
    config.out.mkdir(parents=True, exist_ok=True)
    console.save_text(str(config.out / "summary.txt"))
    with (config.out / "metrics.jsonl").open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows + network_rows)
    try:
        picture.residuals(rows, AGREE, config.out / "residuals.png")
        picture.network(network_rows, METHODS, config.out / "network.png")
    except ImportError:
        print("No pictures: pip install 'jdml[experiments]' brings matplotlib.")


def solve(config: Config, problem: Problem, variant: str, mesh: Mesh) -> Iterator[Row]:
    """A row per round: the state's residuals, and how far z is from the exact answer."""
    tx = consensus_admm(
        # Of full batches, and warm: whole steps are short enough without a line search. A new
        # round is a new problem, whose curvature pairs the old ones are not.
        optax.lbfgs(1.0, memory_size=20, linesearch=None),
        "data",
        every=config.local_steps,
        prox=problem.prox,
        restart_inner=True,
        **VARIANTS[variant],
    )
    init, step = make_step(problem.loss_fn, tx, mesh)
    state = init(jax.tree.map(jnp.asarray, problem.start), 0)

    @jax.jit
    def round_(state: Any, batch: Any) -> Any:
        return jax.lax.scan(lambda s, _: step(s, batch), state, None, length=config.local_steps)

    compiled = round_.lower(state, problem.batch).compile()
    # In a branch, which one step in a round takes.
    sent = sum(c.sent_bytes for c in collectives(compiled, mesh) if c.conditional)
    for number in range(1, config.rounds + 1):
        state, metrics = compiled(state, problem.batch)
        z = jax.device_get(state.opt_state.z)
        told = {k: float(v[-1]) for k, v in metrics.items() if k.startswith("admm_")}
        gap = problem.objective(z) / problem.best - 1
        yield {"round": number, "gap": gap, "bytes_sent": number * sent, **told}


def convex_table(config: Config, problem: Problem, rows: list[Row]) -> Table:
    """When each variant stopped and agreed, and how well."""
    table = Table(
        title=f"{problem.name}, {config.rounds} rounds, {format_bytes(rows[0]['bytes_sent'])} a "
        f"round and device; beside {problem.solver}",
        box=box.MARKDOWN,
    )
    table.add_column("ADMM with", no_wrap=True)
    for column in (
        "test holds, round",
        "difference then",
        f"{AGREE:.0e}, round",
        "last difference",
        "last rho",
    ):
        table.add_column(column, justify="right")
    for variant in config.variants:
        mine = [r for r in rows if r["variant"] == variant]
        stopped = next((r for r in mine if r["admm_converged"] == 1), None)
        agreed = agrees_from(mine)
        table.add_row(
            variant,
            str(stopped["round"]) if stopped else "–",
            f"{abs(stopped['gap']):.0e}" if stopped else "–",
            str(agreed) if agreed else "–",
            f"{abs(mine[-1]['gap']):.0e}" if mine[-1]["gap"] else "0",
            f"{mine[-1]['admm_rho']:.3g}",
        )
    return table


def agrees_from(rows: list[Row]) -> int | None:
    """First round from which on the objective agrees with the exact solver's."""
    apart = [r["round"] for r in rows if not abs(r["gap"]) <= AGREE]
    first = max(apart, default=0) + 1
    return first if first <= rows[-1]["round"] else None


def train(
    config: Config, method: str, images: np.ndarray, labels: np.ndarray, seed: int, mesh: Mesh
) -> Iterator[Row]:
    """A row per round: test accuracy of the model that the workers share."""
    c = config.network
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: ConvNet(c.model, rngs=nnx.Rngs(0))))

    def logits(params: Any, inputs: jax.Array) -> jax.Array:
        return nnx.merge(graphdef, params)(inputs.astype(jnp.float32) / 16)

    def loss_fn(params: Any, batch: Any, key: Any) -> Any:
        del key
        losses = optax.softmax_cross_entropy(logits(params, batch["inputs"]), batch["targets"])
        return jnp.mean(losses), {}

    sgd = optax.sgd(c.learning_rate, momentum=c.momentum)
    tx, local_steps = {
        "ADMM": (consensus_admm(sgd, "data", c.rho, every=c.local_steps), c.local_steps),
        "averaging": (
            optax.chain(sgd, average_params("data", every=c.local_steps)),
            c.local_steps,
        ),
        "synchronous SGD": (optax.chain(mean_gradients("data"), sgd), 1),
    }[method]
    init, step = make_step(loss_fn, tx, mesh)
    params = nnx.to_pure_dict(nnx.state(ConvNet(c.model, rngs=nnx.Rngs(seed))))
    state = init(params, seed)
    digits = divide(images, labels, c.alpha, seed, mesh, batch=c.batch, test_images=c.test_images)
    right = jax.jit(
        lambda p: jnp.mean(jnp.argmax(logits(p, digits.test_images), -1) == digits.test_labels)
    )
    # As many steps by synchronous SGD too, which are as many more rounds.
    for number in range(1, c.rounds * c.local_steps // local_steps + 1):
        for _ in range(local_steps):
            state, metrics = step(state, next(digits.batches))
            jax.block_until_ready(state)
        shared = state.opt_state.z if method == "ADMM" else step.consensus(state)[0]
        row = {"round": number, "steps": number * local_steps, "accuracy": float(right(shared))}
        told = {k: float(v) for k, v in metrics.items() if k.startswith("admm_")}
        yield {**row, "loss": float(metrics["loss"]), **told}


def network_table(config: Config, rows: list[Row]) -> Table:
    """Accuracy at equal rounds; synchronous SGD also after as many steps."""
    c = config.network
    shown = sorted({n for n in (1, 2, 5, 10, 20, c.rounds) if n <= c.rounds})
    last = c.rounds * c.local_steps
    table = Table(
        title=f"digits: test accuracy in %, mean of {len(config.seeds)} runs ± deviation; a round "
        f"is {c.local_steps} steps (synchronous SGD: one)",
        box=box.MARKDOWN,
    )
    table.add_column("", no_wrap=True)
    for number in [*shown, last]:
        table.add_column(f"round {number}", justify="right")
    for method in METHODS:
        cells = []
        for number in [*shown, last]:
            values = [
                100 * r["accuracy"] for r in rows if (r["method"], r["round"]) == (method, number)
            ]
            cells.append(f"{np.mean(values):.1f} ± {np.std(values):.1f}" if values else "")
        table.add_row(method, *cells)
    return table


if __name__ == "__main__":
    main(tyro.cli(Config))
