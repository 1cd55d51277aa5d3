"""Bytes on the wire, against programs whose traffic is known by hand.

``hlo/*.txt`` are programs that libtpu 0.0.51 (jax 0.12.0.1) compiled for v5e:4x4, on a 4 × 2 × 2
mesh (a, b, c) or, for two slices, 8 × 4 (d, c), with source locations and most of the back end's
notes taken out.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jdml.sharding.compiled import Collective, bytes_per_axis, collectives

# Device ids differ from positions, so that reading ids where positions are meant shows.
PERMUTED = (3, 1, 0, 2, 7, 5, 6, 4)


def mesh_of(shape, names, order=range(8)):
    devices = np.array(jax.devices())[list(order)].reshape(shape)
    return Mesh(devices, names, axis_types=(AxisType.Auto,) * len(names))


def compile_mapped(body, mesh, *arguments, out=None):
    """``body`` on each device's 1/8 of the arguments."""
    spec = P(mesh.axis_names)
    mapped = jax.shard_map(
        body, mesh=mesh, in_specs=spec, out_specs=spec if out is None else out, check_vma=False
    )
    return jax.jit(mapped).lower(*arguments).compile()


def x_of(num_local, dtype=jnp.float32):
    return jax.ShapeDtypeStruct((8 * num_local,), dtype)


def only(listed):
    assert len(listed) == 1, listed
    return listed[0]


MESHES = {
    "2x2x2": ((2, 2, 2), ("a", "b", "c")),
    "4x2": ((4, 2), ("data", "model")),
}
AXES = [
    *[("2x2x2", axes) for axes in ["a", "b", "c", "ab", "bc", "ac", "abc"]],
    *[("4x2", axes) for axes in [("data",), ("model",), ("data", "model")]],
]


