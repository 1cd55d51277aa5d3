"""Placed as asked, created in shards, and the same from a seed on every mesh."""

import math
import re
from collections import OrderedDict

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from jdml.sharding import (
    Rules,
    check,
    infer_fsdp,
    init,
    lower_init,
    make_mesh,
    shard,
    specs,
    unpad,
)
from jdml.sharding.paths import leaves_with_paths

RULES = Rules(embed="fsdp", mlp="model", layers=None)


@pytest.fixture(scope="module")
def mesh():
    return make_mesh({"data": 2, "fsdp": 2, "model": 2})


class Mlp(nnx.Module):
    def __init__(self, rngs, width=8):
        up, down = ("embed", "mlp"), ("mlp", "embed")
        self.up = nnx.Linear(width, 2 * width, rngs=rngs, kernel_metadata={"out_sharding": up})
        self.down = nnx.Linear(2 * width, width, rngs=rngs, kernel_metadata={"out_sharding": down})
        self.drop = nnx.Dropout(0.1, rngs=rngs)


class Stack(nnx.Module):
    def __init__(self, rngs, width=8):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(transform_metadata={nnx.PARTITION_NAME: "layers"})
        def make(rngs):
            return Mlp(rngs, width)

        self.blocks = make(rngs)


class LinenMlp(nn.Module):
    @nn.compact
    def __call__(self, x):
        kernel_init = nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("embed", "mlp"))
        return nn.Dense(16, kernel_init=kernel_init)(x)


def values(tree):
    return {
        path: np.asarray(x if jnp.issubdtype(x.dtype, np.number) else jax.random.key_data(x))
        for path, x in leaves_with_paths(tree)
    }


# --- shard -----------------------------------------------------------------------------------


def test_shard_host_arrays_and_prefix_specs(mesh):
    tree = {"a": np.arange(16.0).reshape(4, 4), "b": [np.ones(4), np.zeros((2, 2))]}
    placed = shard(tree, mesh, {"a": P("fsdp", "model"), "b": P()})
    assert placed["a"].sharding.spec == P("fsdp", "model")
    assert {s.data.shape for s in placed["a"].addressable_shards} == {(2, 2)}
    np.testing.assert_array_equal(placed["a"], tree["a"])
    assert placed["b"][1].sharding.is_fully_replicated


def test_shard_module_is_a_new_module(mesh):
    with nnx.use_eager_sharding(False):
        model = Mlp(nnx.Rngs(0))
    placed = shard(model, mesh, specs(model, mesh, RULES))
    assert isinstance(placed, Mlp)
    assert placed is not model
    assert placed.up.kernel.get_value().sharding.spec == P("fsdp", "model")
    assert len(model.up.kernel.get_value().sharding.device_set) == 1


def test_specs_in_another_container_are_matched_by_path(mesh):
    tree = {"a": np.ones((2, 4)), "b": np.ones((4, 2))}
    layout = OrderedDict(b=P("fsdp", None), a=P(None, "model"))
    placed = shard(tree, mesh, layout)
    assert placed["a"].sharding.spec == P(None, "model")
    assert placed["b"].sharding.spec == P("fsdp", None)


def test_shard_refuses_what_does_not_divide_or_match(mesh):
    with pytest.raises(ValueError, match=r"w/0: dim 1 of shape \(4, 3\) has size 3.*'model'"):
        shard({"w": [np.ones((4, 3))]}, mesh, P("fsdp", "model"))
    with pytest.raises(ValueError, match=r"w: .* has 2 entries, the array of shape"):
        shard({"w": np.ones(4)}, mesh, P("fsdp", "model"))
    with pytest.raises(ValueError, match="only in the tree: v"):
        shard({"w": np.ones(4), "v": np.ones(4)}, mesh, {"w": P()})
    explicit = jax.sharding.Mesh(
        jax.devices(), ("data",), axis_types=(jax.sharding.AxisType.Explicit,)
    )
    with pytest.raises(ValueError, match="Auto axes"):
        shard(np.ones(8), explicit, P("data"))


def test_pad_appends_zeros_and_unpad_takes_them_off(mesh, caplog):
    tree = {"table": np.arange(21.0).reshape(7, 3)}
    placed = shard(tree, mesh, {"table": P(("fsdp", "model"), None)}, on_indivisible="pad")
    assert placed["table"].shape == (8, 3)
    assert "padded from 7 to 8" in caplog.text
    np.testing.assert_array_equal(np.asarray(placed["table"])[7], 0.0)
    np.testing.assert_array_equal(unpad(placed, tree)["table"], tree["table"])
    whole = shard(tree, mesh, {"table": P(("fsdp", "model"))}, on_indivisible="replicate")
    assert whole["table"].shape == (7, 3)
    assert whole["table"].sharding.is_fully_replicated


# --- init ------------------------------------------------------------------------------------


