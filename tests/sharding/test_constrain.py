"""Activations are pinned in NNX and Linen code, and under every transformation of JAX."""

import threading
import timeit

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from jdml.sharding import Rules, constrain, make_mesh, no_mesh, use_rules

RULES = Rules(batch="data", embed="fsdp", mlp="model", seq=None).for_activations(embed=None)


@pytest.fixture(scope="module")
def mesh():
    return make_mesh({"data": 2, "fsdp": 2, "model": 2})


def pin(x):
    return constrain(x * 2.0, "batch", "mlp")


def spec_of(function, *args):
    """The layout that XLA gives to a result when nothing else asks for one."""
    return jax.jit(function)(*args).sharding.spec


X = np.ones((4, 8), np.float32)


# --- the context -----------------------------------------------------------------------------


def test_outside_a_context_it_raises():
    with pytest.raises(ValueError, match=r"constrain\('batch', 'mlp'\): no rules.*no_mesh\(\)"):
        jax.jit(pin)(X)


def test_no_mesh_is_the_identity_but_counts_names(mesh):
    with no_mesh():
        np.testing.assert_array_equal(jax.jit(pin)(X), 2 * X)
        assert constrain(X, "batch", "whatever") is X
        with pytest.raises(ValueError, match=r"1 names for an array of shape \(4, 8\)"):
            constrain(X, "batch")
    with use_rules(mesh, RULES), no_mesh():
        assert constrain(X, "batch", "mlp") is X


def test_rules_and_their_entries_for_activations(mesh):
    with use_rules(mesh, RULES):
        assert spec_of(pin, X) == P("data", "model")
        assert spec_of(lambda x: constrain(x, "embed", "mlp"), X) == P(None, "model")
    with use_rules(mesh, RULES.for_activations(embed="fsdp")):
        assert spec_of(lambda x: constrain(x, "embed", "mlp"), X) == P("fsdp", "model")


def test_a_jitted_function_follows_the_rules_of_each_call(mesh):
    traced = []

    @jax.jit
    def jitted(x):
        traced.append(x)
        return pin(x)

    for axis in ("model", "fsdp", "model", None):
        with use_rules(mesh, RULES.replace(mlp=axis)):
            assert jitted(X).sharding.spec == (P("data", axis) if axis else P("data"))
    with pytest.raises(ValueError, match="no rules are in force"):
        jitted(X)
    assert len(traced) == 4, "three tables and the call without one; none twice"


def test_contexts_nest_restore_and_belong_to_a_thread(mesh):
    with use_rules(mesh, RULES):
        with use_rules(mesh, RULES.replace(mlp="fsdp")):
            assert spec_of(pin, X) == P("data", "fsdp")
        with pytest.raises(RuntimeError), use_rules(mesh, RULES.replace(mlp=None)):
            raise RuntimeError
        assert spec_of(pin, X) == P("data", "model")
        seen = []

        def elsewhere():
            try:
                constrain(jnp.asarray(X), "batch", "mlp")
            except ValueError as error:
                seen.append(str(error))

        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        assert len(seen) == 1
        assert "no rules" in seen[0]


def test_entering_is_cheap(mesh):
    def enter():
        with use_rules(mesh, RULES, hide=("data",)):
            pass

    # About 5 µs; a training step enters once, while it is traced.
    assert min(timeit.repeat(enter, number=200, repeat=5)) / 200 < 1e-4


def test_bad_names_shapes_and_meshes(mesh):
    with use_rules(mesh, RULES):
        for names, message in [
            (("batch", "mpl"), r"constrain\('batch', 'mpl'\): unknown logical name 'mpl'"),
            (("batch", "batch"), "axis 'data' is used twice"),
            (("batch", "seq", "mlp"), r"3 names for an array of shape \(4, 8\)"),
        ]:
            with pytest.raises(ValueError, match=message):
                constrain(X, *names)
        with pytest.raises(ValueError, match=r"dim 1 of shape \(4, 7\) has size 7.*'model'"):
            jax.jit(pin)(X[:, :7])
    with use_rules(mesh, RULES.replace(on_indivisible="replicate")):
        assert spec_of(pin, X[:, :7]) == P("data")
    padding = RULES.replace(on_indivisible="pad")
    with pytest.raises(ValueError, match="size 7"), use_rules(mesh, padding):
        jax.jit(pin)(X[:, :7])
    with pytest.raises(ValueError, match="cannot hide"), use_rules(mesh, RULES, hide=("worker",)):
        pass
    explicit = jax.sharding.Mesh(
        jax.devices(), ("data",), axis_types=(jax.sharding.AxisType.Explicit,)
    )
    with pytest.raises(ValueError, match="Auto axes"), use_rules(explicit, RULES):
        pass


# --- under transformations -------------------------------------------------------------------