@pytest.mark.parametrize(("mesh_name", "axes"), AXES)
def test_five_kinds_over_every_choice_of_axes(mesh_name, axes):
    mesh = mesh_of(*MESHES[mesh_name], PERMUTED)
    axes = tuple(axes)
    n = int(np.prod([mesh.shape[a] for a in axes]))

    def body(x):
        ring = [(i, (i + 1) % n) for i in range(n)]
        return (
            jax.lax.psum(x, axes),
            jax.lax.all_gather(x[:40].astype(jnp.int8), axes, tiled=True),
            jax.lax.psum_scatter(x[:48], axes, tiled=True),
            jax.lax.all_to_all(x[:32].astype(jnp.uint8), axes, 0, 0, tiled=True),
            jax.lax.ppermute(x[:5].astype(jnp.int32), axes, ring),
        )

    listed = collectives(compile_mapped(body, mesh, x_of(64)), mesh)
    found = {c.kind: (c.axes, c.dtype, c.payload_bytes, c.sent_bytes, c.group_size) for c in listed}
    assert found == {
        "all-reduce": (axes, "f32", 256, 2 * 256 * (n - 1) // n, n),
        "all-gather": (axes, "s8", 40, 40 * (n - 1), n),
        "reduce-scatter": (axes, "f32", 192, 192 * (n - 1) // n, n),
        "all-to-all": (axes, "u8", 32, 32 * (n - 1) // n, n),
        "collective-permute": (axes, "s32", 20, 20, n),
    }
    assert len(listed) == 5
    whole = {c.kind: c.whole_bytes for c in listed if c.whole_bytes != c.payload_bytes}
    assert whole == {"all-gather": 40 * n}
    assert all(c.count == 1 and not c.conditional and not c.partial for c in listed)


def test_groups_are_positions_in_the_mesh_not_device_ids():
    mesh = mesh_of((2, 2, 2), ("a", "b", "c"), PERMUTED)
    item = only(collectives(compile_mapped(lambda x: jax.lax.psum(x, "c"), mesh, x_of(8)), mesh))
    assert item.groups == ((0, 1), (2, 3), (4, 5), (6, 7))


def test_a_mesh_that_lists_the_same_devices_in_another_order():
    mesh = mesh_of((2, 2, 2), ("a", "b", "c"), PERMUTED)
    turned = Mesh(mesh.devices.transpose(2, 0, 1), ("c", "a", "b"))
    sharded = jax.ShapeDtypeStruct(
        (64,), jnp.float32, sharding=NamedSharding(mesh, P(mesh.axis_names))
    )
    compiled = compile_mapped(lambda x: jax.lax.psum(x, ("a", "c")), mesh, sharded)
    assert only(collectives(compiled, turned)).axes == ("c", "a")


def test_without_a_mesh_axes_are_unknown_but_groups_and_bytes_are_not():
    mesh = mesh_of((4, 2), ("data", "model"))
    item = only(collectives(compile_mapped(lambda x: jax.lax.psum(x, "model"), mesh, x_of(8))))
    assert (item.axes, item.sent_bytes, item.groups[0]) == (None, 32, (0, 1))
    assert bytes_per_axis([item]) == {None: 32}


def test_part_of_an_axis():
    mesh = mesh_of((4, 2), ("data", "model"))

    def body(x):
        halves = [[0, 1], [2, 3]]
        return jax.lax.psum(x, "data", axis_index_groups=halves)

    item = only(collectives(compile_mapped(body, mesh, x_of(8)), mesh))
    assert (item.axes, item.partial, item.group_size) == (("data",), True, 2)
    assert item.sent_bytes == 32


def test_groups_that_no_product_of_axes_describes():
    attributes = "channel_id=1, replica_groups={{0,3},{1,2}}, use_global_device_ids=true"
    item = only(collectives(program("all-reduce", attributes), ABSTRACT))
    assert (item.axes, item.partial, item.group_size) == (("a", "b"), True, 2)


def test_permutations_that_send_nothing_or_form_chains():
    mesh = mesh_of((4, 2), ("data", "model"))
    still = [(i, i) for i in range(4)]
    item = only(
        collectives(
            compile_mapped(lambda x: jax.lax.ppermute(x, "data", still), mesh, x_of(8)), mesh
        )
    )
    assert (item.axes, item.group_size, item.sent_bytes) == ((), 1, 0)
    item = only(
        collectives(
            compile_mapped(lambda x: jax.lax.ppermute(x, "data", [(0, 1), (1, 2)]), mesh, x_of(8)),
            mesh,
        )
    )
    assert (item.axes, item.group_size, item.sent_bytes) == (("data",), 3, 32)


def test_one_fused_collective_with_several_operands():
    mesh = mesh_of((4, 2), ("data", "model"))
    compiled = compile_mapped(
        lambda x: jax.lax.psum((x, 2 * x, x[:3]), "data"), mesh, x_of(8), out=P()
    )
    item = only(collectives(compiled, mesh))
    assert item.dtypes == ("f32", "f32", "f32")
    assert sorted(item.operand_bytes) == [12, 32, 32]
    assert (item.dtype, item.payload_bytes, item.sent_bytes) == ("f32", 76, 114)


def test_the_dtype_is_the_one_on_the_wire():
    mesh = mesh_of((4, 2), ("data", "model"))

    def gathered(dtype):
        def body(x):
            return jax.lax.all_gather(x.astype(dtype), "data", tiled=True)

        item = only(collectives(compile_mapped(body, mesh, x_of(8)), mesh))
        return item.dtype, item.payload_bytes

    # XLA's CPU back end widens these: the compression would be a fiction.
    assert gathered(jnp.int4) == ("s8", 8)
    assert gathered(jnp.bfloat16) == ("f32", 32)
    assert gathered(jnp.float8_e4m3fn) == ("f16", 16)


# --- Loops and branches -----------------------------------------------------------------------


def nested(x):
    def body(carry, _):
        carry = jax.lax.fori_loop(0, 3, lambda i, y: jax.lax.psum(y, "a") * 0.5, carry)
        return jax.lax.ppermute(carry, "b", [(0, 1), (1, 0)]), None

    return jax.lax.scan(body, x, None, length=5)[0]


def without_trip_counts(text):
    """As a back end prints it that keeps XLA's analysis to itself."""
    stripped = re.sub(r'"known_trip_count":\{"n":"\d+"\}', '"x":{}', text)
    assert "known_trip_count" in text
    assert "known_trip_count" not in stripped
    return stripped


@pytest.mark.parametrize("read", [lambda t: t, without_trip_counts], ids=["told", "derived"])
def test_nested_loops_multiply(read):
    mesh = mesh_of((2, 2, 2), ("a", "b", "c"))
    listed = collectives(read(compile_mapped(nested, mesh, x_of(8)).as_text()), mesh)
    assert {(c.kind, c.loops, c.count) for c in listed} == {
        ("all-reduce", (5, 3), 15),
        ("collective-permute", (5,), 5),
    }
    assert bytes_per_axis(listed) == {("a",): 15 * 32, ("b",): 5 * 32}


@pytest.mark.parametrize(
    ("start", "stop", "step", "count"), [(2, 9, 1, 7), (1, 10, 3, 3), (10, 0, -2, 5), (0, 1, 1, 1)]
)
def test_trip_counts_derived_from_the_condition(start, stop, step, count):
    mesh = mesh_of((4, 2), ("data", "model"))

    def body(x):
        test = (lambda s: s[0] < stop) if step > 0 else (lambda s: s[0] > stop)
        return jax.lax.while_loop(
            test, lambda s: (s[0] + step, jax.lax.psum(s[1], "data")), (start, x)
        )[1]

    text = compile_mapped(body, mesh, x_of(8)).as_text()
    if count == 1:  # XLA unrolls it: nothing to derive
        assert only(collectives(text, mesh)).count == 1
    else:
        assert only(collectives(without_trip_counts(text), mesh)).loops == (count,)


def test_a_loop_that_ends_on_data_is_not_guessed():
    mesh = mesh_of((4, 2), ("data", "model"))

    def body(x):
        return jax.lax.while_loop(lambda y: jnp.sum(y) < 10, lambda y: jax.lax.psum(y, "data"), x)

    listed = collectives(compile_mapped(body, mesh, x_of(8)), mesh)
    item = only(listed)
    assert (item.loops, item.count) == ((None,), None)
    with pytest.raises(ValueError, match=r"all-reduce .* over \('data',\).*unknown_count"):
        bytes_per_axis(listed)
    assert bytes_per_axis(listed, unknown_count=4) == {("data",): 4 * 48}


def test_a_bound_that_is_an_argument_is_not_guessed():
    mesh = mesh_of((4, 2), ("data", "model"))
    mapped = jax.shard_map(
        lambda n, x: jax.lax.fori_loop(0, n, lambda i, y: jax.lax.psum(y, "data"), x),
        mesh=mesh,
        in_specs=(P(), P()),
        out_specs=P(),
        check_vma=False,
    )
    compiled = jax.jit(mapped).lower(jax.ShapeDtypeStruct((), jnp.int32), x_of(1)).compile()
    assert only(collectives(compiled, mesh)).count is None


def test_branches_are_marked():
    mesh = mesh_of((4, 2), ("data", "model"))

    def body(x):
        def turn(carry, i):
            exchanged = jax.lax.cond(
                i % 2 == 0, lambda y: jax.lax.psum(y, "model"), lambda y: y, carry
            )
            return exchanged, None

        x = jax.lax.pmax(x, "data")
        return jax.lax.scan(turn, x, jnp.arange(6))[0]

    listed = collectives(compile_mapped(body, mesh, x_of(8)), mesh)
    assert {(c.axes, c.conditional, c.count) for c in listed} == {
        (("data",), False, 1),
        (("model",), True, 6),
    }


def test_a_branch_is_told_by_what_runs_it():
    """Also where XLA left an instruction without the name that JAX gave it."""
    mesh = mesh_of((4, 2), ("data", "model"))

    def body(x):
        def often(y):
            return jax.lax.fori_loop(0, 3, lambda _, z: jax.lax.psum(z * z, "model"), y)

        with jax.named_scope("branch.exchange"):
            return jax.lax.cond(x[0] > 0, often, lambda y: jax.lax.pmax(y, "data"), x)

    text = compile_mapped(body, mesh, x_of(8)).as_text()
    bare = [
        re.sub(r"metadata=\{[^}]*\}", "", line) if "all-reduce" in line else line
        for line in text.splitlines()
    ]
    for program in (text, "\n".join(bare)):
        listed = collectives(program, mesh)
        assert {(c.axes, c.branches) for c in listed} == {
            (("model",), (("exchange", 1),)),
            (("data",), (("exchange", 0),)),
        }


def test_what_the_partitioner_inserts():
    mesh = mesh_of((4, 2), ("data", "model"))

    def put(shape, spec):
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))

    def loss(w, x):
        return jnp.sum((x @ w) ** 2)

    compiled = (
        jax.jit(jax.grad(loss), out_shardings=NamedSharding(mesh, P(None, "model")))
        .lower(put((16, 32), P(None, "model")), put((8, 16), P("data", None)))
        .compile()
    )
    item = only(collectives(compiled, mesh))
    # Each device holds the gradient of its own half of the columns; the rows are summed.
    assert (item.kind, item.axes, item.payload_bytes) == ("all-reduce", ("data",), 16 * 16 * 4)

    gathered = (
        jax.jit(lambda x: x + 1, out_shardings=NamedSharding(mesh, P()))
        .lower(put((8, 16), P("data", "model")))
        .compile()
    )
    sent = bytes_per_axis(collectives(gathered, mesh))
    assert sum(sent.values()) == 7 * 2 * 8 * 4  # seven others' 2 × 8 floats, by whatever route


# --- Text forms -------------------------------------------------------------------------------

ABSTRACT = AbstractMesh((2, 2), ("a", "b"))


def program(opcode, attributes, num_partitions=4, replicas=""):
    return f"""HloModule m, {replicas}num_partitions={num_partitions}

ENTRY %main (p: f32[8]) -> f32[8] {{
  %p = f32[8]{{0}} parameter(0), metadata={{op_name="replica_groups={{{{9,9}}}} )"}}
  ROOT %r = f32[8]{{0}} {opcode}(%p), {attributes}, metadata={{op_name="a(b"}}
}}
"""


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        ("{{0,1},{2,3}}", ("b",)),
        ("{{0,2},{1,3}}", ("a",)),
        ("{}", ("a", "b")),
        ("[2,2]<=[4]", ("b",)),
        ("[2,2]<=[2,2]T(1,0)", ("a",)),
        ("[1,4]<=[4]", ("a", "b")),
        ("mesh['x'=2,'y'=2] {'x'}", ("a",)),
        ("mesh['x'=2,'y'=2] {'y'}", ("b",)),
        ("mesh['x'=4] {'x':(1)2}", ("a",)),
        ("mesh['x'=4] {'x':(2)2}", ("b",)),
        ("mesh['x'=2,'y'=2], device_ids=([2,2]T(1,0)) {'x'}", ("b",)),
        ("mesh['x'=2,'y'=2], device_ids=(0,2,1,3) {'x','y'}", ("a", "b")),
        ("@mesh<x=2,y=2> {y}", ("b",)),
    ],
)
def test_group_notations(groups, axes):
    attributes = f"channel_id=1, replica_groups={groups}, use_global_device_ids=true, to_apply=%add"
    assert only(collectives(program("all-reduce", attributes), ABSTRACT)).axes == axes