def test_init_nnx(mesh):
    model = init(lambda: Stack(nnx.Rngs(0)), mesh, RULES)
    assert isinstance(model, Stack)
    assert model.blocks.up.kernel.get_value().shape == (3, 8, 16)
    check(model, specs(model, mesh, RULES), mesh)
    assert model.blocks.down.kernel.get_value().sharding.spec == P(None, "model", "fsdp")


def test_init_linen_keeps_boxes(mesh):
    variables = init(
        lambda key: LinenMlp().init(key, jnp.ones((1, 8))), mesh, RULES, jax.random.key(0)
    )
    kernel = variables["params"]["Dense_0"]["kernel"]
    assert isinstance(kernel, nn.LogicallyPartitioned)
    assert kernel.value.sharding.spec == P("fsdp", "model")
    unboxed = nn.meta.unbox(variables)
    assert LinenMlp().apply(unboxed, jnp.ones((1, 8))).shape == (1, 16)


def test_init_bare_pytree_and_function_of_the_shapes(mesh):
    def make():
        return {"w": jax.random.normal(jax.random.key(0), (8, 8)), "step": 0}

    made = init(make, mesh, infer_fsdp(16))
    assert made["w"].sharding.spec == P("fsdp", None)
    assert made["step"].sharding.spec == P()
    again = init(make, mesh, lambda tree: {"w": P(None, "data"), "step": P()})
    assert again["w"].sharding.spec == P(None, "data")
    with pytest.raises(ValueError, match=r"w: dim 0 .* axis 'fsdp'"):
        init(lambda: {"w": jnp.ones((3, 4))}, mesh, lambda tree: {"w": P("fsdp")})


def test_init_pads(mesh):
    rules = RULES.for_paths({"table": ("mlp", None)})
    made = init(lambda: {"table": jnp.ones((7, 2))}, mesh, rules, on_indivisible="pad")
    assert made["table"].shape == (8, 2)
    assert made["table"].sharding.spec == P("model", None)
    np.testing.assert_array_equal(np.asarray(made["table"])[7], 0.0)
    with pytest.raises(ValueError, match="table: dim 0 of shape"):
        init(lambda: {"table": jnp.ones((7, 2))}, mesh, rules)


@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 1),
        (1, 4, 2),
        *(pytest.param(s, marks=pytest.mark.slow) for s in [(2, 2, 1), (8, 1, 1)]),
    ],
)
def test_one_seed_one_model_on_every_mesh(shape):
    devices = jax.devices()[: math.prod(shape)]
    mesh = make_mesh(dict(zip(("data", "fsdp", "model"), shape, strict=True)), devices=devices)
    with nnx.use_eager_sharding(False):
        want = values(nnx.state(Stack(nnx.Rngs(3))))
    got = values(nnx.state(init(lambda: Stack(nnx.Rngs(3)), mesh, RULES)))
    assert got.keys() == want.keys()
    for path in want:
        # Random bits are equal; fused float arithmetic on them may differ in the last place.
        np.testing.assert_allclose(got[path], want[path], rtol=1e-6, err_msg=path)


def test_a_new_seed_as_an_argument_makes_another_model(mesh):
    def make(key):
        return nnx.Linear(8, 8, rngs=nnx.Rngs(key), kernel_metadata={"out_sharding": (None, "mlp")})

    first, again, other = (init(make, mesh, RULES, jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.kernel.get_value(), again.kernel.get_value())
    assert not np.array_equal(first.kernel.get_value(), other.kernel.get_value())


def largest_array(hlo):
    """Elements of the largest array that the program makes on one device."""
    shapes = re.findall(r"\b[a-z]+\d*\[([\d,]+)\]", hlo)
    return max(math.prod(map(int, dims.split(","))) for dims in shapes)


def test_no_array_of_init_is_larger_than_its_shard():
    width = 256
    mesh = make_mesh({"fsdp": 4, "model": 2})
    lowered = lower_init(lambda: Stack(nnx.Rngs(0), width), mesh, RULES)
    compiled = lowered.compile()
    whole = 3 * 2 * width * width  # one stacked kernel
    assert largest_array(compiled.as_text()) <= whole // 8
    memory = compiled.memory_analysis()
    per_device = 4 * (2 * whole // 8 + 3 * 3 * width)  # kernels in eighths, biases whole
    assert memory.output_size_in_bytes <= 1.05 * per_device
    # What XLA needs at its peak beside the result: random bits of one kernel's shard, and change.
    assert memory.temp_size_in_bytes <= 2 * per_device
    unsharded = jax.jit(lambda: nnx.state(Stack(nnx.Rngs(0), width)))
    with nnx.use_eager_sharding(False):
        alone = unsharded.lower().compile()
    assert largest_array(alone.as_text()) >= whole, "the measure must see a whole kernel"
