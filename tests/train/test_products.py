"""Any product of divisions, under any algorithm between the workers: the numbers of plain workers.

The other axes of a mesh divide what one worker does: its batch and parameters (``fsdp``), its
heads and hidden units (``model``), its positions (``seq``), its layers (``stage``), its experts
(``expert``). So whatever the product, a step must end where as many workers of one device each end.
"""

import dataclasses
import functools

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from jdml.aggregate import average_params, gossip, mean_gradients
from jdml.communicate import error_feedback
from jdml.communicate.codecs import int8
from jdml.communicate.topology import ring
from jdml.models import Transformer, TransformerConfig, pipeline_parts, training_loss
from jdml.partition.pipeline import one_f_one_b, pipeline, zero_bubble
from jdml.sharding import make_mesh, presets, shard, specs
from jdml.train import make_step

AXES = ("data", "fsdp", "stage", "expert", "seq", "model")
RULES = presets.expert_parallel(presets.fsdp_tensor().replace(seq="seq"))
CONFIG = TransformerConfig(
    vocab_size=16, num_layers=2, embed_dim=16, num_heads=4, num_kv_heads=2, head_dim=4,
    mlp_dim=16, max_seq_len=8, flatten_tokens=False,
)  # fmt: skip
EXPERTS = {"num_experts": 4, "balance_weight": 0.0, "z_weight": 0.0}
BATCH, SEQ, STEPS, RATE = 16, 8, 2, 0.1

OUTER = optax.sgd(0.7, momentum=0.9, nesterov=True)
ALGORITHMS = {
    "exact": lambda: optax.chain(mean_gradients("data"), optax.sgd(RATE)),
    "int8": lambda: optax.chain(mean_gradients("data", error_feedback(int8(64))), optax.sgd(RATE)),
    "DiLoCo": lambda: optax.chain(
        optax.sgd(RATE, momentum=0.9), average_params("data", every=2, outer=OUTER)
    ),
    "gossip": lambda: optax.chain(optax.sgd(RATE), gossip("data", graph=ring)),
}
RING = {"attention": "ring"}
ULYSSES = {"attention": "ulysses"}
GATHER = {"attention": "gather"}

PRODUCTS = [
    ({"data": 8}, "int8", {}),
    ({"fsdp": 8}, "exact", {}),
    ({"data": 4, "model": 2}, "DiLoCo", {}),
    ({"data": 2, "fsdp": 2, "model": 2}, "gossip", {}),
    ({"data": 2, "seq": 2, "model": 2}, "int8", RING),
    ({"data": 4, "seq": 2}, "gossip", RING),
    ({"data": 2, "fsdp": 2, "seq": 2}, "int8", ULYSSES),
    ({"data": 2, "expert": 2, "seq": 2}, "DiLoCo", EXPERTS | GATHER),
    ({"expert": 2, "seq": 2, "model": 2}, "exact", EXPERTS | RING),
    ({"data": 2, "fsdp": 2, "expert": 2}, "gossip", EXPERTS),
    ({"data": 2, "expert": 2, "model": 2}, "int8", EXPERTS),
    ({"data": 2, "stage": 2, "model": 2}, "int8", {}),
    ({"data": 2, "stage": 2, "fsdp": 2}, "DiLoCo", {}),
    ({"data": 2, "stage": 2, "seq": 2}, "gossip", ULYSSES),
    ({"data": 2, "stage": 2, "expert": 2}, "int8", EXPERTS),
    ({"stage": 2, "seq": 2, "model": 2}, "exact", GATHER),
]


def worker_loss(graphdef):
    def loss_fn(params, batch, key):
        del key
        return training_loss(nnx.merge(graphdef, params), batch["inputs"], batch["targets"])

    return loss_fn


@functools.cache
def model_of(changes):
    config = dataclasses.replace(CONFIG, **dict(changes))
    return nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))


