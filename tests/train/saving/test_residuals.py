"""Debts moved to another number of workers, against loops over the workers."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from jdml.sharding import make_mesh
from jdml.train.saving import residuals
from jdml.train.saving.residuals import Counts, debts, plan, settle, share_out


class Feedback(NamedTuple):
    residual: Any


class Reducer(NamedTuple):
    q: Any
    residual: Any


def test_a_debt_is_what_stands_in_a_field_and_of_a_reducer_the_inner_field_alone():
    one = np.zeros(1)
    tree = {
        "params": {"residual": {"kernel": one}},  # a module's name, not a field
        "opt_state": (
            Feedback({"kernel": one, "residual": one}),
            Feedback(Reducer(q={"kernel": one}, residual={"kernel": one, "bias": ()})),
            Feedback((Reducer(q=one, residual=one), Reducer(q=one, residual=one))),
            Reducer(q=one, residual=()),
        ),
    }
    assert debts(tree) == {
        "opt_state/0/residual/kernel",
        "opt_state/0/residual/residual",
        "opt_state/1/residual/residual/kernel",
        "opt_state/2/residual/0/residual",
        "opt_state/2/residual/1/residual",
    }


@pytest.mark.parametrize(  # as many, more and fewer; whole multiples, a common factor and none
    ("saved", "given"),
    [
        (1, 1),
        (1, 8),
        (8, 1),
        (7, 7),
        (2, 8),
        (8, 2),
        (4, 6),
        (6, 4),
        (3, 8),
        (8, 3),
        (5, 6),
        (6, 5),
    ],
)
def test_worker_j_takes_over_those_that_fall_to_it(saved, given):
    debt = np.random.default_rng(0).normal(size=(saved, 3, 2)).astype(np.float32)
    expected = np.zeros((given, 3, 2))
    for k in range(saved):
        expected[k % given] += debt[k].astype(np.float64)
    number = Counts(saved, given)
    got = share_out(jnp.asarray(debt), (given, 3, 2), number, "sum")
    np.testing.assert_allclose(got, expected, atol=1e-6)  # f32 sums of at most 8
    if saved <= given:
        np.testing.assert_array_equal(got[:saved], debt)
        assert not np.any(got[saved:])
    mean = share_out(jnp.asarray(debt), (given, 3, 2), number, "mean")
    np.testing.assert_allclose(np.mean(mean, 0), debt.mean(0), atol=1e-6)


MESHES = {
    "data": ({"data": 4}, PartitionSpec("data")),
    "data×model": ({"data": 4, "model": 2}, PartitionSpec("data", None, "model")),
    "model×data": ({"model": 2, "data": 4}, PartitionSpec("data", "model")),
    "slice×fsdp×data": (
        {"slice": 2, "fsdp": 2, "data": 2},
        PartitionSpec(("slice", "data"), "fsdp"),
    ),
    "data×slice": ({"slice": 2, "data": 2}, PartitionSpec(("data", "slice"))),
}


@pytest.mark.parametrize("saved", [1, 2, 3, 6, 8, "none"])
@pytest.mark.parametrize("name", MESHES)
def test_what_is_read_lies_on_the_same_devices_and_is_divided_as_it_can_be(name, saved):
    axes, spec = MESHES[name]
    mesh = make_mesh(axes, devices=jax.devices()[: int(np.prod(list(axes.values())))])
    sharding = NamedSharding(mesh, spec)
    wanted = {"residual": jax.ShapeDtypeStruct((4, 6, 8), jnp.float32, sharding=sharding)}
    shape = (6, 8) if saved == "none" else (saved, 6, 8)
    about = {"leaves": {"residual": {"shape": list(shape), "dtype": "float32"}}}
    made = plan(about, wanted, frozenset(wanted), "sum")
    assert made.refusal is None
    (asked,) = made.asked.values()
    assert asked.shape == shape
    assert list(asked.sharding.mesh.devices.flat) == list(mesh.devices.flat)
    others = sharding.shard_shape((4, 6, 8))[1:]
    rows = () if saved == "none" else (saved // np.gcd(saved, 4),)
    assert asked.sharding.shard_shape(shape) == (*rows, *others)

    value = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    (got,) = settle({"residual": jax.device_put(value, asked.sharding)}, wanted, made).values()
    assert (got.shape, got.dtype, got.sharding) == ((4, 6, 8), jnp.float32, sharding)
    expected = np.zeros((4, 6, 8), np.float32)
    for k, row in enumerate(value.reshape(-1, 6, 8)):
        expected[k % 4] += row
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_a_lone_worker_may_have_no_worker_dim():
    device = SingleDeviceSharding(jax.devices()[3])
    wanted = {"r": jax.ShapeDtypeStruct((5,), jnp.float32, sharding=device)}
    made = plan({"leaves": {"r": {"shape": [3, 5], "dtype": "float32"}}}, wanted, {"r"}, "mean")
    assert made.moved == {"r": Counts(3, 1)}
    debt = jax.device_put(np.arange(15, dtype=np.float32).reshape(3, 5), made.asked["r"].sharding)
    got = settle({"r": debt}, wanted, made)["r"]
    assert got.sharding == device
    np.testing.assert_allclose(got, np.arange(15).reshape(3, 5).mean(0))


def kind(*shape, dtype="float32"):
    return {"shape": list(shape), "dtype": dtype}


@pytest.mark.parametrize(
    ("saved", "said"),
    [
        ({"residual": kind(8, 3), "w": kind(3)}, None),
        ({"residual": kind(4, 3), "w": kind(3)}, None),
        ({"residual": kind(8, 3), "w": kind(5)}, "another model:\n  leaf 'w': saved"),
        ({"residual": kind(8, 5), "w": kind(3)}, "another model:\n  leaf 'residual'"),
        ({"residual": kind(8, 3, dtype="float16"), "w": kind(3)}, "another model"),
        ({"w": kind(3)}, r"leaf 'residual' \(float32\[4, 3\]\) is not in the checkpoint"),
        ({"residual": kind(8, 3), "w": kind(3), "v": kind(3)}, "'v' .* is only in the checkpoint"),
    ],
)
def test_only_the_number_of_workers_may_differ(saved, said):
    mesh = make_mesh({"data": 4}, devices=jax.devices()[:4])
    each = NamedSharding(mesh, PartitionSpec("data"))
    wanted = {
        "residual": jax.ShapeDtypeStruct((4, 3), jnp.float32, sharding=each),
        "w": jax.ShapeDtypeStruct((3,), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec())),
    }
    made = plan({"leaves": saved}, wanted, frozenset({"residual"}), "sum")
    if said is None:
        assert made.refusal is None
    else:
        with pytest.raises(ValueError, match=said):
            raise ValueError(made.refusal)
    # Nothing of the residuals is compared when they begin anew.
    anew = plan(
        {"leaves": saved, "residuals": ["residual"]}, wanted, frozenset({"residual"}), "reset"
    )
    assert (anew.refusal is None) == (saved["w"] == kind(3) and "v" not in saved)
    assert anew.fresh == {"residual"}
    assert "residual" not in anew.asked


def test_other_leaves_of_the_workers_own_are_refused_with_the_numbers():
    mesh = make_mesh({"data": 4}, devices=jax.devices()[:4])
    each = NamedSharding(mesh, PartitionSpec("data"))
    wanted = {
        name: jax.ShapeDtypeStruct((4, 3), jnp.float32, sharding=each) for name in ("residual", "w")
    }
    refusal = plan(
        {"leaves": {"residual": kind(8, 3), "w": kind(8, 3)}}, wanted, {"residual"}, "sum"
    ).refusal
    assert refusal.startswith("was saved by 8 workers, and 4 are here.")
    assert "leaf 'w': saved float32[8, 3], given float32[4, 3]" in refusal
    assert "'residual'" not in refusal
    assert "Resume with 8 workers" in refusal
    # A dim 0 that is not divided one by one is a parameter's own, and numbers must agree.
    whole = NamedSharding(mesh, PartitionSpec())
    wanted["w"] = jax.ShapeDtypeStruct((4, 3), jnp.float32, sharding=whole)
    for leaf in (kind(8, 3), kind(2, 3)):
        about = {"leaves": {"residual": kind(8, 3), "w": leaf}}
        assert "another model" in plan(about, wanted, {"residual"}, "sum").refusal


def test_an_unknown_policy_is_refused():
    with pytest.raises(ValueError, match=r"residual='keep'; expected one of \('sum', 'mean'"):
        residuals.check_policy("keep")
