"""Experts divided over a mesh: the numbers of one device, and who sends how much."""

import math

import jax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jdml.models.experts import Kernels, capacity_of, evaluate_dropless, route
from jdml.models.experts.dropless import rows_of_round
from jdml.sharding import bytes_per_axis, collectives, make_mesh, no_mesh, presets, use_rules
from tests.marks import slow
from tests.models.experts.problem import (
    BATCH,
    CAPACITY_FACTOR,
    CHOICES,
    DENSE,
    EMBED,
    EXPERTS,
    SEQ,
    assert_equal,
    gradients_of,
    operands,
)

RULES = presets.expert_parallel(presets.tensor())


def mesh_of(**axes):
    return make_mesh(axes, devices=jax.devices()[: math.prod(axes.values())])


def place(given, mesh, rules, workers):
    (kernels, router), x = given
    at = lambda *names: NamedSharding(mesh, rules.spec(names))  # noqa: E731
    up, down = at("experts", "embed", "mlp"), at("experts", "mlp", "embed")
    kernels = jax.device_put(kernels, Kernels(up, up, down))
    spec = P("data", "expert") if workers else rules.activations.spec(("batch", "seq", None))
    return (kernels, jax.device_put(router, at(None, None))), jax.device_put(
        x, NamedSharding(mesh, spec)
    )


def on_mesh(form, mesh, given, rules=RULES, **options):
    """Compiled as a training step has it, mapped over the workers on ``data``; and its results."""
    gradients = gradients_of(form, **options)

    @jax.jit
    def run(params, x):
        with use_rules(mesh, rules, hide=("data",)):
            return jax.vmap(gradients, (None, 0), spmd_axis_name="data")(params, x)

    placed = place(given, mesh, rules, workers=True)
    compiled = run.lower(*placed).compile()
    return compiled, compiled(*placed)


@pytest.fixture(scope="module")
def dense():
    """Operands of so many workers, and what the dense evaluation makes of them."""
    cache = {}

    def results(form, workers):
        if (form, workers) not in cache:
            given = operands(workers=workers)
            with no_mesh():
                run = jax.jit(jax.vmap(gradients_of(DENSE[form]), (None, 0)))
                cache[form, workers] = given, run(*given)
        return cache[form, workers]

    return results


def exchanged(compiled, mesh):
    """Bytes of each all-to-all of rows (counts are int32), and whether it stands in a branch."""
    found = [c for c in collectives(compiled, mesh) if c.kind == "all-to-all" and c.dtype == "f32"]
    assert all(c.axes == ("expert",) for c in found)
    return [(c.payload_bytes, c.conditional) for c in found for _ in range(c.count)]


def assert_tokens_and_experts_stay(compiled, mesh):
    """Nothing is gathered, and only sums of gradients and of losses go round besides.

    And one number: the rounds that any device needs.
    """
    found = [c for c in collectives(compiled, mesh) if (c.dtype, c.payload_bytes) != ("s32", 4)]
    kinds = {(c.kind, *c.axes) for c in found}
    allowed = {("all-to-all", "expert"), ("all-reduce", "expert"), ("all-reduce", "model")}
    assert kinds <= allowed


