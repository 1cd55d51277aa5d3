"""One small regression problem as a bare pytree, a Linen and an NNX model."""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from jdml.sharding import Rules, init, specs

INPUT, HIDDEN, OUTPUT, BATCH = 8, 16, 4, 16
RULES = Rules(embed="fsdp", mlp="model")


class Problem(NamedTuple):
    params: Any
    specs: Any
    loss_fn: Any


def mse(prediction: jax.Array, batch: dict[str, jax.Array]) -> tuple[jax.Array, dict]:
    error = prediction - batch["y"]
    return jnp.mean(error**2), {"mae": jnp.mean(jnp.abs(error))}


def rules_on(mesh):
    """The rules, less the axes that this mesh lacks."""
    table = {"embed": "fsdp", "mlp": "model"}
    return Rules(**{k: v if v in mesh.axis_names else None for k, v in table.items()})


def pytree_problem(mesh) -> Problem:
    k1, k2 = jax.random.split(jax.random.key(1))
    params = {
        "in": {
            "kernel": jax.random.normal(k1, (INPUT, HIDDEN)) / 3,
            "bias": jnp.zeros((HIDDEN,)),
        },
        "out": {"kernel": jax.random.normal(k2, (HIDDEN, OUTPUT)) / 4},
        "scale": jnp.ones(()),
    }
    rules = rules_on(mesh)
    tree_specs = {
        "in": {"kernel": rules.spec(("embed", "mlp")), "bias": rules.spec(("mlp",))},
        "out": {"kernel": rules.spec(("mlp", "embed"))},
        "scale": P(),
    }

    def loss_fn(p, batch, key):
        del key
        hidden = jnp.tanh(batch["x"] @ p["in"]["kernel"] + p["in"]["bias"])
        return mse(p["scale"] * (hidden @ p["out"]["kernel"]), batch)

    return Problem(params, tree_specs, loss_fn)


class LinenMLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        kernel = nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("embed", "mlp"))
        bias = nn.with_logical_partitioning(nn.initializers.zeros, ("mlp",))
        x = jnp.tanh(nn.Dense(HIDDEN, kernel_init=kernel, bias_init=bias)(x))
        back = nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("mlp", "embed"))
        return nn.Dense(OUTPUT, use_bias=False, kernel_init=back)(x)


def linen_problem(mesh) -> Problem:
    model = LinenMLP()
    rules = rules_on(mesh)

    def make():
        return model.init(jax.random.key(1), jnp.zeros((1, INPUT)))["params"]

    params = init(make, mesh, rules)
    return Problem(
        params,
        specs(params, mesh, rules),
        lambda p, batch, key: mse(model.apply({"params": p}, batch["x"]), batch),
    )


class NnxMLP(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.up = nnx.Linear(
            INPUT,
            HIDDEN,
            kernel_metadata={"out_sharding": ("embed", "mlp")},
            bias_metadata={"out_sharding": ("mlp",)},
            rngs=rngs,
        )
        self.down = nnx.Linear(
            HIDDEN,
            OUTPUT,
            use_bias=False,
            kernel_metadata={"out_sharding": ("mlp", "embed")},
            rngs=rngs,
        )

    def __call__(self, x):
        return self.down(jnp.tanh(self.up(x)))


def nnx_problem(mesh) -> Problem:
    rules = rules_on(mesh)
    model = init(lambda: NnxMLP(nnx.Rngs(1)), mesh, rules)
    graphdef, params = nnx.split(model, nnx.Param)
    return Problem(
        params,
        specs(model, mesh, rules),
        lambda p, batch, key: mse(nnx.merge(graphdef, p)(batch["x"]), batch),
    )


PROBLEMS = {"pytree": pytree_problem, "linen": linen_problem, "nnx": nnx_problem}


@functools.cache
def draw(i: int) -> tuple[jax.Array, jax.Array]:
    kx, ky = jax.random.split(jax.random.key(100 + i))
    x = jax.random.normal(kx, (BATCH, INPUT), jnp.float32)
    return x, jax.random.normal(ky, (BATCH, OUTPUT), jnp.float32)


def make_batch(i: int) -> dict[str, jax.Array]:
    """Batch ``i``, f32; drawn once."""
    x, y = draw(i)
    return {"x": x, "y": y}
