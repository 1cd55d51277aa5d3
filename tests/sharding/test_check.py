"""Asked = obtained, or an error that names leaf, dim and axis; and what the tables say."""

import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from jdml.sharding import (
    Rules,
    assert_matches_snapshot,
    check,
    check_compiled,
    describe,
    infer_fsdp,
    make_mesh,
    optimizer_specs,
    shard,
    shardings,
    show,
    specs,
)


@pytest.fixture(scope="module")
def mesh():
    return make_mesh({"data": 2, "fsdp": 2, "model": 2})


@pytest.fixture(scope="module")
def placed(mesh):
    tree = {"layers": [{"kernel": np.ones((4, 8), np.float32)}], "bias": np.ones(8, np.float32)}
    specs = {"layers": [{"kernel": P("fsdp", "model")}], "bias": P()}
    return shard(tree, mesh, specs), specs


# --- check -----------------------------------------------------------------------------------


def test_right_layouts_pass(mesh, placed):
    tree, specs = placed
    check(tree, specs, mesh)
    check(tree, {"layers": [{"kernel": P("fsdp", ("model",))}], "bias": P(None)}, mesh)
    check(tree, {"layers": None, "bias": P()}, mesh)
    one = make_mesh({"data": 1}, devices=jax.devices()[:1])
    check({"a": jnp.ones(4)}, P("data"), one)


def test_wrong_layouts_are_named(mesh, placed):
    tree, _ = placed
    with pytest.raises(ValueError, match=r"shard\(tree, mesh, specs\)") as caught:
        check(tree, {"layers": P("fsdp", ("model", "data")), "bias": P("model")}, mesh)
    message = str(caught.value)
    assert "2 of 2 arrays" in message
    assert (
        "layers/0/kernel: dim 1 of shape (4, 8): asked over axis 'model' × 'data' in 4 parts, "
        "obtained 2 parts; asked P('fsdp', ('model', 'data')), obtained P('fsdp', 'model')"
    ) in message
    assert (
        "bias: dim 0 of shape (8,): asked over axis 'model' in 2 parts, obtained whole" in message
    )


def test_same_parts_on_other_devices(mesh, placed):
    tree, _ = placed
    with pytest.raises(ValueError, match=r"layers/0/kernel: .*same parts, on other devices"):
        check({"layers": tree["layers"]}, P("fsdp", "data"), mesh)


def test_elsewhere_nowhere_indivisible_and_another_structure(mesh):
    with pytest.raises(ValueError, match=r"a: asked .* on the host"):
        check({"a": np.ones(8)}, P("data"), mesh)
    with pytest.raises(ValueError, match=r"a: shape .* on 8 devices, obtained one device"):
        check({"a": jnp.ones(8)}, P(), mesh)
    with pytest.raises(ValueError, match=r"a: dim 0 .*size 7"):
        check({"a": jnp.ones(7)}, P("data"), mesh)
    with pytest.raises(ValueError, match="only in the tree: b"):
        check({"b": jnp.ones(7)}, {"a": P()}, mesh)
    many = {str(i): jnp.ones(8) for i in range(20)}
    with pytest.raises(ValueError, match=r"20 of 20(.|\n)*and 12 more"):
        check(many, P("data"), mesh)


def test_module_and_jit_that_was_told_nothing(mesh):
    model = nnx.Linear(8, 8, rngs=nnx.Rngs(0))
    state = shard(nnx.state(model), mesh, {"kernel": P("data", None), "bias": P()})
    tx = optax.adam(1e-3)
    specs = {"kernel": P("data", None), "bias": P()}
    asked = optimizer_specs(jax.eval_shape(tx.init, state), state, specs)
    with pytest.raises(ValueError, match="mu/kernel: "):
        check(jax.jit(tx.init)(state), asked, mesh)
    check(jax.jit(tx.init, out_shardings=shardings(asked, mesh))(state), asked, mesh)
    with pytest.raises(ValueError, match="2 of 2 arrays"):
        check(model, P(), mesh)


