"""Every state leaf of every Optax optimiser lies like its parameter."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from jdml.sharding import (
    check_compiled,
    gradient_specs,
    init,
    make_mesh,
    optimizer_specs,
    shard,
    shardings,
    zero_specs,
)
from jdml.sharding.paths import leaves_with_paths

PARAMS = {
    "layers": {"kernel": jax.ShapeDtypeStruct((2, 4, 8), jnp.float32)},
    "head": {
        "kernel": jax.ShapeDtypeStruct((8, 16), jnp.float32),
        "bias": jax.ShapeDtypeStruct((16,), jnp.float32),
    },
}
SPECS = {
    "layers": {"kernel": P(None, "fsdp", "model")},
    "head": {"kernel": P("fsdp", "model"), "bias": P("model")},
}


def with_labels(params):
    return jax.tree.map(lambda p: "matrix" if p.ndim > 1 else "rest", params)


SAME_SHAPE = {
    "adamw": optax.adamw(1e-3),
    "adam with schedule": optax.adam(optax.cosine_decay_schedule(1e-3, 10)),
    "momentum": optax.sgd(0.1, momentum=0.9, nesterov=True),
    "lion": optax.lion(1e-4),
    "ema": optax.chain(optax.sgd(0.1), optax.ema(0.9)),
    "clipped": optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)),
    "accumulated": optax.MultiSteps(optax.adam(1e-3), 4),
    "injected": optax.inject_hyperparams(optax.adam)(learning_rate=1e-3),
    "masked": optax.masked(optax.adam(1e-3), lambda p: jax.tree.map(lambda x: x.ndim > 1, p)),
    "multi_transform": optax.multi_transform(
        {"matrix": optax.adam(1e-3), "rest": optax.sgd(0.1, 0.9)}, with_labels
    ),
    "muon": optax.contrib.muon(1e-3),
    "unfactored adafactor": optax.adafactor(1e-3, factored=False, momentum=0.9),
    "schedule free": optax.contrib.schedule_free_adamw(1e-3),
    "finite only": optax.apply_if_finite(optax.adam(1e-3), 3),
}


@pytest.mark.parametrize("name", SAME_SHAPE)
def test_state_of_a_parameters_shape_has_its_spec(name):
    opt_state = jax.eval_shape(SAME_SHAPE[name].init, PARAMS)
    found = optimizer_specs(opt_state, PARAMS, SPECS)
    assert jax.tree.structure(found) == jax.tree.structure(opt_state)
    by_shape = {
        leaf.shape: spec
        for leaf, spec in zip(jax.tree.leaves(PARAMS), jax.tree.leaves(SPECS), strict=True)
    }
    seen = set()
    for (path, leaf), spec in zip(
        leaves_with_paths(opt_state), jax.tree.leaves(found), strict=True
    ):
        # The three parameters differ in shape, so that the shape says which one is meant.
        assert spec == by_shape.get(leaf.shape, P()), path
        seen.add(leaf.shape)
    assert (2, 4, 8) in seen


def test_factored_moments_lose_the_entry_of_the_dim_that_is_gone():
    opt_state = jax.eval_shape(optax.adafactor(1e-3, min_dim_size_to_factor=4).init, PARAMS)
    found = dict(leaves_with_paths(optimizer_specs(opt_state, PARAMS, SPECS)))
    assert found["0/v_row/head/kernel"] == P("fsdp")
    assert found["0/v_col/head/kernel"] == P("model")
    assert found["0/v_row/layers/kernel"] == P(None, "fsdp")
    assert found["0/v_col/layers/kernel"] == P(None, "model")
    assert found["0/v/head/bias"] == P("model")
    assert found["0/v/head/kernel"] == P()


@pytest.mark.parametrize(
    ("shape", "spec"), [(P("fsdp", "model"), P()), (P(None, None), P(None)), (P("fsdp"), P())]
)
def test_a_square_matrix_leaves_two_candidates(shape, spec):
    params = {"w": jnp.zeros((8, 8))}
    opt_state = optax.adafactor(1e-3, min_dim_size_to_factor=4).init(params)
    found = dict(leaves_with_paths(optimizer_specs(opt_state, params, {"w": shape})))
    assert found["0/v_row/w"] == spec


def test_history_of_several_steps():
    opt_state = jax.eval_shape(optax.scale_by_lbfgs(memory_size=3).init, PARAMS)
    found = dict(leaves_with_paths(optimizer_specs(opt_state, PARAMS, SPECS)))
    assert found["diff_params_memory/head/kernel"] == P(None, "fsdp", "model")


@pytest.mark.parametrize(
    ("shape", "spec", "expected"),
    [
        ((1, 16), P(None, "fsdp"), P(None, "fsdp")),
        ((4, 4), P(None, "fsdp"), P(None, "fsdp")),
        ((1, 16), P("fsdp"), P()),  # fsdp=2 does not divide it
        ((4, 8), P("fsdp"), P()),  # no part for data=4: a low-rank factor, say
        ((1, 4), P(None, "fsdp"), P()),  # not one dim alone
        ((4, 6), P("fsdp"), P()),  # no whole part of 16
    ],
)
def test_a_slice_lies_like_its_parameter_where_the_mesh_divides_it(shape, spec, expected):
    mesh = make_mesh({"data": 4, "fsdp": 2})
    params, moments = {"w": jnp.zeros((4, 16))}, {"w": jnp.zeros(shape)}
    assert optimizer_specs({"mu": moments}, params, {"w": spec}, mesh=mesh)["mu"]["w"] == expected
    assert optimizer_specs({"mu": moments}, params, {"w": spec})["mu"]["w"] == P()


def test_longest_suffix_names_the_parameter():
    params = {"mu": {"kernel": jnp.zeros((4, 8))}, "kernel": jnp.zeros((4, 8))}
    found = optimizer_specs(
        optax.trace(0.9).init(params), params, {"mu": {"kernel": P("model")}, "kernel": P("data")}
    )
    assert found.trace == {"mu": {"kernel": P("model")}, "kernel": P("data")}


def test_one_array_nnx_state_and_prefix_specs():
    found = optimizer_specs(optax.adam(1e-3).init(jnp.zeros((4,))), jnp.zeros((4,)), P("data"))
    assert found[0].mu == P("data")
    assert found[0].count == P()
    model = nnx.Linear(4, 8, rngs=nnx.Rngs(0))
    params = nnx.state(model)
    opt_state = optax.adam(1e-3).init(params)
    found = optimizer_specs(opt_state, model, P())
    assert jax.tree.structure(found) == jax.tree.structure(opt_state)
    with pytest.raises(
        ValueError, match="Only in specs: head/bias, head/kernel; only in the tree: kernel"
    ):
        optimizer_specs(opt_state, model, {"head": SPECS["head"], "bias": P()})


# --- ZeRO ------------------------------------------------------------------------------------


def test_zero_specs_take_the_largest_part_that_divides(caplog):
    mesh = make_mesh({"data": 4, "model": 2})
    params = {
        "a": jnp.zeros((2, 16)),
        "wide": jnp.zeros((4, 16)),
        "b": jnp.zeros((6, 8)),
        "odd": jnp.zeros((3, 5)),
        "scalar": jnp.zeros(()),
        "done": jnp.zeros((4, 64)),
    }
    specs = {
        "a": P(None, "model"),
        "wide": P(None, "model"),
        "b": P("model", None),
        "odd": P(),
        "scalar": P(),
        "done": P("data"),
    }
    assert zero_specs(params, specs, mesh) == {
        "a": P(None, ("model", "data")),
        "wide": P("data", "model"),
        "b": P("model", "data"),
        "odd": P(),
        "scalar": P(),
        "done": P("data"),
    }
    assert "odd: dim 1 of size 5 left whole" in caplog.text
    with pytest.raises(ValueError, match=r"odd: dim 1 .*'data'"):
        zero_specs(params, specs, mesh, on_indivisible="error")
    with pytest.raises(ValueError, match="expected mesh= to have it, got None"):
        optimizer_specs(optax.adam(1e-3).init(params), params, specs, zero=1)
    with pytest.raises(ValueError, match="FSDP preset"):
        gradient_specs(params, specs, zero=3)


def loss_fn(params, batch):
    hidden = jnp.tanh(batch @ params["up"])
    return jnp.mean((hidden @ params["down"] - 1.0) ** 2)


@pytest.mark.parametrize("zero", [0, 1, 2])
def test_zero_trains_the_same_and_lies_as_asked(zero):
    mesh = make_mesh({"data": 8})
    params = {
        "up": jax.random.normal(jax.random.key(0), (8, 32)),
        "down": jax.random.normal(jax.random.key(1), (32, 8)),
    }
    batch = jax.random.normal(jax.random.key(2), (16, 8))
    tx = optax.adam(1e-2)
    specs = jax.tree.map(lambda _: P(), params)
    grad_specs = gradient_specs(params, specs, zero=zero, mesh=mesh)

    def state_specs(state):
        return optimizer_specs(state, params, specs, zero=zero, mesh=mesh)

    opt_state = init(lambda: tx.init(params), mesh, state_specs)
    opt_specs = state_specs(opt_state)

    def step(params, opt_state, batch):
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        grads = jax.lax.with_sharding_constraint(grads, shardings(grad_specs, mesh))
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    out = shardings((specs, opt_specs, P()), mesh)
    args = list(shard((params, opt_state, batch), mesh, (specs, opt_specs, P("data"))))
    compiled = jax.jit(step, out_shardings=out).lower(*args).compile()
    check_compiled(compiled, mesh, (specs, opt_specs, P("data")), (specs, opt_specs, P()))
    moment = P("data", None) if zero else P()
    assert opt_specs[0].mu["down"] == moment
    assert grad_specs["down"] == (P("data", None) if zero == 2 else P())
    shard_rows = {s.data.shape[0] for s in opt_state[0].mu["down"].addressable_shards}
    assert shard_rows == ({4} if zero else {32})

    reference, reference_state = params, tx.init(params)
    for _ in range(3):
        *args[:2], loss = compiled(*args[:2], args[2])
        value, grads = jax.value_and_grad(loss_fn)(reference, batch)
        updates, reference_state = tx.update(grads, reference_state, reference)
        reference = optax.apply_updates(reference, updates)
        # One reduction order against another: a few units in the last place of f32.
        np.testing.assert_allclose(loss, value, rtol=1e-5)