def test_sub_axes_of_a_larger_axis():
    mesh = AbstractMesh((2, 2, 2), ("a", "b", "c"))
    for groups, axes in {
        "mesh['x'=8] {'x':(2)2}": ("b",),
        "mesh['x'=8] {'x':(1)2,'x':(4)2}": ("a", "c"),
        "mesh['x'=8] {'x':(2)4}": ("b", "c"),
        "mesh['u'=4,'v'=2] {'u':(2)2,'v'}": ("b", "c"),
    }.items():
        text = program("all-reduce", f"channel_id=1, replica_groups={groups}", 8)
        text = text.replace("channel_id=1", "channel_id=1, use_global_device_ids=true")
        assert only(collectives(text, mesh)).axes == axes, groups


def test_an_unknown_group_notation_is_an_error():
    with pytest.raises(ValueError, match="expected replica_groups as"):
        collectives(program("all-reduce", "channel_id=1, replica_groups=torus(2)"))


def test_groups_of_replicas_and_of_partitions():
    # Without a channel a collective runs among replicas; of a program with none, it moves nothing.
    assert only(collectives(program("all-reduce", "replica_groups={{0}}"))).sent_bytes == 0
    text = program("all-reduce", "replica_groups={{0,1}}", 2, "replica_count=2, ")
    assert only(collectives(text)).groups == ((0, 2), (1, 3))
    # With one, but without global ids, an all-reduce joins all partitions of the replicas.
    text = text.replace("replica_groups", "channel_id=1, replica_groups")
    assert only(collectives(text)).groups == ((0, 1, 2, 3),)