def test_two_thousand_leaves_take_under_half_a_second(mesh):
    kernel = nn.LogicallyPartitioned(np.zeros((4, 4), np.float32), ("embed", "mlp"))
    tree = {f"layer_{i}": {f"kernel_{j}": kernel for j in range(8)} for i in range(250)}
    rules = Rules(embed="fsdp", mlp="model")
    placed = shard(tree, mesh, specs(tree, mesh, rules))

    def ask():
        start = time.perf_counter()
        check(placed, specs(placed, mesh, rules), mesh)
        return time.perf_counter() - start

    assert min(ask() for _ in range(3)) < 0.5


# --- a compiled step -------------------------------------------------------------------------


def compiled_step(mesh, out_specs):
    def step(params, batch, unused):
        loss, grads = jax.value_and_grad(lambda p: jnp.mean((batch @ p["w"]) ** 2))(params)
        return jax.tree.map(lambda p, g: p - g, params, grads), loss

    args = shard(
        ({"w": np.ones((8, 8), np.float32)}, np.ones((4, 8), np.float32), np.ones(8)),
        mesh,
        ({"w": P("fsdp", "model")}, P("data"), P("data")),
    )
    out = None if out_specs is None else shardings(out_specs, mesh)
    return jax.jit(step, out_shardings=out).lower(*args).compile()


def test_compiled_step_as_asked(mesh):
    out = ({"w": P("fsdp", "model")}, P())
    compiled = compiled_step(mesh, out)
    check_compiled(compiled, mesh, ({"w": P("fsdp", "model")}, P("data"), P("data")), out)
    check_compiled(compiled, mesh, inputs=(None, P("data", None), None))


def test_compiled_step_not_as_asked(mesh):
    compiled = compiled_step(mesh, ({"w": P("fsdp", None)}, P()))
    with pytest.raises(
        ValueError, match=r"outputs/0/w: dim 1 .*'model' in 2 parts, obtained whole"
    ):
        check_compiled(compiled, mesh, outputs=({"w": P("fsdp", "model")}, P()))
    with pytest.raises(ValueError, match=r"inputs/1: dim 1 of shape \(4, 8\): (.|\n)*in_shardings"):
        check_compiled(compiled, mesh, inputs=(P("fsdp", "model"), P("data", "model"), None))
    with pytest.raises(ValueError, match="inputs must have the structure"):
        check_compiled(compiled, mesh, inputs=(P(), P()))


# --- describe --------------------------------------------------------------------------------


def test_describe_counts_bytes_and_copies(placed):
    table = describe(placed[0], flag_bytes=32)
    bias, kernel = table.rows
    assert (bias.path, bias.bytes_per_device, bias.copies, bias.replicated) == ("bias", 32, 8, True)
    assert kernel.shape == (4, 8)
    assert kernel.spec == "P('fsdp', 'model')"
    assert (kernel.bytes_per_device, kernel.copies, kernel.replicated) == (32, 2, False)
    assert (table.num_bytes, table.bytes_per_device, table.replicated_bytes) == (160, 64, 32)
    text = str(table)
    assert "replicated !" in text
    assert "layers/0/kernel" in text
    assert "2 leaves, 160 B; 64 B per device on 8 devices, of which 32 B (50%) replicated" in text
    assert "replicated !" not in str(describe(placed[0]))


def test_describe_before_anything_is_placed(mesh):
    tree = {"w": jax.ShapeDtypeStruct((8, 8), jnp.bfloat16), "key": jax.random.key(0)}
    table = describe(tree, mesh, infer_fsdp(16))
    assert {row.path: row.bytes_per_device for row in table.rows} == {"key": 8, "w": 64}
    by_specs = describe(tree, mesh, {"w": P(("data", "model"), "fsdp"), "key": P()})
    assert by_specs.rows[1].bytes_per_device == 16
    assert by_specs.rows[1].copies == 1
    with pytest.raises(ValueError, match="together"):
        describe(tree, mesh)


