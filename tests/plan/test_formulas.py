"""The formulas beside programs for eight simulated devices, and in the cases that arithmetic gives.

How memory and bytes compare with what TPU's compiler makes is in ``test_tpu_compile.py``.
"""

import dataclasses
import math

import jax
import pytest

from jdml.models import TransformerConfig
from jdml.partition.pipeline import simulate
from jdml.plan import Layout, parse_algorithm, parse_topology
from jdml.plan.layout import schedule_of
from jdml.plan.memory import predict_memory
from jdml.plan.program import compile_step, lower_step
from jdml.plan.roofline import predict_step
from jdml.plan.shares import shares
from jdml.plan.ticks import ticks_of
from jdml.plan.traffic import predict_traffic
from jdml.plan.work import pairs_of, predict_work
from jdml.sharding import bytes_per_axis, make_mesh

BATCH, SEQ = 16, 48  # no stack of activations is as large as one of parameters
POD, EXACT = parse_topology("v5e:2x4"), parse_algorithm("exact")
LAYOUTS = {"exact": Layout(2, 2, 2), "int8": Layout(4, 2, 1)}


@pytest.fixture(scope="module", params=["exact", pytest.param("int8", marks=pytest.mark.slow)])
def both(request, config):
    """``(algorithm, layout, compiled)`` on eight simulated devices."""
    layout, algorithm = LAYOUTS[request.param], parse_algorithm(request.param)
    mesh = make_mesh(layout.sizes)
    return algorithm, layout, compile_step(config, layout, mesh, BATCH, SEQ, algorithm)


def test_state_is_what_the_program_takes(config, both):
    algorithm, layout, compiled = both
    memory = predict_memory(config, POD, layout, BATCH, SEQ, algorithm)
    assert memory.parameters == compiled.memory.parameters
    assert memory.gradients == compiled.memory.gradients
    # Counters and int8's last blocks are not in the formula.
    assert memory.optimiser == pytest.approx(compiled.memory.optimiser, rel=0.02)


@pytest.mark.parametrize(("name", "copies"), [("local_sgd:4", 2), ("diloco:50", 4)])
def test_what_exchanges_of_models_keep(config, name, copies):
    """AdamW's two moments; DiLoCo's anchor and momentum too."""
    layout, algorithm = Layout(2, 4, 1), parse_algorithm(name)
    _, state = lower_step(config, layout, make_mesh(layout.sizes), BATCH, SEQ, algorithm)
    memory = predict_memory(config, POD, layout, BATCH, SEQ, algorithm)
    assert memory.optimiser == copies * memory.parameters
    held = sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(state.opt_state)
    )
    assert memory.optimiser == pytest.approx(held, rel=0.01)


def test_products_are_counted(config, both):
    _, layout, compiled = both
    work = predict_work(config, layout, BATCH, SEQ)
    assert work.total == pytest.approx(compiled.flops, rel=0.03)


def test_the_workers_exchange_what_is_predicted(config, both):
    algorithm, layout, compiled = both
    sizes = [share.elements for share in shares(config, layout)]
    sent = algorithm.sent_bytes(layout.data, sizes) * algorithm.every
    found = bytes_per_axis([c for c in compiled.listed if c.axes == ("data",)])
    # Beside it, the mean of the loss; int8's blocks are filled up in each leaf.
    assert found[("data",)] == pytest.approx(sent, rel=0.05)


def test_activations_that_the_program_carries(config, both):
    """``remat="full"`` leaves the input of each block, and nothing else."""
    _, layout, compiled = both
    tokens = BATCH * SEQ // (layout.data * layout.fsdp)
    assert compiled.memory.activations == config.num_layers * tokens * config.embed_dim * 4


def test_shares_add_up_to_the_model(config):
    whole = shares(config, Layout())
    assert sum(share.elements for share in whole) == config.num_params
    assert not any(share.axes for share in whole)
    parts = shares(config, Layout(2, 4, 2))
    for one, part in zip(whole, parts, strict=True):
        assert one.elements == part.elements * 4 ** ("fsdp" in part.axes) * 2 ** (
            "model" in part.axes
        )


@pytest.mark.parametrize("name", ["exact", "int8", "diloco:10"])
def test_one_chip_sends_nothing(config, name):
    assert predict_traffic(
        config, parse_topology("v5e:1x1"), Layout(), 4, 64, parse_algorithm(name)
    ) == ()  # fmt: skip


def test_bytes_fall_as_the_algorithm_says(config):
    topology, layout = parse_topology("v5e:2x4"), Layout(8)

    def sent(name):
        (one,) = predict_traffic(config, topology, layout, 8, 64, parse_algorithm(name))
        return one.sent_bytes

    assert sent("exact") == pytest.approx(2 * 7 / 8 * 4 * config.num_params)
    assert sent("local_sgd:16") == pytest.approx(sent("exact") / 16)
    assert sent("diloco:500") == pytest.approx(sent("exact") / 500)
    assert 0.25 < sent("int8") / sent("exact") < 0.26
    assert sent("one_bit") < sent("int4") < sent("int8")


def test_the_slow_network_is_counted_apart(config):
    inside = predict_step(
        config, parse_topology("v5e:4x4"), Layout(4, 4), 16, 64, parse_algorithm("exact")
    )
    across = predict_step(
        config, parse_topology("2*v5e:2x4"), Layout(4, 4), 16, 64, parse_algorithm("exact")
    )
    assert inside.slow_seconds == 0 < across.slow_seconds
    assert across.seconds > inside.seconds
    # Each chip's share is exchanged with its like in the other slice: half as much sent as it has
    # parameters of f32, from each of two.
    held = sum(share.elements for share in shares(config, Layout(4, 4)))
    bytes_across = 2 * (2 - 1) / 2 * 4 * held / 2
    speed = parse_topology("2*v5e:2x4").chip.slow_bandwidth
    assert across.slow_seconds == pytest.approx(bytes_across / speed, abs=1e-4)


