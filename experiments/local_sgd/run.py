"""Local SGD, DiLoCo and streaming DiLoCo beside synchronous training, on a small transformer.

python experiments/local_sgd/run.py --help
"""

import dataclasses
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import tyro
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[2]))  # a clone's root, for `experiments` itself

from experiments.local_sgd.config import Config
from experiments.local_sgd.methods import METHODS, Method, chain
from experiments.local_sgd.report import Row, write_report
from jdml.models import Transformer, next_token_loss
from jdml.sharding import init, make_mesh, presets
from jdml.train import Checkpointer, MetricsLog, fit, make_evaluate, make_step, read_metrics
from jdml.train.data import Batches, Corpus, read_corpus

RULES = presets.data_parallel()


def main(config: Config) -> None:
    """Every method asked for, then a report on all that are finished."""
    config = config.quickly() if config.quick else config
    jax.config.update("jax_num_cpu_devices", config.workers)
    compare(config, Console(highlight=False, soft_wrap=True))


def compare(config: Config, console: Console) -> dict[str, list[Row]]:
    """The methods' logs, and a report on them; a run that has finished is read, not repeated."""
    task = make_task(config)
    console.print(task.summary)
    rows: dict[str, list[Row]] = {}
    for name in config.methods:
        rows[name] = train(task, METHODS[name], config.out / slug(name), name, console)
        if rows[name][-1]["step"] < config.steps:
            console.print(f"Stopped and saved in {config.out}; the same command again goes on.")
            return rows
    write_report(task.config, rows, console, f"local SGD on {task.corpus.name}")
    return rows


class Task(NamedTuple):
    """What all methods have in common."""

    config: Config
    corpus: Corpus
    mesh: Mesh

    @property
    def summary(self) -> str:
        config = self.config
        return (
            f"{self.corpus.name}: {self.corpus.tokens.size:,} bytes; "
            f"{config.model.num_params:,} parameters; {config.workers} workers of "
            f"{config.batch // config.workers} × {config.seq_len} bytes a step"
        )


def make_task(config: Config) -> Task:
    """Reads the text and makes the mesh."""
    corpus = read_corpus(config.data)
    model = dataclasses.replace(config.model, vocab_size=corpus.vocab_size)
    mesh = make_mesh({"data": config.workers}, devices=jax.devices()[: config.workers])
    return Task(dataclasses.replace(config, model=model), corpus, mesh)


def slug(name: str) -> str:
    """A method's name as that of a folder."""
    return "-".join(name.replace("=", "").replace(",", "").split())


def train(task: Task, method: Method, folder: Path, name: str, console: Console) -> list[Row]:
    """One run's log: from its newest checkpoint or from the seed; of a finished one, as it is."""
    config, mesh = task.config, task.mesh
    identity = config.identity() | dataclasses.asdict(method)
    with Checkpointer(folder / "checkpoints", identity, keep=1) as checkpointer:
        latest = checkpointer.latest_step()
        if latest == config.steps:
            console.print(f"{name}: finished before")
            return read_metrics(folder / "metrics.jsonl")
        placed = NamedSharding(mesh, P("data"))
        text, held_out = task.corpus.split(config.holdout)
        # Worker k takes the k-th part of each batch: every method sees the same samples.
        batches = Batches(text, config.batch, config.seq_len, config.seed, sharding=placed)
        valid = Batches(held_out, config.batch, config.seq_len, shuffle=False, sharding=placed)
        model = init(lambda: Transformer(config.model, rngs=nnx.Rngs(config.seed)), mesh, RULES)
        graphdef, weights = nnx.split(model)
        params = nnx.to_pure_dict(weights)

        def loss_fn(params, batch, key):
            model = nnx.merge(graphdef, params)
            return next_token_loss(model, batch["inputs"], batch["targets"], key=key), {}

        init_state, step = make_step(loss_fn, chain(config, method), mesh, rules=RULES)
        if latest is None:
            state = init_state(params, config.seed)
        else:
            state, position, latest = checkpointer.restore(init_state.abstract(params, config.seed))
            batches.restore(position)
            console.print(f"{name}: resumed at step {latest} of {config.steps}")
        measure = make_evaluate(loss_fn, mesh, RULES)
        rounds = method.every or 1
        with MetricsLog(folder / "metrics.jsonl", int(state.step)) as log:
            fit(
                step,
                state,
                batches,
                config.steps,
                mesh=mesh,
                checkpointer=checkpointer,
                save_every=config.save_every,
                # The mean of the workers' models, at ends of rounds: there most are one.
                evaluate=lambda s: measure(
                    step.consensus(s)[0], valid.one_epoch(config.eval_batches)
                ),
                eval_every=max(1, round(config.eval_every / rounds)) * rounds,
                log=log,
                tokens_per_step=batches.tokens_per_batch,
                name=name,
                console=console,
            )
            return log.rows


if __name__ == "__main__":
    main(tyro.cli(Config))
