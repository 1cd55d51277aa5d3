"""Trains a transformer whose workers exchange compressed gradients, beside an exact run.

python experiments/train_lm/run.py --help
"""

import dataclasses
import math
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[2]))  # a clone's root, for `experiments` itself

from experiments.train_lm.config import Config, MeshConfig, ScheduleConfig
from experiments.train_lm.content import content, run_name, topology
from jdml.aggregate import mean_gradients
from jdml.models import Transformer, generate, next_token_loss
from jdml.sharding import Rules, describe, init, make_mesh, presets, use_rules
from jdml.sharding.hosts import check_fingerprint, initialize
from jdml.train import Checkpointer, MetricsLog, fit, make_evaluate, make_step
from jdml.train.data import Batches, Corpus, read_corpus
from jdml.train.report import comparison, write_report

BATCH_AXES = ("data", "fsdp")


def main(config: Config) -> None:
    """The whole job: data, mesh, one run or two, a sample, a report."""
    content(config)  # refuses bad options before anything is read or compiled
    start_devices(config)
    console = Console(quiet=jax.process_index() != 0, highlight=False, soft_wrap=True)
    corpus = read_corpus(config.data, vocab_size=config.vocab_size, dtype=config.data_dtype)
    config = dataclasses.replace(
        config, model=dataclasses.replace(config.model, vocab_size=corpus.vocab_size)
    )
    mesh = build_mesh(config.mesh)
    check_fingerprint(dataclasses.asdict(config))
    train_part, held_out = corpus.split(config.holdout)
    console.print(
        f"{corpus.name}: {corpus.tokens.size:,} tokens; {config.model.num_params:,} parameters; "
        f"{mesh.devices.size} {mesh.devices.flat[0].platform} devices as "
        + " × ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    )

    names = ["exact"] if config.codec == "none" else [run_name(config)]
    if config.codec != "none" and config.compare:
        names.append("exact")
    rows, models = {}, {}
    for name in names:
        rows[name], models[name], finished = train(
            config, name, mesh, train_part, held_out, console
        )
        if not finished:
            console.print(f"Stopped and saved in {config.out}; the same command again goes on.")
            return

    if len(names) == 2:
        lines = [comparison(names[0], rows[names[0]], "exact", rows["exact"], unit(config))]
    else:
        (name,) = names
        lines = [f"{name}: validation loss {rows[name][-1]['val_loss']:.4f} {unit(config)}"]
    if config.sample_tokens:
        lines += ["", *sample(config, models[names[0]], mesh).splitlines()]
    if jax.process_index() == 0:
        report = write_report(
            config.out / "report",
            rows,
            lines,
            unit=unit(config),
            title=f"train_lm on {corpus.name}",
        )
        console.print("\n".join(lines), markup=False)
        console.print(f"Report: {report}/summary.txt, loss.png, metrics.jsonl")


def start_devices(config: Config) -> None:
    """Joins the other processes, if any, and simulates devices where there is no accelerator."""
    if initialize().num_processes == 1:
        jax.config.update("jax_num_cpu_devices", config.simulate)


def build_mesh(sizes: MeshConfig) -> Mesh:
    """The mesh; axes of size 1 stay, so that the rules name the same axes everywhere."""
    model = sizes.model or math.gcd(2, jax.device_count())
    return make_mesh({"data": sizes.data, "fsdp": sizes.fsdp, "model": model})


def rules_of() -> Rules:
    """FSDP × tensor parallel."""
    return presets.fsdp_tensor()


def optimizer(config: Config, name: str) -> optax.GradientTransformation:
    """The chain: aggregate, then optimise."""
    exchange = mean_gradients("data")
    if name != "exact":
        exchange = mean_gradients("data", content(config), topology(config))
    return optax.chain(
        exchange,
        optax.clip_by_global_norm(config.clip),
        optax.adamw(
            learning_rate(config.schedule, config.steps),
            b2=0.95,
            weight_decay=config.weight_decay,
            mask=lambda params: jax.tree.map(lambda x: x.ndim > 1, params),
        ),
    )


def learning_rate(schedule: ScheduleConfig, steps: int) -> optax.Schedule:
    """Warm-up and decay as the options say."""
    decay_steps = max(1, steps - schedule.warmup_steps)
    end = schedule.peak * schedule.final_fraction
    decay = {
        "cosine": optax.cosine_decay_schedule(schedule.peak, decay_steps, schedule.final_fraction),
        "linear": optax.linear_schedule(schedule.peak, end, decay_steps),
        "constant": optax.constant_schedule(schedule.peak),
    }[schedule.decay]
    warmup = optax.linear_schedule(0.0, schedule.peak, max(1, schedule.warmup_steps))
    return optax.join_schedules([warmup, decay], [schedule.warmup_steps])


def train(
    config: Config, name: str, mesh: Mesh, train_part: Corpus, held_out: Corpus, console: Console
) -> tuple[list[dict], nnx.Module, bool]:
    """One run, from its newest checkpoint or from the seed; its log, model and whether it ended."""
    folder, rules = config.out / name, rules_of()
    placed = NamedSharding(mesh, P(BATCH_AXES))
    batches = Batches(train_part, config.batch, config.seq_len, config.seed, sharding=placed)
    valid = Batches(held_out, config.batch, config.seq_len, shuffle=False, sharding=placed)
    with Checkpointer(
        folder / "checkpoints", config.identity(name), keep=config.keep
    ) as checkpointer:
        latest = checkpointer.latest_step()
        if latest is not None and config.resume == "never":
            raise ValueError(
                f"{folder} holds a run (step {latest}); --resume never keeps it. Give another "
                "--out."
            )
        if latest is None and config.resume == "must":
            raise ValueError(f"{folder} holds no checkpoint to resume; leave out --resume must.")

        model = init(lambda: Transformer(config.model, rngs=nnx.Rngs(config.seed)), mesh, rules)
        graphdef, weights = nnx.split(model)
        params = nnx.to_pure_dict(weights)

        def loss_fn(params, batch, key):
            model = nnx.merge(graphdef, params)
            return next_token_loss(model, batch["inputs"], batch["targets"], key=key), {}

        init_state, step = make_step(
            loss_fn,
            optimizer(config, name),
            mesh,
            rules=rules,
            batch_axes=("fsdp",),
            accumulate=config.accumulate,
        )
        abstract = init_state.abstract(params, config.seed)
        if latest is None:
            checkpointer.check_room(abstract)
            state = init_state(params, config.seed)
            if name != "exact" or not config.compare:
                console.print(describe(state.params))
        else:
            state, position, latest = checkpointer.restore(abstract, residual=config.residual)
            batches.restore(position)
            console.print(f"{name}: resumed at step {latest} of {config.steps}")
        measure = make_evaluate(loss_fn, mesh, rules)
        with MetricsLog(
            folder / "metrics.jsonl", int(state.step), write=jax.process_index() == 0
        ) as log:
            result = fit(
                step,
                state,
                batches,
                config.steps,
                mesh=mesh,
                checkpointer=checkpointer,
                save_every=config.save_every,
                evaluate=lambda s: measure(
                    step.consensus(s)[0], valid.one_epoch(config.eval_batches)
                ),
                eval_every=config.eval_every,
                log=log,
                tokens_per_step=batches.tokens_per_batch,
                name=name,
                console=console,
            )
            trained = nnx.merge(graphdef, step.consensus(result.state)[0])
            return log.rows, trained, result.finished


def unit(config: Config) -> str:
    """Of the loss."""
    return "nats per byte" if is_text(config) else "nats per token"


def is_text(config: Config) -> bool:
    """Whether a token is a byte."""
    return config.data is None or config.data.suffix not in (".bin", ".npy")


def sample(config: Config, model: nnx.Module, mesh: Mesh) -> str:
    """Text, or token ids, that the model writes after the prompt."""
    prompt = np.frombuffer(config.prompt.encode() or b"\n", np.uint8).astype(np.int32)
    if not is_text(config):
        prompt = np.zeros(1, np.int32)
    with use_rules(mesh, rules_of().replace(batch=None)):
        tokens = generate(
            model,
            jnp.asarray(prompt)[None],
            config.sample_tokens,
            jax.random.key(config.seed),
            temperature=0.7,
        )
    ids = np.asarray(multihost_utils.process_allgather(tokens, tiled=True))[0]
    if not is_text(config):
        return "Sample: " + " ".join(map(str, ids))
    text = bytes(ids.astype(np.uint8)).decode(errors="replace")
    return "Sample:\n" + (config.prompt or "\n") + text


if __name__ == "__main__":
    main(tyro.cli(Config))