@functools.cache
def start(experts):
    """The first parameters, on the host."""
    config = dataclasses.replace(CONFIG, **(EXPERTS if experts else {}))
    state = jax.jit(lambda: nnx.state(Transformer(config, rngs=nnx.Rngs(0))))()
    return jax.device_get(nnx.to_pure_dict(state))


def batches():
    for i in range(STEPS):
        tokens = np.asarray(jax.random.randint(jax.random.key(i), (BATCH, SEQ + 1), 0, 16))
        yield {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}


def train(mesh, algorithm, changes):
    """Every worker's parameters after the steps, on the host, and the losses."""
    model = model_of(tuple(sorted(changes.items())))
    params = start("num_experts" in changes)
    graphdef, loss_fn = nnx.graphdef(model), None
    layout = nnx.to_pure_dict(specs(model, mesh, RULES))
    restore = lambda params: params  # noqa: E731
    if mesh.shape["stage"] > 1:
        schedule = one_f_one_b() if mesh.shape["data"] > 1 else zero_bubble()
        pipe = pipeline(
            *pipeline_parts(model), mesh, num_layers=2, micro_batches=2, schedule=schedule
        )
        if mesh.shape["model"] == 1:  # else no dim of a table is free
            pipe = pipe.divide_ends(params, layout)
        loss_fn, params, restore = pipe, pipe.arrange(params), pipe.restore
        layout = pipe.specs(layout)
    placed = shard(params, mesh, layout)
    init, step = make_step(
        loss_fn or worker_loss(graphdef),
        ALGORITHMS[algorithm](),
        mesh,
        specs=layout,
        rules=RULES,
        batch_axes=("fsdp", "expert"),
    )
    state, losses = init(placed, 0), []
    for batch in batches():
        state, metrics = step(state, shard(batch, mesh, P(("data", "fsdp", "expert"), "seq")))
        losses.append(float(metrics["loss"]))
    return jax.device_get(restore(step.consensus(state)[0])), losses


@functools.cache
def alone(num_workers, algorithm, experts):
    """Workers of one device each, with plain attention."""
    shape = dict.fromkeys(AXES, 1) | {"data": num_workers}
    mesh = make_mesh(shape, devices=jax.devices()[:num_workers])
    return train(mesh, algorithm, EXPERTS if experts else {})


def distance(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return float(np.sqrt(sum(np.sum((x - y) ** 2) for x, y in pairs)))


def name_of(part):
    return part if isinstance(part, str) else ",".join(f"{k}={v}" for k, v in part.items())


def quick_or_slow(products):
    """One with three axes and a codec is quick, the others slow."""
    quick = {"data": 2, "seq": 2, "model": 2}
    return [p if p[0] == quick else pytest.param(*p, marks=pytest.mark.slow) for p in products]


@pytest.mark.parametrize(("shape", "algorithm", "changes"), quick_or_slow(PRODUCTS), ids=name_of)
def test_a_product_ends_where_plain_workers_end(shape, algorithm, changes):
    mesh = make_mesh({axis: shape.get(axis, 1) for axis in AXES})
    found, losses = train(mesh, algorithm, changes)
    experts = "num_experts" in changes
    wanted, wanted_losses = alone(mesh.shape["data"], algorithm, experts)
    # As a part of the way that the parameters went. int8's blocks are those of a shard, not of the
    # whole leaf: rounded elsewhere, by at most 1/254 of a block's largest gradient.
    part = distance(found, wanted) / distance(wanted, start(experts))
    assert part < (0.02 if algorithm == "int8" else 2e-5)
    np.testing.assert_allclose(losses, wanted_losses, rtol=1e-3 if algorithm == "int8" else 1e-5)


def test_a_ring_within_a_stage_is_refused():
    """Its permutations would be of stages that do something else, too."""
    mesh = make_mesh({axis: {"data": 2, "stage": 2, "seq": 2}.get(axis, 1) for axis in AXES})
    with pytest.raises(ValueError, match=r"permutes over mesh axis .'seq',. .*attention='gather'"):
        train(mesh, "gossip", RING)
