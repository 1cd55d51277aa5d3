"""One engine, one answer: NNX, Linen, train states and bare pytrees."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import PartitionSpec as P

from jdml.sharding import Rules, describe, infer_fsdp, make_mesh, specs
from jdml.sharding.paths import leaves_with_paths

RULES = Rules(batch="data", embed="fsdp", mlp="model", layers=None)


@pytest.fixture(scope="module")
def mesh():
    return make_mesh({"data": 2, "fsdp": 2, "model": 2})


def by_path(tree):
    return dict(leaves_with_paths(tree))


def leaf(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


class Block(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(4, 8, rngs=rngs, kernel_metadata={"out_sharding": ("embed", "mlp")})
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.drop = nnx.Dropout(0.1, rngs=rngs)


def stacked(metadata):
    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=0, out_axes=0, transform_metadata=metadata)
    def make(rngs):
        return Block(rngs)

    return lambda: make(nnx.Rngs(0))


def abstract(make):
    with nnx.use_eager_sharding(False):
        return nnx.eval_shape(make)


class LinenBlock(nn.Module):
    box: str = "logical"

    @nn.compact
    def __call__(self, x):
        wrap = {"logical": nn.with_logical_partitioning, "mesh": nn.with_partitioning}[self.box]
        names = ("embed", "mlp") if self.box == "logical" else ("fsdp", "model")
        return nn.Dense(8, kernel_init=wrap(nn.initializers.lecun_normal(), names))(x)


def linen_variables(module, boxed=True):
    variables = jax.eval_shape(module.init, jax.random.key(0), jnp.ones((2, 4)))
    return variables if boxed else nn.meta.unbox(variables)


# --- where names come from -------------------------------------------------------------------


def test_nnx_module(mesh):
    model = abstract(lambda: Block(nnx.Rngs(0)))
    found = specs(model, mesh, RULES)
    assert jax.tree.structure(found) == jax.tree.structure(nnx.state(model))
    flat = by_path(found)
    assert flat["up/kernel"] == P("fsdp", "model")
    assert flat["up/bias"] == flat["norm/mean"] == flat["drop/rngs/key"] == P()
    assert (
        by_path(specs(nnx.state(model, nnx.Param), mesh, RULES))["up/kernel"] == flat["up/kernel"]
    )


@pytest.mark.parametrize(
    "metadata", [{nnx.PARTITION_NAME: "layers"}, {nnx.PARTITION_NAME: None}, {}]
)
def test_nnx_stacked_layers(mesh, metadata):
    flat = by_path(specs(abstract(stacked(metadata)), mesh, RULES))
    assert flat["up/kernel"] == P(None, "fsdp", "model")
    assert flat["up/bias"] == P()


def test_nnx_stacked_dim_gets_its_axis(mesh):
    model = abstract(stacked({nnx.PARTITION_NAME: "stage"}))
    rules = RULES.replace(stage="data", on_indivisible="replicate", embed=None)
    assert specs(model, mesh, rules)["up"]["kernel"].get_value() == P(None, None, "model")
    four = {
        "kernel": nnx.Param(
            leaf(4, 4, 8), out_sharding=("stage", "embed", "mlp"), eager_sharding=False
        )
    }
    assert by_path(specs(four, mesh, rules)) == {"kernel": P("data", None, "model")}


def test_nnx_out_sharding_as_partition_spec_and_named_sharding(mesh):
    named = jax.sharding.NamedSharding(mesh, P("fsdp", ("data", "model")))
    state = nnx.State(
        {
            "a": nnx.Param(leaf(4, 8), out_sharding=P("embed", "mlp"), eager_sharding=False),
            "b": nnx.Param(leaf(4, 8), out_sharding=named, eager_sharding=False),
        }
    )
    assert by_path(specs(state, mesh, RULES)) == {
        "a": P("fsdp", "model"),
        "b": P("fsdp", ("data", "model")),
    }


def test_linen_boxed_and_unboxed(mesh):
    boxed = linen_variables(LinenBlock())
    found = specs(boxed, mesh, RULES)
    assert jax.tree.structure(found) == jax.tree.structure(boxed)
    assert by_path(found) == {
        "params/Dense_0/kernel": P("fsdp", "model"),
        "params/Dense_0/bias": P(),
    }
    unboxed = linen_variables(LinenBlock(), boxed=False)
    paths = RULES.for_paths({"kernel": ("embed", "mlp"), "bias": None})
    assert by_path(specs(unboxed, mesh, paths)) == by_path(found)


def test_linen_mesh_axes_by_name_and_scanned_layers(mesh):
    assert by_path(specs(linen_variables(LinenBlock("mesh")), mesh, Rules()))[
        "params/Dense_0/kernel"
    ] == P("fsdp", "model")

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            def body(block, carry, _):
                block(carry)
                return carry, None

            scan = nn.scan(
                body,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=2,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
            return scan(LinenBlock(name="block"), x, None)[0]

    flat = by_path(specs(linen_variables(Stack()), mesh, RULES))
    assert flat["params/block/Dense_0/kernel"] == P(None, "fsdp", "model")


def test_same_answer_for_nnx_linen_and_paths(mesh):
    nnx_kernel = by_path(specs(abstract(lambda: Block(nnx.Rngs(0))), mesh, RULES))["up/kernel"]
    linen = by_path(specs(linen_variables(LinenBlock()), mesh, RULES))["params/Dense_0/kernel"]
    bare = specs({"kernel": leaf(4, 8)}, mesh, RULES.for_paths({"kernel": ("embed", "mlp")}))
    assert nnx_kernel == linen == bare["kernel"]


def test_path_patterns_first_match_wins_and_names_of_the_leaf_go_before(mesh):
    rules = RULES.for_paths({"attention/.*kernel": ("mlp", "embed"), "kernel$": ("embed", "mlp")})
    rules = rules.for_paths({".*": None})
    tree = {
        "attention": {"out": {"kernel": leaf(8, 4), "bias": leaf(4)}},
        "mlp": [{"kernel": leaf(4, 8)}, {"kernel": leaf(3, 4, 8)}],
        "box": {"kernel": nn.LogicallyPartitioned(leaf(4, 8), ("batch", None))},
        "count": 0,
    }
    assert by_path(specs(tree, mesh, rules)) == {
        "attention/out/kernel": P("model", "fsdp"),
        "attention/out/bias": P(),
        "mlp/0/kernel": P("fsdp", "model"),
        "mlp/1/kernel": P(None, "fsdp", "model"),
        "box/kernel": P("data", None),
        "count": P(),
    }


def test_a_leaf_that_no_pattern_matches(mesh):
    rules = RULES.for_paths({"kernel": ("embed", "mlp")})
    with pytest.raises(ValueError, match=r"dense/bias: no path pattern.*'\.\*': None"):
        specs({"dense": {"kernel": leaf(4, 8), "bias": leaf(8)}}, mesh, rules)
    assert specs({"step": leaf(), "one": leaf(1)}, mesh, rules) == {"step": P(), "one": P()}


def test_random_keys_of_a_module_need_no_pattern(mesh):
    rules = RULES.for_paths({"up|norm": None})
    flat = by_path(specs(abstract(stacked({})), mesh, rules))
    assert flat["drop/rngs/key"] == flat["drop/rngs/count"] == P()


def test_specs_need_no_devices():
    kinds = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.sharding.AbstractMesh((64, 8), ("fsdp", "model"), axis_types=kinds)
    tree = {"kernel": nn.LogicallyPartitioned(leaf(512, 1024), ("embed", "mlp"))}
    assert by_path(specs(tree, mesh, RULES)) == {"kernel": P("fsdp", "model")}
    assert describe(tree, mesh, RULES).bytes_per_device == 512 * 1024 * 4 // 512


def test_infer_fsdp(mesh):
    tree = {"a": leaf(3, 6, 6), "b": leaf(100, 7), "small": leaf(2, 2), "s": leaf()}
    found = specs(tree, mesh, infer_fsdp(min_size=5))
    assert found == {"a": P(None, "fsdp", None), "b": P("fsdp", None), "small": P(), "s": P()}
    with pytest.raises(
        ValueError, match=r"odd: dim 0 .*size 15, which mesh axis 'fsdp' \(size 2\)"
    ):
        specs({"odd": leaf(15, 3)}, mesh, infer_fsdp(5))
    with pytest.raises(ValueError, match="axis 'shards', which the mesh"):
        specs({"odd": leaf(16, 3)}, mesh, infer_fsdp(5, "shards"))
    mixed = infer_fsdp(1).for_paths({"keep": None, "b": (None, "data")})
    assert specs({"keep": leaf(8), "b": leaf(4, 4), "c": leaf(8)}, mesh, mixed) == {
        "keep": P(),
        "b": P(None, "data"),
        "c": P("fsdp"),
    }


# --- train states ----------------------------------------------------------------------------


def test_linen_train_state(mesh):
    class State(TrainState):
        ema: dict
        batch_stats: dict

    for boxed in (True, False):
        params = linen_variables(LinenBlock(), boxed)["params"]
        rules = RULES if boxed else RULES.for_paths({"kernel": ("embed", "mlp"), ".*": None})

        def make(params=params):
            return State.create(
                apply_fn=LinenBlock().apply,
                params=params,
                tx=optax.adam(1e-3),
                ema=params,
                batch_stats={"mean": jnp.zeros(8)},
            )

        state = jax.eval_shape(make)
        found = specs(state, mesh, rules)
        assert jax.tree.structure(found) == jax.tree.structure(state)
        flat = by_path(found)
        assert flat["step"] == flat["batch_stats/mean"] == flat["opt_state/0/count"] == P()
        for path in ("params", "opt_state/0/mu", "opt_state/0/nu", "ema"):
            assert flat[f"{path}/Dense_0/kernel"] == P("fsdp", "model"), path
            assert flat[f"{path}/Dense_0/bias"] == P()


def test_dict_train_state(mesh):
    params = {"kernel": leaf(4, 8)}
    opt_state = jax.eval_shape(optax.sgd(0.1, 0.9).init, params)
    state = {"params": params, "opt_state": opt_state, "average": params}
    found = by_path(specs(state, mesh, RULES.for_paths({"^params/kernel": ("embed", "mlp")})))
    assert found == {
        "params/kernel": P("fsdp", "model"),
        "opt_state/0/trace/kernel": P("fsdp", "model"),
        "average/kernel": P("fsdp", "model"),
    }


def test_nnx_optimizer(mesh):
    for tx in (optax.adam(1e-3), optax.adafactor(1e-3, min_dim_size_to_factor=2)):
        with nnx.use_eager_sharding(False):
            optimizer = nnx.eval_shape(
                lambda tx=tx: nnx.Optimizer(Block(nnx.Rngs(0)), tx, wrt=nnx.Param)
            )
        flat = by_path(specs(optimizer, mesh, RULES))
        same_shape = [spec for path, spec in flat.items() if path.endswith("mu/up/kernel")]
        assert set(same_shape) <= {P("fsdp", "model")}
        factored = [spec for path, spec in flat.items() if path.endswith("v_row/up/kernel")]
        assert set(factored) <= {P()}
        assert same_shape or factored


# --- what does not fit -----------------------------------------------------------------------


def test_errors_name_the_leaf(mesh):
    def kernel(*names, shape=(4, 8)):
        return {"layers": [{"kernel": nn.LogicallyPartitioned(leaf(*shape), names)}]}

    for tree, message in [
        (kernel("embed", "mpl"), "layers/0/kernel: unknown logical name 'mpl'"),
        (kernel("embed", "embed"), "layers/0/kernel: mesh axis 'fsdp' is used twice"),
        (kernel("a", "b", "c"), "layers/0/kernel: 3 names"),
        (
            kernel("embed", "mlp", shape=(4, 7)),
            r"layers/0/kernel: dim 1 of shape \(4, 7\) has size 7, which mesh axis 'model' "
            r"\(size 2\) does not divide; make it 6 or 8; or leave this dim whole",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            specs(tree, mesh, RULES)
    with pytest.raises(
        ValueError, match=r"layers/0/kernel: dim 0 .* axis 'expert', which the mesh"
    ):
        specs(kernel("embed", None), mesh, Rules(embed="expert"))
    both = Rules(embed=("data", "fsdp", "model"))
    with pytest.raises(
        ValueError, match=r"'data' \(size 2\) × 'fsdp' \(size 2\) × 'model'.*make it 8;"
    ):
        specs(kernel("embed", None), mesh, both)


def test_size_one_axes_divide_everything():
    mesh = make_mesh({"data": 1, "fsdp": 1, "model": 1}, devices=jax.devices()[:1])
    tree = {"kernel": nn.LogicallyPartitioned(leaf(5, 7), ("embed", "mlp"))}
    assert by_path(specs(tree, mesh, RULES)) == {"kernel": P("fsdp", "model")}


def test_replicate_and_pad_are_logged_and_listed(mesh, caplog):
    tree = {"kernel": nn.LogicallyPartitioned(leaf(4, 7), ("embed", "mlp"))}
    found = specs(tree, mesh, RULES, on_indivisible="replicate")
    assert by_path(found) == {"kernel": P("fsdp", None)}
    assert "kernel: dim 1 of size 7 left whole (model = 2 not a divisor)" in caplog.text
    caplog.clear()
    padding = RULES.replace(on_indivisible="pad")
    assert by_path(specs(tree, mesh, padding)) == {"kernel": P("fsdp", "model")}
    assert "kernel: dim 1 padded from 7 to 8 (model = 2)" in caplog.text
    assert "note: kernel: dim 1 padded from 7 to 8" in str(describe(tree, mesh, padding))
    with pytest.raises(ValueError, match="on_indivisible must be one of"):
        specs(tree, mesh, RULES, on_indivisible="drop")
