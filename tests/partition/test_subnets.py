"""Networks cut at random and put together again."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from jdml.aggregate.independent_subnets import independent_subnets
from jdml.partition.subnets import cut, draw_subnets, join, num_kept
from jdml.sharding import collectives, make_mesh, shard

SIZES = {"first": 16, "second": 12}
NAMES = {
    "w0": ("input", "first"), "b0": ("first",), "w1": ("first", "second"),
    "w2": ("second", "output"), "b2": ("output",), "scale": (),
}  # fmt: skip

WORKERS, STEPS, BATCH, RATE = 4, 3, 8, 1e-3


def make_params():
    shapes = {"w0": (5, 16), "b0": (16,), "w1": (16, 12), "w2": (12, 3), "b2": (3,), "scale": ()}
    draws = np.random.default_rng(0)
    return {k: jnp.asarray(draws.standard_normal(s), jnp.float32) for k, s in shapes.items()}


def forward(params, scales, x):
    first = jnp.tanh(x @ params["w0"] + params["b0"]) * scales["first"]
    second = jnp.tanh(first @ params["w1"]) * scales["second"]
    return params["scale"] * (second @ params["w2"]) + params["b2"]


def loss_fn(params, scales, batch, key):
    del key
    return jnp.mean((forward(params, scales, batch["x"]) - batch["y"]) ** 2)


def make_batches():
    draws = np.random.default_rng(1)
    x = draws.standard_normal((STEPS, WORKERS * BATCH, 5)).astype(np.float32)
    return {"x": jnp.asarray(x), "y": jnp.asarray(np.sin(x[..., :3]))}


def parts_of(params, subnets, workers=WORKERS):
    rows = [{name: u[k] for name, u in subnets.units.items()} for k in range(workers)]
    parts = [cut(params, NAMES, row) for row in rows]
    return jax.tree.map(lambda *x: jnp.stack(x), *parts)


@pytest.mark.parametrize("backbone", [0.0, 0.3, 1.0])
def test_every_unit_is_on_one_worker_or_on_all(backbone):
    subnets = draw_subnets(jax.random.key(3), SIZES, WORKERS, backbone)
    for name, size in SIZES.items():
        shared, own = num_kept(size, WORKERS, backbone)
        assert shared >= backbone * size
        counts = np.bincount(np.asarray(subnets.units[name]).ravel(), minlength=size)
        assert (np.sort(counts) == np.sort([WORKERS] * shared + [1] * own * WORKERS)).all()
        owned = np.asarray(subnets.scales[name])
        np.testing.assert_array_equal(owned, np.where(np.arange(shared + own) < shared, 1, WORKERS))


def test_other_keys_deal_otherwise():
    first, second = (draw_subnets(jax.random.key(i), SIZES, WORKERS) for i in (0, 1))
    assert not np.array_equal(first.units["first"], second.units["first"])


@pytest.mark.parametrize("backbone", [0.0, 0.5])
def test_parts_that_nobody_changed_make_the_whole(backbone):
    params = make_params()
    subnets = draw_subnets(jax.random.key(0), SIZES, WORKERS, backbone)
    whole = join(params, NAMES, parts_of(params, subnets), subnets.units)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), whole, params)


def test_cut_edges_stay_and_shared_ones_are_averaged():
    params = make_params()
    subnets = draw_subnets(jax.random.key(0), SIZES, WORKERS, 0.25)
    parts = parts_of(params, subnets)
    moved = jax.tree.map(
        lambda x: x + jnp.arange(1.0, WORKERS + 1).reshape(-1, *[1] * (x.ndim - 1)), parts
    )
    change = jax.tree.map(
        lambda a, b: np.asarray(a - b), join(params, NAMES, moved, subnets.units), params
    )
    owner = {}
    for name, size in SIZES.items():
        units = np.asarray(subnets.units[name])
        has = np.array([[j in row for j in range(size)] for row in units])
        owner[name] = has
    for i in range(SIZES["first"]):
        for j in range(SIZES["second"]):
            both = owner["first"][:, i] & owner["second"][:, j]
            expected = np.mean(np.flatnonzero(both) + 1) if both.any() else 0
            np.testing.assert_allclose(change["w1"][i, j], expected, atol=1e-5)
    np.testing.assert_allclose(change["scale"], np.mean(range(1, WORKERS + 1)), rtol=1e-6)


def test_hidden_sums_are_right_on_average():
    """The mean over draws of a subnet's scaled hidden sum is the whole layer's."""
    values = jnp.arange(1.0, 17.0)

    def one(key):
        subnets = draw_subnets(key, SIZES, WORKERS, 0.25)
        return jnp.sum(values[subnets.units["first"][0]] * subnets.scales["first"])

    sums = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), 4000))
    error = abs(float(sums.mean()) - float(values.sum()))
    assert error < 4 * float(sums.std()) / 4000**0.5


def run_round(backbone, workers, key):
    mesh = make_mesh({"data": workers}, devices=jax.devices()[:workers])
    take = jax.jit(
        independent_subnets(loss_fn, optax.sgd(RATE), mesh, NAMES, SIZES, backbone=backbone)
    )
    params = shard(make_params(), mesh, P())
    batches = shard(make_batches(), mesh, P(None, "data"))
    return take, (params, batches, shard(key, mesh, P())), mesh


def alone(params, scales, batches):
    """SGD on one device."""
    for i in range(STEPS):
        batch = jax.tree.map(lambda x, i=i: x[i], batches)
        gradients = jax.grad(loss_fn)(params, scales, batch, None)
        params = jax.tree.map(lambda p, g: p - RATE * g, params, gradients)
    return params


@pytest.mark.parametrize("backbone", [0.25, 1.0])
def test_a_round_is_local_sgd_on_the_parts(backbone):
    """Against workers trained one by one; with everything in the backbone, against local SGD."""
    key = jax.random.key(5)
    take, arguments, mesh = run_round(backbone, WORKERS, key)
    found, losses = take(*arguments)
    params, batches = make_params(), make_batches()
    subnets = draw_subnets(jax.random.split(key)[0], SIZES, WORKERS, backbone)
    ends = []
    for k in range(WORKERS):
        own = cut(params, NAMES, {name: u[k] for name, u in subnets.units.items()})
        share = jax.tree.map(lambda x, k=k: x[:, k * BATCH : (k + 1) * BATCH], batches)
        ends.append(alone(own, subnets.scales, share))
    parts = jax.tree.map(lambda *x: jnp.stack(x), *ends)
    expected = join(params, NAMES, parts, subnets.units)
    if backbone == 1.0:
        expected = jax.tree.map(lambda x: x.mean(0), parts)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, expected)
    assert losses.shape == (STEPS,)

    subnet_bytes = 4 * sum(x.size for x in jax.tree.leaves(ends[0]))
    found = collectives(take.lower(*arguments).compile(), mesh)
    gathered = sum(c.sent_bytes for c in found if c.kind == "all-gather")
    assert gathered == (WORKERS - 1) * subnet_bytes
    assert all(c.payload_bytes <= 4 * STEPS for c in found if c.kind != "all-gather")


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"backbone": 1.5}, "share from 0 to 1"),
        ({"num_workers": 0}, "at least 1"),
        ({"num_workers": 13}, "'second' has 12 units"),
    ],
)
def test_refused_draws(kwargs, message):
    with pytest.raises(ValueError, match=message):
        draw_subnets(jax.random.key(0), SIZES, **{"num_workers": 4} | kwargs)


def test_refused_names_and_meshes():
    units = {"first": jnp.arange(4), "third": jnp.arange(2)}
    with pytest.raises(ValueError, match="named \\['third'\\]"):
        cut(make_params(), NAMES, units)
    with pytest.raises(ValueError, match="'b0' has 1 dims"):
        cut(make_params(), NAMES | {"b0": ("first", None)}, {"first": jnp.arange(4)})
    mesh = make_mesh({"data": 4, "model": 2})
    with pytest.raises(ValueError, match="only axis longer than 1"):
        independent_subnets(loss_fn, optax.sgd(0.1), mesh, NAMES, SIZES)
