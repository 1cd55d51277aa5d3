"""The ends divided over the stages: numbers, layout, what is exchanged, what a step keeps."""

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jdml.aggregate import mean_gradients
from jdml.partition.pipeline import gpipe, interleaved, one_f_one_b, pipeline, zero_bubble
from jdml.sharding import collectives, shard
from jdml.train import Checkpointer, make_step
from tests.partition.pipeline.model import (
    block,
    close,
    first,
    last,
    make_batch,
    make_params,
    mesh_of,
)

SPECS = {
    "in": P(None, "model"),
    "out": P(),
    "shift": P(),
    "layers": {"up": P(None, None, "model"), "down": P(None, "model", None)},
}


def shifted(others, x, batch, key):
    """``last`` with a parameter of three elements, which no number of stages divides."""
    return last(others, x + jnp.sum(others["shift"]), batch, key)


def params_of(num_layers=4):
    return make_params(num_layers) | {"shift": jnp.array([0.1, 0.2, 0.3])}


def make(mesh, schedule, divided=True, block=block):
    pipe = pipeline(first, block, shifted, mesh, num_layers=4, micro_batches=4, schedule=schedule)
    return pipe.divide_ends(params_of(), specs_on(mesh)) if divided else pipe


def specs_on(mesh):
    if "model" in mesh.axis_names:
        return SPECS
    return jax.tree.map(lambda _: P(), SPECS, is_leaf=lambda x: isinstance(x, P))


