"""Attention alone, over a divided sequence, compiled for a TPU slice; needs libtpu, no TPU."""

import functools
import importlib.util
from collections import Counter

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jdml.models.attention import divided_attention
from jdml.sharding import Rules, collectives, make_mesh, use_rules
from tests.models.attention.passes import with_gradients

pytestmark = [
    pytest.mark.tpu_compile,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu not installed"),
]

HEADS, KV_HEADS, SEQ, HEAD_DIM = 8, 4, 32_768, 128


def compile_both_passes(form, size):
    """One sequence for each row of ``size`` devices, in zig-zag order."""
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices
    rows = len(devices) // size
    mesh = make_mesh({"data": rows, "seq": size}, devices=devices)
    by_position = NamedSharding(mesh, P("data", None, "seq"))
    args = [
        jax.ShapeDtypeStruct((rows, n, SEQ, HEAD_DIM), jnp.bfloat16, sharding=by_position)
        for n in (HEADS, KV_HEADS, KV_HEADS, HEADS)
    ]

    def run(*args):
        with use_rules(mesh, Rules(batch="data", heads=None, kv_heads=None, seq="seq")):
            attend = functools.partial(divided_attention, form=form, order="zigzag")
            return with_gradients(attend)(*args)

    return jax.jit(run).lower(*args).compile(), mesh


@pytest.mark.parametrize("form", ["ring", "ulysses", "gather"])
def test_memory_falls_and_bytes_are_those_stated(form):
    temporaries, whole = [], []
    for size in (1, 2, 4):
        compiled, mesh = compile_both_passes(form, size)
        memory = compiled.memory_analysis()
        temporaries.append(memory.temp_size_in_bytes)
        whole.append(memory.argument_size_in_bytes + memory.temp_size_in_bytes)
        found = collectives(compiled, mesh)
        assert all(c.axes == ("seq",) and not c.conditional for c in found)
        sent = Counter()
        for c in found:
            sent[c.kind] += c.count * c.sent_bytes
        pair = 2 * KV_HEADS * SEQ // size * HEAD_DIM * 2
        queries = HEADS * SEQ // size * HEAD_DIM * 2
        slopes = HEADS * SEQ // size * 4
        # Keys and values in two passes, and in one their gradients, float32 or traded in bfloat16.
        stated = {
            "ring": {"collective-permute": (size - 1) * (2 * pair + 2 * pair)},
            "gather": {
                "all-gather": (size - 1) * 2 * pair,
                "reduce-scatter": (size - 1) * 2 * pair,
            },
            "ulysses": {"all-to-all": (size - 1) * (4 * queries + slopes + 3 * pair) // size},
        }
        assert sent == (stated[form] if size > 1 else {})
    assert temporaries[1] < 0.9 * temporaries[0]
    assert temporaries[2] < 0.9 * temporaries[1]
    assert whole[2] < 0.7 * whole[1] < 0.7**2 * whole[0]