def test_describe_says_what_does_not_divide(mesh):
    tree = {"odd": jax.ShapeDtypeStruct((7, 9), jnp.float32)}
    text = str(describe(tree, mesh, infer_fsdp(8), on_indivisible="replicate"))
    assert "note: odd: dim 1 of size 9 left whole (fsdp = 2 not a divisor)" in text
    padded = describe(tree, mesh, infer_fsdp(8), on_indivisible="pad")
    assert padded.rows[0].shape == (7, 10)
    assert padded.rows[0].bytes_per_device == 7 * 5 * 4


def test_describe_host_and_single_device_arrays():
    table = describe({"host": np.ones(3), "scalar": 1.0, "one": jnp.ones(3)})
    assert [row.spec for row in table.rows][::2] == ["host", "host"]
    assert table.rows[1].spec.startswith("one device")
    assert not any(row.replicated for row in table.rows)
    assert "0 leaves, 0 B" in str(describe({}))


# --- show ------------------------------------------------------------------------------------


def cells(text):
    rows = [line for line in text.splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in row.strip("│").split("│")] for row in rows]


def test_show_puts_devices_where_their_parts_are(mesh, tmp_path):
    x = shard(np.zeros((4, 8)), mesh, P("fsdp", "model"))
    assert cells(show(x)) == [["0,4", "1,5"], ["2,6", "3,7"]]
    assert cells(show(shard(np.zeros((4, 8)), mesh, P()))) == [["0-7"]]
    assert cells(show(shard(np.zeros(8), mesh, P(("data", "fsdp"))))) == [
        ["0,1", "2,3", "4,5", "6,7"]
    ]
    assert cells(show(jnp.zeros(()))) == [["0"]]
    cube = shard(np.zeros((2, 3, 2, 2)), mesh, P("data", None, "fsdp", "model"))
    text = show(cube)
    assert cells(text) == [["0", "2"], ["4", "6"]]
    assert "dim 3 at part 1 of 2" in text
    assert cells(show(cube, dims=(2, 3))) == [["0", "1"], ["2", "3"]]
    abstract = jax.ShapeDtypeStruct((4, 8), np.float32)
    assert cells(show(abstract, x.sharding)) == cells(show(x))
    show(x, file=tmp_path / "layout.png")
    assert (tmp_path / "layout.png").read_bytes().startswith(b"\x89PNG")


def test_show_refuses(mesh, tmp_path):
    with pytest.raises(ValueError, match="on no device"):
        show(np.zeros(3))
    with pytest.raises(ValueError, match="dims"):
        show(jnp.zeros((3, 3)), dims=(0, 2))
    with pytest.raises(ValueError, match=r"end in \.png"):
        show(jnp.zeros((3, 3)), file=tmp_path / "layout.txt")


# --- snapshots -------------------------------------------------------------------------------


def test_snapshot(placed, mesh, tmp_path, monkeypatch):
    tree, specs = placed
    file = tmp_path / "new" / "layout.txt"
    assert_matches_snapshot(specs, file)
    assert file.read_text() == "bias: P()\nlayers/0/kernel: P('fsdp', 'model')\n"
    for same in (specs, tree, shardings(specs, mesh), specs | {"bias": P(None)}):
        assert_matches_snapshot(same, file)
    changed = specs | {"bias": P("model")}
    with pytest.raises(
        AssertionError, match=r"JDML_UPDATE_SNAPSHOTS=1(.|\n)*-bias: P\(\)\n\+bias: P\('model'\)"
    ):
        assert_matches_snapshot(changed, file)
    assert_matches_snapshot(specs, file)
    monkeypatch.setenv("JDML_UPDATE_SNAPSHOTS", "1")
    assert_matches_snapshot(changed, file)
    monkeypatch.delenv("JDML_UPDATE_SNAPSHOTS")
    with pytest.raises(AssertionError):
        assert_matches_snapshot(specs, file)
    assert_matches_snapshot(specs, file, update=True)
