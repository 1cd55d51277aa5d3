"""Gossip over six graphs: how fast workers agree, and what that is worth in training.

python experiments/gossip/run.py --help
"""

import itertools
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
from jax.sharding import PartitionSpec as P
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[2]))  # a clone's root, for `experiments` itself

from experiments.digits import divide, read_digits
from experiments.gossip import report
from experiments.gossip.config import Config
from jdml.aggregate import choco, consensus_distance, gossip, mean_gradients, push_sum
from jdml.communicate.codecs import int8, top_k
from jdml.communicate.topology import (
    Graph,
    complete,
    exponential,
    from_edges,
    mix,
    one_peer_exponential,
    random_pairs,
    ring,
    torus,
)
from jdml.models import ConvNet
from jdml.sharding import collectives, make_mesh
from jdml.train import make_step

Row = dict[str, Any]


def main(config: Config) -> None:
    """Averaging, averaging with compressed payloads, training; tables, pictures."""
    jax.config.update("jax_num_cpu_devices", config.workers)
    mesh = make_mesh({"data": config.workers}, devices=jax.devices()[: config.workers])
    graphs = graphs_of(config)
    console = Console(record=True, width=120, highlight=False)

    c = config.averaging
    rows: list[Row] = []
    for name, graph in graphs.items():
        tx = gossip("data", graph, 1, "adapt_then_combine")
        rows += of("averaging", name, average(config, tx, c.rounds, mesh, graph.period))
    console.print(report.averaging_table(graphs, rows))

    sparse = top_k(c.kept)
    compressed = {
        "gossip, exact": (gossip("data", ring, 1, "adapt_then_combine"), c.rounds),
        "gossip, int8": (gossip("data", ring, 1, "adapt_then_combine", int8()), c.rounds),
        "CHOCO, int8": (choco("data", ring, int8(), 1.0), c.rounds),
        f"CHOCO, top-k {c.kept:.3g}": (choco("data", ring, sparse, c.gamma), c.compressed_rounds),
    }
    for name, (tx, num_rounds) in compressed.items():
        rows += of("compressed", name, average(config, tx, num_rounds, mesh))
    rows += of("compressed", f"mix, top-k {c.kept:.3g}", plain_sparse(config, mesh))
    console.print(report.compressed_table(config, rows))

    images, labels = read_digits()
    for name, (tx, period) in methods_of(config, graphs).items():
        rows += of("training", name, train(config, tx, period, images, labels, mesh))
    console.print(report.training_table(config, rows))

    config.out.mkdir(parents=True, exist_ok=True)
    console.save_text(str(config.out / "summary.txt"))
    with (config.out / "metrics.jsonl").open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    try:
        report.plot_averaging(rows, config.out / "averaging.png")
        report.plot_training(rows, config.out / "training.png")
    except ImportError:
        print("No pictures: pip install 'jdml[experiments]' brings matplotlib.")


def of(part: str, name: str, rows: Iterator[Row]) -> Iterator[Row]:
    """The rows with what they belong to."""
    return ({**row, "part": part, "name": name} for row in rows)