GPU_FORMS = """HloModule m, num_partitions=4

%wrapped (q: f32[8]) -> f32[2] {
  %q = f32[8]{0} parameter(0)
  ROOT %rs = f32[2]{0} reduce-scatter(%q), channel_id=2, replica_groups={{0,1,2,3}}, \
use_global_device_ids=true, dimensions={0}, to_apply=%add
}

%body (t: (s32[], f32[8])) -> (s32[], f32[8]) {
  %t = (s32[], f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %x = f32[8]{0} get-tuple-element(%t), index=1
  %start = ((f32[8]{0}), f32[2]{0}) async-start(%x), calls=%wrapped
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %done = f32[2]{0} async-done(%start), calls=%wrapped
  %ag = (f32[2]{0}, f32[8]{0}) all-gather-start(%done), channel_id=3, replica_groups=[1,4]<=[4], \
dimensions={0}, use_global_device_ids=true
  %y = f32[8]{0} all-gather-done(%ag)
  ROOT %out = (s32[], f32[8]{0}) tuple(%next, %y)
}

%condition (t.1: (s32[], f32[8])) -> pred[] {
  %t.1 = (s32[], f32[8]{0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%t.1), index=0
  %x.1 = f32[8]{0} get-tuple-element(%t.1), index=1
  %m = f32[8]{0} all-reduce(f32[8]{0} %x.1), channel_id=9, replica_groups={{0,1,2,3}}, \
use_global_device_ids=true, to_apply=%add
  %last = s32[] constant(8)
  ROOT %go = pred[] compare(%last, %i.1), direction=GE
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  %zero = s32[] constant(1)
  %init = (s32[], f32[8]{0}) tuple(%zero, %p)
  %loop = (s32[], f32[8]{0}) while(%init), condition=%condition, body=%body
  %z = f32[8]{0} get-tuple-element(%loop), index=1
  %ar = f32[8]{0} all-reduce-start(%z), channel_id=4, replica_groups={{0,1},{2,3}}, \
use_global_device_ids=true, to_apply=%add
  %ard = f32[8]{0} all-reduce-done(%ar)
  ROOT %cb = f32[8]{0} collective-broadcast(%ard), channel_id=5, replica_groups={{0,2},{1,3}}
}
"""