@pytest.mark.parametrize(
    ("axes", "schedule"),
    [
        pytest.param({"stage": 4}, gpipe(), marks=pytest.mark.slow),
        pytest.param({"stage": 2}, interleaved(2), marks=pytest.mark.slow),
        ({"data": 2, "stage": 2, "model": 2}, zero_bubble()),
        pytest.param({"model": 2, "stage": 4}, one_f_one_b(), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_gradients_layout_and_exchanges(axes, schedule):
    mesh = mesh_of(**axes)
    num_stages, num_model = axes["stage"], axes.get("model", 1)
    pipe = make(mesh, schedule)
    params, batch, key = params_of(), make_batch(), jax.random.key(3)
    specs = pipe.specs(specs_on(mesh))
    assert (specs["in"][0], specs["out"], specs["shift"]) == ("stage", P("stage", None), P())
    arranged = shard(pipe.arrange(params), mesh, specs)
    placed = jax.device_put(batch, NamedSharding(mesh, P("data" if "data" in axes else None)))
    shardings = jax.tree.map(lambda x: x.sharding, arranged)
    program = jax.jit(jax.value_and_grad(pipe, has_aux=True), out_shardings=(None, shardings))
    compiled = program.lower(arranged, placed, key).compile()
    got, gradients = compiled(arranged, placed, key)
    want, reference = jax.jit(jax.value_and_grad(pipe.reference, has_aux=True))(params, batch, key)
    close(got, want)
    close(pipe.restore(gradients), reference)

    held = [gradients[name].addressable_shards[0].data.nbytes for name in ("in", "out", "shift")]
    assert held == [4 * 64 // num_stages // num_model, 4 * 24 // num_stages, 12]
    over_stages = [c for c in collectives(compiled, mesh) if "stage" in c.axes]
    assert all(c.axes == ("stage",) for c in over_stages)
    # Where ``model`` stands before ``stage``, the partitioner puts the leaf together over it first.
    parts = num_model if list(axes)[-1] == "model" else 1
    whole = sorted([4 * 64 // parts, 4 * 24])
    bytes_of = {
        kind: sorted(b for c in over_stages if c.kind == kind for b in c.operand_bytes)
        for kind in ("all-gather", "reduce-scatter", "all-reduce")
    }
    assert bytes_of["all-gather"] == [b // num_stages for b in whole]
    assert bytes_of["reduce-scatter"] == whole
    assert bytes_of["all-reduce"] == [4, 4, 12]  # loss, metric, the leaf that stays whole
    once = [c for c in over_stages if c.kind != "collective-permute"]
    assert not any(c.loops or c.conditional for c in once)


def test_evaluation_gathers_too():
    pipe = make(mesh_of(stage=4), one_f_one_b())
    params, batch = params_of(), make_batch()
    got = jax.jit(pipe)(pipe.arrange(params), batch)
    close(got, jax.jit(pipe.reference)(params, batch))


def test_a_training_step_keeps_slices(tmp_path):
    """And starts from a checkpoint of a run that kept these parameters whole."""
    mesh = mesh_of(data=2, stage=2, model=2)
    params, batch = params_of(), make_batch()
    tx = optax.chain(mean_gradients("data"), optax.sgd(0.1, momentum=0.9))

    def without_dropout(params, x, batch, key):
        return block(params, x, batch, None)

    def start(divided):
        pipe = make(mesh, zero_bubble(), divided, without_dropout)
        init, step = make_step(pipe, tx, mesh, specs=pipe.specs(SPECS))
        return pipe, init, step

    pipe, init, step = start(divided=True)
    whole, whole_init, _ = start(divided=False)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(0, whole_init(whole.arrange(params)))
    with Checkpointer(tmp_path) as checkpointer:
        state = checkpointer.restore(init.abstract(pipe.arrange(params))).state
    state, metrics = step(state, batch)
    for tree in (state.params, state.opt_state[1][0].trace):
        assert tree["in"].sharding.shard_shape(tree["in"].shape) == (4, 4)
        assert tree["out"].sharding.shard_shape(tree["out"].shape) == (4, 3)
    reference = jax.jit(jax.value_and_grad(pipe.reference, has_aux=True))
    (loss, more), gradients = reference(params, batch)
    close({"loss": loss, **more}, metrics)
    close(pipe.restore(state.params), jax.tree.map(lambda p, g: p - 0.1 * g, params, gradients))


@pytest.mark.slow
def test_narrow_parameters():
    """Beside an automatic axis, where a sum in bfloat16 would end the process on CPU."""
    params = params_of()
    narrow = params | {"in": params["in"].astype(jnp.bfloat16)}
    mesh = mesh_of(stage=2, model=2)
    pipe = pipeline(
        lambda others, batch, key: jnp.tanh(batch["x"] @ others["in"].astype(jnp.float32)),
        block,
        lambda others, x, batch, key: (jnp.mean((x @ others["out"] - batch["y"]) ** 2), {}),
        mesh,
        num_layers=4,
        micro_batches=2,
    ).divide_ends(narrow, SPECS)
    arranged = shard(pipe.arrange(narrow), mesh, pipe.specs(SPECS))
    gradients, _ = jax.jit(jax.grad(pipe, has_aux=True))(arranged, make_batch())
    assert gradients["in"].dtype == jnp.bfloat16
    assert gradients["in"].sharding.spec == P("stage", "model")


def test_leaves_that_stay_whole():
    mesh = mesh_of(stage=2, model=2)
    pipe = make(mesh, None)
    assert pipe.ends == {"in": P("stage", "model"), "out": P("stage", None)}
    full = SPECS | {"in": P("model", None), "out": P("model", None)}
    assert pipe.divide_ends(params_of(), full).ends == {"in": P("model", "stage")}
    with pytest.raises(ValueError, match=r"leaf 'in' has spec .*'model', None.*same specs"):
        pipe.specs(full)
    shapes = jax.eval_shape(pipe.arrange, params_of())
    assert pipe.divide_ends(shapes, SPECS).ends == pipe.ends
    assert not make(mesh_of(stage=1), one_f_one_b()).ends
    with pytest.raises(ValueError, match="Only in specs: other"):
        pipe.divide_ends(params_of(), SPECS | {"other": P()})
    arranged = pipe.arrange(params_of())
    with pytest.raises(ValueError, match=r"leaf 'out' has shape \(7, 3\).*2 stages divide"):
        pipe(arranged | {"out": jnp.ones((7, 3))}, make_batch())