@pytest.mark.parametrize(
    "axes",
    [
        slow({"data": 1, "expert": 2}),
        slow({"data": 1, "expert": 8}),
        slow({"data": 2, "expert": 4}),
        {"data": 2, "expert": 2, "model": 2},
        slow({"data": 2, "expert": 1, "model": 2}),
    ],
    ids=str,
)
def test_capacity(dense, axes):
    mesh = mesh_of(**{"model": 1} | axes)
    given, wanted = dense("capacity", axes["data"])
    compiled, got = on_mesh("capacity", mesh, given)
    assert_equal(got, wanted)
    assert_tokens_and_experts_stay(compiled, mesh)
    parts = axes["expert"]
    capacity = capacity_of(CAPACITY_FACTOR, CHOICES, SEQ, EXPERTS)
    payload = EXPERTS * (BATCH // parts) * capacity * EMBED * 4
    assert exchanged(compiled, mesh) == ([(payload, False)] * 4 if parts > 1 else [])
    if parts > 1:
        sent = bytes_per_axis(c for c in collectives(compiled, mesh) if c.kind == "all-to-all")
        assert sum(sent.values()) == 4 * payload * (parts - 1) // parts


@pytest.mark.parametrize(
    ("axes", "slack", "rounds"),
    [
        slow({"data": 1, "expert": 2}, 2.0, 1),
        slow({"data": 1, "expert": 8}, 2.0, 1),
        slow({"data": 2, "expert": 4}, 2.0, 2),
        ({"data": 2, "expert": 4}, 0.5, 3),  # more than one round is needed
        slow({"data": 2, "expert": 2, "model": 2}, 2.0, 1),
        slow({"data": 2, "expert": 2, "model": 2}, 0.6, 3),
        slow({"data": 2, "expert": 1, "model": 2}, 2.0, 1),
    ],
    ids=str,
)
def test_dropless(dense, axes, slack, rounds):
    mesh = mesh_of(**{"model": 1} | axes)
    given, wanted = dense("dropless", axes["data"])
    compiled, got = on_mesh("dropless", mesh, given, slack=slack)
    assert_equal(got, wanted)
    assert_tokens_and_experts_stay(compiled, mesh)
    parts = axes["expert"]
    tokens = BATCH // parts * SEQ
    size, number = rows_of_round(tokens, CHOICES, EXPERTS, parts, slack)
    assert number == rounds
    payload = parts * size * EMBED * 4
    found = exchanged(compiled, mesh)
    if parts == 1:
        assert found == []
        return
    assert found.count((payload, False)) == 4
    # Later rounds: two exchanges forward; the backward pass repeats them, and has its own two.
    assert found.count((payload, True)) == 6 * (rounds - 1)
    assert len(found) == 4 + 6 * (rounds - 1)


@pytest.mark.slow
@pytest.mark.parametrize("form", DENSE)
def test_one_loss_of_the_whole_batch(dense, form):
    """As evaluation has it: the batch over ``data`` and ``expert`` at once, no mapping."""
    mesh = mesh_of(data=2, expert=4, model=1)
    given, wanted = dense(form, 1)
    x = given[1][0]
    gradients = gradients_of(form, slack=0.5) if form == "dropless" else gradients_of(form)

    @jax.jit
    def run(params, x):
        with use_rules(mesh, RULES):
            return gradients(params, x)

    got = run(*place((given[0], x), mesh, RULES, workers=False))
    assert_equal(got, jax.tree.map(lambda a: a[0], wanted))


def layer(mesh, rules, num_experts=EXPERTS):
    def run():
        (kernels, router), x = operands()
        kernels = Kernels(*(k[:num_experts] for k in kernels))
        routing = route(x @ router[:, :num_experts], 2)
        return evaluate_dropless(x, routing, kernels)

    with use_rules(mesh, rules):
        return jax.eval_shape(run)


def test_refuses_experts_that_the_axis_does_not_divide():
    mesh = mesh_of(data=1, expert=4)
    rules = RULES.replace(mlp=None, heads=None, kv_heads=None, vocab=None)
    with pytest.raises(
        ValueError, match=r"6 experts .* 'expert' of size 4; .*: 4 or 8; .* 6: 1, 2, 3, 6"
    ):
        layer(mesh, rules, 6)
    with pytest.raises(ValueError, match=r"3 experts .* divides: 4; .* 3: 1, 3"):
        layer(mesh, rules, 3)


def test_refuses_tokens_that_the_axis_does_not_divide():
    mesh = mesh_of(data=2, expert=4)
    with pytest.raises(ValueError, match="divides the experts but not the tokens"):
        layer(mesh, presets.data_parallel().replace(experts="expert"))