def test_starts_are_counted_once_and_a_condition_once_more_than_its_loop():
    listed = collectives(GPU_FORMS, ABSTRACT)
    assert [(c.kind, c.axes, c.payload_bytes, c.sent_bytes, c.count) for c in listed] == [
        ("all-reduce", ("a", "b"), 32, 48, 9),
        ("reduce-scatter", ("a", "b"), 32, 24, 8),
        ("all-gather", ("a", "b"), 8, 24, 8),
        ("all-reduce", ("b",), 32, 32, 1),
        ("collective-broadcast", ("a",), 32, 32, 1),
    ]
    assert [c.asynchronous for c in listed] == [False, True, True, True, False]


# --- What TPU's compiler prints ---------------------------------------------------------------

V5E = AbstractMesh((4, 2, 2), ("a", "b", "c"))


def excerpt(name):
    return (Path(__file__).parent / "hlo" / f"{name}.txt").read_text()


def row(c: Collective):
    return c.kind, c.axes, c.dtype, c.payload_bytes, c.sent_bytes, c.count, c.asynchronous


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # No known_trip_count on TPU: derived, through the widened loop states.
        (
            "nested_loops",
            [
                ("all-reduce", ("a",), "f32", 16384, 24576, 15, False),
                ("collective-permute", ("b",), "f32", 16384, 16384, 5, True),
            ],
        ),
        # The gather stands in three fusions: where it starts, meanwhile, and where it is awaited.
        ("async_fusion", [("all-gather", ("a",), "bf16", 2**23, 3 * 2**23, 1, True)]),
        ("async_all_to_all", [("all-to-all", ("a",), "bf16", 2**23, 3 * 2**21, 1, True)]),
        # f32 twice in one, bf16 alone.
        (
            "tuple_psum",
            [
                ("all-reduce", ("a", "c"), "bf16", 8192, 14336, 1, False),
                ("all-reduce", ("a", "c"), "f32", 32768, 57344, 1, False),
            ],
        ),
        # Packed: half a byte for each of 4096 elements.
        ("int4_gather", [("all-gather", ("a",), "s4", 2048, 6144, 1, False)]),
        # An all-reduce fused with the slice that each device keeps, padded to 4 × 528 rows, and
        # what then must move by a neighbour.
        (
            "fused_reduce_scatter",
            [
                ("reduce-scatter", ("a",), "bf16", 2112 * 4096, 2112 * 3072, 1, False),
                ("collective-permute", ("a",), "bf16", 48 * 4096, 48 * 4096, 1, True),
            ],
        ),
    ],
)
def test_tpu_text(name, expected):
    assert [row(c) for c in collectives(excerpt(name), V5E)] == expected


