"""Tables that the ends read by rows, beside two automatic axes."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jdml.partition.pipeline import pipeline
from jdml.partition.pipeline.rows import tables
from jdml.sharding import shard
from tests.partition.pipeline.model import close, mesh_of

WORDS, WIDTH = 16, 8


def first(others, batch, key):
    return jnp.take(others["table"], batch["words"], axis=0) * others["scale"]


def block(params, x, batch, key):
    return x + jnp.tanh(x @ params["up"])


def last(others, x, batch, key):
    logits = jax.nn.log_softmax(x @ others["head"])
    return -jnp.mean(jnp.take_along_axis(logits, batch["words"][..., None], axis=-1)), {}


def make_params():
    keys = jax.random.split(jax.random.key(0), 4)
    return {
        "head": jax.random.normal(keys[0], (WIDTH, WORDS)),
        "scale": 1 + 0.1 * jax.random.normal(keys[1], (WIDTH,)),
        "table": jax.random.normal(keys[2], (WORDS, WIDTH)),
        "layers": {"up": 0.3 * jax.random.normal(keys[3], (2, WIDTH, WIDTH))},
    }


def branches(others, i):
    return jax.lax.cond(
        i[0] > 0, lambda: others["table"][i[:1]], lambda: others["head"].T[i[0]][None]
    )


def loop(others, i):
    narrow = others["table"].astype(jnp.bfloat16)
    return jax.lax.scan(lambda total, j: (total + narrow[j[None]], None), narrow[:1], i)


def test_tables_are_found():
    params, x = make_params(), jnp.ones((4, WIDTH))
    del params["layers"]
    batch = {"words": jnp.arange(4)}

    def names(f, *arguments):
        return {list(params)[i] for i in tables(f, params, *arguments)}

    assert names(first, batch, None) == {"table"}
    assert names(last, x, batch, None) == {"head"}
    assert names(branches, batch["words"]) == {"table", "head"}
    assert names(jax.jit(jax.checkpoint(loop)), batch["words"]) == {"table"}
    assert not names(lambda others, i: others["table"][0] + others["scale"], batch["words"])


@pytest.mark.usefixtures("compiled_lightly")
def test_divided_tables_beside_two_axes():
    """XLA's partitioner would end the process: it does where the tables are not put together."""
    mesh = mesh_of(stage=2, fsdp=2, model=2)
    pipe = pipeline(first, block, last, mesh, num_layers=2, micro_batches=2)
    specs = pipe.specs(
        {
            "head": P("fsdp", "model"),
            "scale": P("fsdp"),
            "table": P("model", "fsdp"),
            "layers": {"up": P()},
        }
    )
    params = make_params()
    batch = {"words": jnp.arange(32).reshape(8, 4) % WORDS}
    arranged = shard(pipe.arrange(params), mesh, specs)
    placed = jax.device_put(batch, NamedSharding(mesh, P("fsdp")))
    got, gradients = jax.jit(jax.value_and_grad(pipe, has_aux=True))(arranged, placed)
    want, reference = jax.jit(jax.value_and_grad(pipe.reference, has_aux=True))(params, batch)
    close(got, want)
    close(pipe.restore(gradients), reference)