def test_scan_remat_and_grad(mesh):
    weights = jnp.ones((3, 8, 8)) / 8

    def loss(weights, x):
        @jax.checkpoint
        def layer(x, weight):
            return constrain(jnp.tanh(x @ weight), "batch", "mlp"), None

        return jax.lax.scan(layer, x, weights)[0]

    with no_mesh():
        want = jax.grad(lambda w: loss(w, X).sum())(weights)
    with use_rules(mesh, RULES):
        assert spec_of(loss, weights, X) == P("data", "model")
        got = jax.jit(jax.grad(lambda w: loss(w, X).sum()))(weights)
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_vmap_leaves_the_mapped_dim_free(mesh):
    with use_rules(mesh, RULES):
        assert jax.jit(jax.vmap(pin))(np.ones((3, 4, 8), np.float32)).shape == (3, 4, 8)
        with pytest.raises(ValueError, match=r"hide=\(<axis>,\)"):
            jax.jit(jax.vmap(pin, spmd_axis_name="data"))(np.ones((2, 4, 8), np.float32))


def test_mapped_workers_hide_their_axis(mesh):
    def worker(x):
        with use_rules(mesh, RULES, hide=("data",)):
            return pin(x)

    mapped = jax.vmap(worker, spmd_axis_name="data")
    assert spec_of(mapped, np.ones((2, 4, 8), np.float32)) == P("data", None, "model")
    joint = RULES.replace(batch=("data", "fsdp"))
    with use_rules(mesh, joint, hide=("data",)):
        assert spec_of(pin, X) == P("fsdp", "model")


def test_gradients_of_mapped_workers(mesh):
    """The training step's shape: vmap of value_and_grad of a scanned, checkpointed model."""

    def loss(w, x):
        with use_rules(mesh, RULES, hide=("data",)):
            body = jax.checkpoint(lambda x, w: (constrain(x @ w, "batch", "mlp"), None))
            return jnp.sum(jax.lax.scan(body, x, w)[0] ** 2)

    grads = jax.vmap(jax.value_and_grad(loss), in_axes=(None, 0), spmd_axis_name="data")
    weights = jnp.ones((2, 8, 8)) / 8
    x = np.ones((2, 4, 8), np.float32)
    values, gradients = jax.jit(grads)(weights, x)
    with no_mesh():
        want = jax.value_and_grad(lambda w, x: jnp.sum((x @ w[0] @ w[1]) ** 2))(weights, x[0])
    np.testing.assert_allclose(values[1], want[0], rtol=1e-5)
    np.testing.assert_allclose(gradients[1], want[1], rtol=1e-5)


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("manual", [("data",), ("data", "fsdp"), ("data", "fsdp", "model")])
def test_shard_map_drops_the_manual_axes(mesh, manual, check_vma):
    mapped = jax.jit(
        jax.shard_map(
            pin,
            mesh=mesh,
            in_specs=P("data"),
            out_specs=P("data"),
            axis_names=set(manual),
            check_vma=check_vma,
        )
    )
    with use_rules(mesh, RULES):
        np.testing.assert_array_equal(mapped(X), 2 * X)
        gradient = jax.jit(jax.grad(lambda x: mapped(x).sum()))(X)
        pinned = "sharding_constraint" in mapped.lower(X).as_text()
    np.testing.assert_array_equal(gradient, np.full_like(X, 2.0))
    assert pinned


def test_shard_map_over_all_axes_has_nothing_to_leave_open():
    mesh = make_mesh({"data": 2}, devices=jax.devices()[:2])

    def double(x):
        return constrain(2 * x, P.UNCONSTRAINED, "seq")

    mapped = jax.shard_map(double, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    with use_rules(mesh, RULES):
        np.testing.assert_array_equal(jax.jit(mapped)(X), 2 * X)


# --- in models -------------------------------------------------------------------------------


class Nnx(nnx.Module):
    def __init__(self, rngs):
        names = ("embed", "mlp")
        self.dense = nnx.Linear(8, 16, rngs=rngs, kernel_metadata={"out_sharding": names})

    def __call__(self, x):
        return constrain(self.dense(x), "batch", "mlp")


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        kernel_init = nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("embed", "mlp"))
        return constrain(nn.Dense(16, kernel_init=kernel_init)(x), "batch", "mlp")


def test_nnx_model(mesh):
    with no_mesh():
        model = Nnx(nnx.Rngs(0))  # annotated, and no mesh is asked for
        want = model(X)
    graphdef, state = nnx.split(model)

    def apply(state, x):
        return nnx.merge(graphdef, state)(x)

    with use_rules(mesh, RULES):
        assert spec_of(apply, state, X) == P("data", "model")
        np.testing.assert_allclose(jax.jit(apply)(state, X), want, rtol=1e-5)

        @nnx.jit
        def nnx_apply(model, x):
            return model(x)

        assert nnx_apply(model, X).sharding.spec == P("data", "model")
        # Flax would look "embed" up as a mesh axis and fail; here init decides where things go.
        assert Nnx(nnx.Rngs(1)).dense.kernel.get_value().shape == (8, 16)


def test_linen_model_and_scanned_linen_model(mesh):
    with no_mesh():
        variables = Linen().init(jax.random.key(0), X)
    with use_rules(mesh, RULES):
        assert spec_of(Linen().apply, variables, X) == P("data", "model")

    class Square(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return constrain(nn.Dense(8)(x), "batch", "mlp"), None

    scanned = nn.scan(
        nn.remat(Square), variable_axes={"params": 0}, split_rngs={"params": True}, length=2
    )()
    with use_rules(mesh, RULES):
        variables = scanned.init(jax.random.key(0), X, None)
        assert spec_of(lambda v, x: scanned.apply(v, x, None)[0], variables, X) == P(
            "data", "model"
        )