@dataclass(frozen=True)
class SliceDevice:
    id: int
    slice_index: int
    process_index: int = 0
    platform: str = "tpu"


def two_slices():
    """Two slices of v5e:4x4 in the order in which JAX lists their devices."""
    local = [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]
    devices = [SliceDevice(100_000 * (s + 1) + d, s) for s in range(2) for d in local]
    return Mesh(np.array(devices).reshape(8, 4), ("d", "c"))


def test_tpu_chain_that_starts_before_a_loop_is_counted_once():
    """What computes meanwhile may be a loop: each turn repeats the collective in its text."""
    before, name, after = excerpt("async_fusion").partition("ENTRY ")
    kind = r"(%fusion.4 = )(\(.*?\)) fusion\(.*(calls=%async_collective_fusion.4)"
    loop = (
        r"\1\2 while(%async-collective-start), condition=%turns, body=%turn, "
        r'backend_config={"known_trip_count":{"n":"8"}}'
    )
    shape = re.search(kind, after)[2]
    after = re.sub(kind + ".*", loop, after)
    before += (
        f"%turn (p: {shape}) -> {shape} {{\n  %p = {shape} parameter(0)\n"
        f"  ROOT %f = {shape} fusion(%p), kind=kCustom, calls=%async_collective_fusion.4\n}}\n\n"
        f"%turns (q: {shape}) -> pred[] {{\n  %q = {shape} parameter(0)\n"
        f"  ROOT %r = pred[] constant(true)\n}}\n\n"
    )
    (found,) = collectives(before + name + after)
    assert (found.kind, found.loops, found.count) == ("all-gather", (), 1)


def test_tpu_slices_exchange_through_the_host():
    listed = collectives(excerpt("two_slices"), two_slices())
    rows = [(c.kind, c.axes, c.partial, c.sent_bytes, c.between_slices) for c in listed]
    mib = 2**20
    assert rows == [
        ("reduce-scatter", ("d",), True, 3 * mib, False),
        ("all-reduce", ("d",), True, 1 * mib, True),
        ("all-gather", ("d",), True, 3 * mib, False),
    ]
    assert listed[0].groups[0] == (0, 4, 8, 12)
    assert listed[1].groups[0] == (0, 16)


def test_tpu_ring_through_two_slices():
    across, inside = collectives(excerpt("two_slices_ring"), two_slices())
    assert (across.kind, across.axes, across.between_slices) == ("collective-permute", ("d",), True)
    assert set(across.groups) >= {(12, 16), (28, 0)}
    assert (inside.axes, inside.between_slices, inside.groups[0]) == (("d",), False, (0, 4))


@pytest.mark.tpu_compile
def test_compile_for_tpu():
    pytest.importorskip("libtpu", reason="libtpu is not installed: pip install libtpu")
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:4x4")
    mesh = Mesh(np.array(topology.devices).reshape(4, 2, 2), ("a", "b", "c"))
    sharded = NamedSharding(mesh, P(mesh.axis_names))
    x = jax.ShapeDtypeStruct((16 * 4096,), jnp.float32, sharding=sharded)
    listed = collectives(compile_mapped(nested, mesh, x), mesh)
    assert {(c.kind, c.axes, c.dtype, c.payload_bytes, c.count) for c in listed} == {
        ("all-reduce", ("a",), "f32", 16384, 15),
        ("collective-permute", ("b",), "f32", 16384, 5),
    }


# --- Errors -----------------------------------------------------------------------------------


def test_a_lowered_program_is_refused():
    mesh = mesh_of((4, 2), ("data", "model"))
    lowered = jax.jit(lambda x: x).lower(x_of(1))
    with pytest.raises(ValueError, match="compile"):
        collectives(lowered, mesh)


def test_another_mesh_is_refused():
    mesh = mesh_of((4, 2), ("data", "model"))
    compiled = compile_mapped(lambda x: jax.lax.psum(x, "data"), mesh, x_of(8))
    small = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "model"))
    with pytest.raises(ValueError, match="mesh"):
        collectives(compiled, small)


def test_a_program_on_one_device_says_nothing():
    assert collectives(jax.jit(lambda x: x + 1).lower(x_of(1)).compile()) == []