def graphs_of(config: Config) -> dict[str, Graph]:
    """The graphs, for so many workers."""
    n = config.workers
    makers = {
        "ring": lambda: ring(n),
        "torus": lambda: torus(config.rows, n // config.rows),
        "exponential": lambda: exponential(n),
        "one-peer exponential": lambda: one_peer_exponential(n),
        "random pairs": lambda: random_pairs(n, config.pairs, config.seeds[0]),
        "complete": lambda: complete(n),
    }
    return {name: makers[name]() for name in config.graphs}


def methods_of(
    config: Config, graphs: dict[str, Graph]
) -> dict[str, tuple[optax.GradientTransformation, int]]:
    """What is trained: ``(chain, period)``."""
    n, c = config.workers, config.training
    sgd = optax.sgd(c.learning_rate)
    # A ring one way, and each fourth worker sends half-way round too: rows do not sum to 1.
    edges = [(i, (i + 1) % n) for i in range(n)]
    one_way = from_edges(n, edges + [(i, (i + n // 2) % n) for i in range(0, n, 4)], directed=True)
    sparse = top_k(config.averaging.kept)
    return {
        "all-reduce": (optax.chain(mean_gradients("data"), sgd), 1),
        **{
            name: (optax.chain(sgd, gossip("data", graph, 1, "adapt_then_combine")), graph.period)
            for name, graph in graphs.items()
        },
        "push-sum, one-way": (optax.chain(sgd, push_sum("data", one_way)), 1),
        "CHOCO on the ring": (optax.chain(sgd, choco("data", ring, sparse, c.gamma)), 1),
    }


def vectors_of(config: Config) -> np.ndarray:
    """One normal vector for each worker, f32 ``[workers, elements]``."""
    rng = np.random.default_rng(config.seeds[0])
    return rng.normal(size=(config.workers, config.averaging.elements)).astype(np.float32)


def average(
    config: Config,
    mixing: optax.GradientTransformation,
    num_rounds: int,
    mesh: Mesh,
    period: int = 1,
) -> Iterator[Row]:
    """A row per round of a linear consensus problem, from round 0 (before the first)."""
    vectors = vectors_of(config)
    # The first gradient puts each worker where it starts; then there are none, and they mix.
    init, step = make_step(
        lambda params, batch, key: (-jnp.sum(batch * params), {}),
        optax.chain(optax.sgd(1.0), mixing),
        mesh,
    )
    state = init(jnp.zeros(config.averaging.elements), config.seeds[0])
    scales = jnp.zeros(num_rounds).at[0].set(1.0)

    @jax.jit
    def rounds(state: Any, scales: jax.Array) -> Any:
        def one(state: Any, scale: jax.Array) -> Any:
            state, _ = step(state, scale * vectors)
            return state, consensus_distance(state.params)

        return jax.lax.scan(one, state, scales)

    compiled = rounds.lower(state, scales).compile()
    sent = sent_bytes(compiled, mesh, period)
    state, distances = compiled(state, scales)
    moved = np.linalg.norm(np.mean(state.params, axis=0) - vectors.mean(axis=0))
    return curve(vectors, np.asarray(distances), sent, float(moved))


def plain_sparse(config: Config, mesh: Mesh) -> Iterator[Row]:
    """The same for what :func:`jdml.aggregate.gossip` refuses: mixing what top-k keeps of x."""
    c = config.averaging
    vectors, graph, codec = vectors_of(config), ring(config.workers), top_k(c.kept)

    def on_worker(x: jax.Array) -> jax.Array:
        return mix(x, "data", graph, codec=codec)

    mixing = jax.shard_map(on_worker, mesh=mesh, in_specs=P("data"), out_specs=P("data"))

    @jax.jit
    def rounds(x: jax.Array) -> Any:
        def one(x: jax.Array, _: None) -> Any:
            x = mixing(x)
            return x, consensus_distance(x)

        return jax.lax.scan(one, x, None, length=c.compressed_rounds)

    compiled = rounds.lower(vectors).compile()
    sent = sent_bytes(compiled, mesh, 1)
    x, distances = compiled(vectors)
    moved = np.linalg.norm(np.mean(x, axis=0) - vectors.mean(axis=0))
    return curve(vectors, np.asarray(distances), sent, float(moved))


def curve(
    vectors: np.ndarray, distances: np.ndarray, sent: int, mean_moved: float
) -> Iterator[Row]:
    """Distances from round 0, and bytes."""
    first = float(consensus_distance(jnp.asarray(vectors)))
    for number, distance in enumerate([first, *distances.tolist()]):
        row = {"round": number, "distance": distance / first, "bytes_sent": number * sent}
        yield {**row, "mean_moved": mean_moved / first} if number == len(distances) else row


def sent_bytes(compiled: Any, mesh: Mesh, period: int) -> int:
    """What a device sends to neighbours in a round, or else to all.

    Measuring sends something to all, too, which is not counted. Of a period's branches, equally
    long, a round takes one.
    """
    listed = collectives(compiled, mesh)
    listed = [c for c in listed if c.kind == "collective-permute"] or listed
    always = sum(c.sent_bytes for c in listed if not c.conditional)
    return always + sum(c.sent_bytes for c in listed if c.conditional) // period


def train(
    config: Config,
    tx: optax.GradientTransformation,
    period: int,
    images: np.ndarray,
    labels: np.ndarray,
    mesh: Mesh,
) -> Iterator[Row]:
    """Rows of all runs: test loss and accuracy of the workers' models and of their mean."""
    c = config.training
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: ConvNet(c.model, rngs=nnx.Rngs(0))))

    def logits(params: Any, inputs: jax.Array) -> jax.Array:
        return nnx.merge(graphdef, params)(inputs.astype(jnp.float32) / 16)

    def loss_fn(params: Any, batch: Any, key: Any) -> Any:
        del key
        losses = optax.softmax_cross_entropy(logits(params, batch["inputs"]), batch["targets"])
        return jnp.mean(losses), {}

    init, step = make_step(loss_fn, tx, mesh, steps_per_call=c.eval_every)

    def score(params: Any, images: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
        outputs = logits(params, images)
        losses = optax.softmax_cross_entropy_with_integer_labels(outputs, labels)
        return losses.mean(), jnp.mean(outputs.argmax(-1) == labels)

    @jax.jit
    def measure(params: Any, images: jax.Array, labels: jax.Array) -> dict[str, jax.Array]:
        own, own_right = jax.lax.map(lambda p: score(p, images, labels), params)
        mean = jax.tree.map(lambda x: x.mean(axis=0), params)
        shared, right = score(mean, images, labels)
        return {
            "distance": consensus_distance(params),
            "loss_own": own.mean(),
            "accuracy_own": own_right.mean(),
            "loss_mean": shared,
            "accuracy_mean": right,
        }

    compiled = None
    for seed in config.seeds:
        params = nnx.to_pure_dict(nnx.state(ConvNet(c.model, rngs=nnx.Rngs(seed))))
        state = init(params, seed)
        one_model = jax.tree.leaves(state.params)[0].ndim == jax.tree.leaves(params)[0].ndim
        digits = divide(
            images, labels, c.alpha, seed, mesh, batch=c.batch, test_images=c.test_images
        )
        for number in range(0, c.steps + 1, c.eval_every):
            if number:
                drawn = itertools.islice(digits.batches, c.eval_every)
                batches = jax.tree.map(lambda *x: np.stack(x), *drawn)
                if compiled is None:
                    compiled = step.lower(state, batches).compile()
                    sent = sent_bytes(compiled, mesh, period)
                state, _ = compiled(state, batches)
            trained = jax.tree.map(lambda x: x[None], state.params) if one_model else state.params
            values = measure(trained, digits.test_images, digits.test_labels)
            values = {k: float(v) for k, v in values.items()}
            yield {"seed": seed, "step": number, "bytes_sent": number and number * sent, **values}


if __name__ == "__main__":
    main(tyro.cli(Config))
