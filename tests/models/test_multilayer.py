"""The multilayer perceptron: a dense form, its parameters, its bytes, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jdml.models.multilayer import MLP, MLPConfig
from jdml.sharding import collectives, make_mesh, no_mesh, presets, shard, specs, use_rules

TINY = MLPConfig(inputs=6, widths=(8, 12, 16, 20), num_outputs=3)


@pytest.mark.parametrize("config", [TINY, MLPConfig(), MLPConfig(widths=())])
def test_equals_its_dense_form(config):
    model = MLP(config, rngs=nnx.Rngs(0))
    params = nnx.to_pure_dict(nnx.state(model))
    assert sum(x.size for x in jax.tree.leaves(params)) == config.num_params
    x = np.random.default_rng(0).normal(size=(5, config.inputs))
    wanted = x
    for i in range(len(config.widths)):
        layer = params["hidden"][i]
        wanted = np.maximum(wanted @ np.float64(layer["kernel"]) + layer["bias"], 0)
    wanted = wanted @ np.float64(params["head"]["kernel"]) + params["head"]["bias"]
    with no_mesh():
        np.testing.assert_allclose(model(jnp.float32(x)), wanted, rtol=1e-4, atol=1e-5)


def test_the_default_size():
    assert MLPConfig().num_params == 199_210


def test_every_second_product_sums_over_the_axis():
    """Four hidden layers: two sums of activations forward, and nothing else goes over ``model``."""
    mesh, rules = make_mesh({"data": 2, "model": 4}), presets.tensor()
    model = MLP(TINY, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(shard(model, mesh, specs(model, mesh, rules)))
    x = jax.device_put(jnp.ones((4, 6)), NamedSharding(mesh, P("data")))
    with use_rules(mesh, rules):
        program = jax.jit(lambda p, x: nnx.merge(graphdef, p)(x)).lower(params, x).compile()
    found = collectives(program, mesh)
    assert {(c.kind, c.axes) for c in found} == {("all-reduce", ("model",))}
    # Two samples on each device; the second layer's outputs and the fourth's.
    assert sorted(size for c in found for size in c.operand_bytes) == [2 * 12 * 4, 2 * 20 * 4]
    with no_mesh():
        np.testing.assert_allclose(
            program(params, x), model(jnp.ones((4, 6))), rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("x", [jnp.zeros(6), jnp.zeros((2, 5)), jnp.zeros((2, 6), jnp.int32)])
def test_other_inputs_are_refused(x):
    with pytest.raises(ValueError, match=r"expected floats \[batch, 6\]"):
        MLP(TINY, rngs=nnx.Rngs(0))(x)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"widths": (8, 0)}, r"widths\[1\]=0"), ({"inputs": 2.0}, "inputs=2.0")],
)
def test_bad_shapes(change, message):
    with pytest.raises(ValueError, match=message):
        MLPConfig(**change)