def test_more_chips_hold_less_each(config):
    algorithm = parse_algorithm("exact")
    sizes = [predict_memory(config, POD, Layout(1, n, 1), 16, 64, algorithm) for n in (1, 2, 4, 8)]
    assert [8 * s.parameters for s in sizes] == pytest.approx(
        [8 * sizes[0].parameters / n for n in (1, 2, 4, 8)], rel=1e-6
    )
    assert sorted(sizes, key=lambda s: -s.total) == sizes


def test_what_is_kept_of_activations_grows_as_less_is_computed_again(config):
    kept = [
        predict_memory(
            dataclasses.replace(config, remat=remat), POD, Layout(), 8, 64, EXACT
        ).activations
        for remat in ("full", "dots", "none")
    ]
    assert kept == sorted(kept)
    assert len(set(kept)) == 3


def exchange_of(config, layout, batch, seq, axis, what):
    """The one exchange over the axis that is so called."""
    found = predict_traffic(config, POD, layout, batch, seq, EXACT)
    (one,) = [e for e in found if e.axis == axis and what in e.what]
    return one


def test_keys_that_go_round_are_those_of_the_page():
    """18 permutes and 73,728 bytes: ``docs/context.md``, read off its compiled program."""
    page = TransformerConfig(
        num_layers=2, embed_dim=32, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=64,
        attention="ring", seq_order="zigzag", flatten_tokens=False,
    )  # fmt: skip
    one = exchange_of(page, Layout(2, seq=4), 4, 64, "seq", "keys")
    assert (one.sent_bytes, one.times, one.hidden) == (73_728, 18, True)


def test_what_forms_of_attention_send(config):
    """Ring and gathered keys alike, all-to-all (K - 1) / K · (4 Q + 3 B + Q / head_dim):
    ``docs/context.md``."""
    layout, heads, seq = Layout(seq=4), 8, 64
    dots = dataclasses.replace(config, remat="dots", flatten_tokens=False)
    forms = {
        form: exchange_of(
            dataclasses.replace(dots, attention=form), layout, 1, seq, "seq", what
        ).sent_bytes
        for form, what in (("ring", "keys"), ("gather", "keys"), ("ulysses", "positions"))
    }
    query = seq // 4 * heads * config.head_dim * 4
    pair = 2 * query * config.num_kv_heads // heads
    assert forms["ring"] == forms["gather"] == config.num_layers * 3 * 3 * pair
    assert forms["ulysses"] == config.num_layers * 3 / 4 * (
        4 * query + 3 * pair + query / config.head_dim
    )


def test_rows_of_experts_are_those_of_the_page():
    """32,768 bytes of room four times, of which half is kept: ``docs/experts.md``."""
    page = TransformerConfig(
        num_layers=2, embed_dim=32, mlp_dim=64, num_experts=8, experts_per_token=2
    )
    one = exchange_of(page, Layout(4, expert=2), 16, 32, "expert", "rows")
    assert one.room_bytes == 2 * 4 * 32_768
    # Two choices of 2 · 32 tokens, of which half leave the device.
    assert one.sent_bytes == 2 * 4 * 2 * 64 // 2 * 32 * 4


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved:2", "zero_bubble"])
def test_stages_wait_as_the_simulator_says(schedule):
    layout = Layout(stage=4, micro_batches=8, schedule=schedule)
    ticks = ticks_of(layout)
    timeline = simulate(schedule_of(schedule), 4, 8, t_f=1.0, t_b=1.5, t_w=1.5, lockstep=True)
    assert ticks.waiting(8 * 1.0, 8 * 3.0) == pytest.approx(timeline.span - 8 * 4.0)


def test_more_micro_batches_wait_less(config):
    four = dataclasses.replace(config, num_layers=4)

    def bubble(number):
        layout = Layout(2, stage=4, micro_batches=number)
        one = predict_step(four, POD, layout, 64, 64, EXACT)
        return one.bubble_seconds / one.seconds

    assert bubble(4) > bubble(8) > bubble(32) > 0
    assert predict_step(four, POD, Layout(8), 64, 64, EXACT).bubble_seconds == 0


def test_causal_rings_do_half_the_work(config):
    """All chips' together: half of the scores, and what blocks on the diagonal have beyond it."""
    ring = dataclasses.replace(config, attention_block=8, flatten_tokens=False)
    forms = {"ring": "zigzag", "gather": "zigzag", "ulysses": "contiguous"}
    for attention, order in forms.items():
        one = dataclasses.replace(ring, attention=attention, seq_order=order)
        for parts in (2, 4):
            share = pairs_of(one, Layout(seq=parts), 256) * parts / 256**2
            assert 0.5 < share <= (2 * parts + 1) / (4 * parts), (attention, parts)
    assert pairs_of(config, Layout(), 256) == 256**2


def test_tables_are_on_every_stage(config):
    four = dataclasses.replace(config, num_layers=4)
    whole = {one.path: one for one in shares(four, Layout())}
    for one in shares(four, Layout(2, model=2, stage=2)):
        if one.stacked:
            assert "stage" in one.axes
        else:
            assert not one.axes
            assert one.elements == whole[one.path].elements


def test_experts_divide_what_is_theirs(config):
    mixture = dataclasses.replace(config, num_experts=4)
    for one in shares(mixture, Layout(2, expert=4)):
        theirs = one.path.removeprefix("layers/mlp/") in ("gate", "up", "down")
        assert one.axes == (("expert",) if theirs else ())
