"""What stands between start and done, in recorded programs and in written ones; and flops.

``hlo/*.txt`` are described in ``test_compiled.py``.
"""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from jdml.sharding import hlo, make_mesh, overlap, program_flops
from jdml.sharding.hlo_flops import flops_of

PRODUCT = 2 * 2048**3


def excerpt(name):
    return (Path(__file__).parent / "hlo" / f"{name}.txt").read_text()


def row(item):
    return item.collective.kind, item.start, item.done, item.between


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "async_all_to_all",
            ("all-to-all", "all-to-all-start", "all-to-all-done", (("fusion", PRODUCT),)),
        ),
        # The fusion that carries the gather computes beside it.
        (
            "async_fusion",
            (
                "all-gather",
                "async-collective-start",
                "async-collective-done",
                (("fusion.4", PRODUCT),),
            ),
        ),
    ],
)
def test_tpu_text(name, expected):
    (found,) = overlap(excerpt(name))
    assert row(found) == expected
    assert found.flops == program_flops(excerpt(name)) == PRODUCT


def test_a_collective_that_is_not_split_hides_nothing():
    for found in overlap(excerpt("tuple_psum")):
        assert not found.collective.asynchronous
        assert (found.start, found.between) == (found.done, ())


def test_what_stands_after_the_done_does_not_count():
    text = excerpt("async_all_to_all")
    (product,) = re.findall(r"\n  %fusion = .*", text)
    done = re.findall(r"\n  %all-to-all-done = .*", text)[0]
    late = text.replace(product, "").replace(done, done + product)
    (found,) = overlap(late)
    assert found.between == ()
    assert program_flops(late) == PRODUCT


LOOPED = """HloModule m, is_scheduled=true, num_partitions=2

%turn (p: (s32[], f32[8,16], f32[16,4])) -> (s32[], f32[8,16], f32[16,4]) {
  %p = (s32[], f32[8,16], f32[16,4]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %a = f32[8,16] get-tuple-element(%p), index=1
  %b = f32[16,4] get-tuple-element(%p), index=2
  %d = f32[8,4] dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  ROOT %t = (s32[], f32[8,16], f32[16,4]) tuple(%next, %a, %b)
}

%more (q: (s32[], f32[8,16], f32[16,4])) -> pred[] {
  %q = (s32[], f32[8,16], f32[16,4]) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %five = s32[] constant(5)
  ROOT %c = pred[] compare(%j, %five), direction=LT
}

%wrapped (w: f32[16]) -> f32[8] {
  %w = f32[16] parameter(0)
  ROOT %rs = f32[8] reduce-scatter(%w), channel_id=1, replica_groups={{0,1}}, dimensions={0}
}

ENTRY %main (x: f32[16], y: f32[8,16], z: f32[16,4]) -> f32[8] {
  %x = f32[16] parameter(0)
  %y = f32[8,16] parameter(1)
  %z = f32[16,4] parameter(2)
  %zero = s32[] constant(0)
  %s = ((f32[16]), f32[8], u32[]) async-start(%x), calls=%wrapped
  %first = (s32[], f32[8,16], f32[16,4]) tuple(%zero, %y, %z)
  %u = ((f32[16]), f32[8], u32[]) async-update(%s)
  %loop = (s32[], f32[8,16], f32[16,4]) while(%first), condition=%more, body=%turn
  %r = f32[16] all-reduce(%x), channel_id=2, replica_groups={{0,1}}
  ROOT %e = f32[8] async-done(%u)
}
"""


def test_a_wrapped_collective_with_a_loop_behind_it():
    """GPU's form: the collective in a computation of its own; another is no work."""
    scattered, reduced = overlap(LOOPED)
    each = 2 * 8 * 16 * 4
    assert row(scattered) == ("reduce-scatter", "s", "e", (("loop", 5 * each),))
    assert row(reduced) == ("all-reduce", "r", "r", ())
    assert program_flops(LOOPED) == 5 * each


def test_text_in_no_order_is_refused():
    with pytest.raises(ValueError, match="not in scheduled order"):
        overlap(LOOPED.replace("is_scheduled=true, ", ""))
    assert overlap(jax.jit(lambda x: x + 1).lower(jnp.ones(3)).compile()) == []


def test_a_program_of_this_machine():
    """XLA's CPU back end splits nothing."""
    mesh = make_mesh({"data": 8})
    mapped = jax.shard_map(
        lambda x, w: (jax.lax.psum(x, "data"), x @ w),
        mesh=mesh,
        in_specs=(P("data"), P()),
        out_specs=(P(), P("data")),
    )
    compiled = jax.jit(mapped).lower(jnp.ones((8, 16)), jnp.ones((16, 4))).compile()
    (found,) = overlap(compiled, mesh)
    assert (found.collective.axes, found.between, found.flops) == (("data",), (), 0)


def counted(f, *shapes):
    """Our count and XLA's own, of the program as JAX wrote it."""
    lowered = jax.jit(f).lower(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes))
    module = hlo.parse(lowered.compiler_ir("hlo").as_hlo_text())
    ours = flops_of(module, hlo.Frame(module.computations[module.entry]))
    return ours, lowered.cost_analysis()["flops"]


@pytest.mark.parametrize(
    ("lhs", "rhs", "contract"),
    [
        ((8, 16), (16, 4), (((1,), (0,)), ((), ()))),
        ((3, 8, 16), (3, 16, 4), (((2,), (1,)), ((0,), (0,)))),
        ((5, 6, 7), (7, 6), (((1, 2), (1, 0)), ((), ()))),
    ],
)
def test_flops_of_a_product_are_xlas(lhs, rhs, contract):
    ours, xlas = counted(lambda a, b: jax.lax.dot_general(a, b, contract), lhs, rhs)
    assert ours == xlas > 0


@pytest.mark.parametrize(
    "options",
    [
        {"window_strides": (1, 1), "padding": "VALID"},
        {"window_strides": (2, 3), "padding": [(1, 2), (0, 3)]},
        {"window_strides": (1, 1), "padding": "SAME", "rhs_dilation": (2, 1)},
        {"window_strides": (1, 1), "padding": [(2, 2), (1, 0)], "lhs_dilation": (2, 3)},
        {"window_strides": (1, 1), "padding": "SAME", "feature_group_count": 2},
    ],
)
def test_flops_of_a_convolution_are_xlas(options):
    groups = options.get("feature_group_count", 1)
    dims = ("NHWC", "HWIO", "NHWC")
    ours, xlas = counted(
        lambda x, k: jax.lax.conv_general_dilated(x, k, dimension_numbers=dims, **options),
        (2, 9, 11, 4),
        (3, 2, 4 // groups, 6),
    )
    assert ours == xlas > 0
