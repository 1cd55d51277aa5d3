"""Predicted bytes against those in the compiled program."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from jdml.communicate import (
    Link,
    all_gather,
    all_reduce_mean,
    all_to_all,
    broadcast,
    error_feedback,
    predict,
    reduce_scatter_mean,
)
from jdml.communicate.codecs import int8, power_sgd, top_k
from jdml.communicate.collectives.all_reduce import TOPOLOGIES
from jdml.sharding import collectives, make_mesh

LINK = Link(latency=1e-3, bandwidth=1e6)
CODECS = {"exact": None, "int8": int8(16), "top_k": top_k(0.05, values=int8(8))}
COLLECTIVES = {
    "all_gather": all_gather,
    "reduce_scatter": reduce_scatter_mean,
    "all_to_all": all_to_all,
    "broadcast": broadcast,
}
SLOW_AND_FAST = {2: (2, 1), 3: (1, 3), 4: (2, 2), 8: (4, 2)}


def carried(exchange, axes, shape, size):
    """Bytes that the device that sends most sends, by axes, in the compiled program."""
    mesh = make_mesh(dict(zip(axes, shape, strict=True)), devices=jax.devices()[: _product(shape)])
    mapped = jax.shard_map(
        lambda x: exchange(x, axes if len(axes) > 1 else axes[0]),
        mesh=mesh,
        in_specs=P(axes),
        out_specs=P(axes),
    )
    x = jax.ShapeDtypeStruct((mesh.size * size,), jnp.float32)
    sent = {}
    for item in collectives(jax.jit(mapped).lower(x).compile(), mesh):
        per_device = sent.setdefault(item.axes, [0] * mesh.size)
        permutes = item.kind == "collective-permute"
        assert permutes or item.dtype in ("u8", "s8", "f32")
        senders = [a for a, b in item.groups if a != b] if permutes else range(mesh.size)
        for device in senders:
            per_device[device] += item.sent_bytes * item.count
    return {names: max(per_device) for names, per_device in sent.items()}


def _product(shape):
    return shape[0] * (shape[1] if len(shape) > 1 else 1)


@pytest.mark.parametrize(
    ("codec", "num_workers"),
    [
        ("exact", 3),
        ("exact", 4),
        ("int8", 3),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [("int8", 2), ("int8", 8), ("top_k", 4)]
        ),
    ],
)
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_all_reduce_carries_the_bytes_predicted(topology, num_workers, codec):
    size, words = 24 * 50, CODECS[codec]
    axes, shape = ("data",), (num_workers,)
    if topology == "hierarchical":
        axes, shape = ("slow", "fast"), SLOW_AND_FAST[num_workers]
    found = carried(lambda x, axis: all_reduce_mean(x, axis, words, topology), axes, shape, size)
    cost = predict(topology, shape if len(shape) > 1 else num_workers, size, words, LINK)
    for name, expected in zip(axes, cost.bytes_per_axis, strict=True):
        assert found.pop((name,), 0) == expected
    assert not sum(found.values())


@pytest.mark.parametrize(
    ("codec", "num_workers"),
    [("exact", 3), ("exact", 4), ("int8", 3), pytest.param("int8", 8, marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("name", COLLECTIVES)
def test_other_collectives_carry_the_bytes_predicted(name, num_workers, codec):
    # Long enough that a broadcast takes the chain; payloads of whole lines, not filled up.
    size, words = 24 * 3072, CODECS[codec]
    found = carried(
        lambda x, axis: COLLECTIVES[name](x, axis, words), ("data",), (num_workers,), size
    )
    assert found == {("data",): predict(name, num_workers, size, words, LINK).sent_bytes}


def test_a_vector_that_is_short_or_long_costs_what_theory_says():
    """Latency alone: log2 K hops against 2 (K-1). Bandwidth alone: 2 (K-1)/K n against log2 K n."""
    slow_start, thin = Link(1.0, 1e30), Link(0.0, 1.0)
    assert predict("tree", 64, 100, None, slow_start).seconds == pytest.approx(6)
    assert predict("ring", 64, 100, None, slow_start).seconds == pytest.approx(126)
    assert predict("ring", 64, 6400, None, thin).seconds == pytest.approx(2 * 63 / 64 * 25600)
    assert predict("tree", 64, 6400, None, thin).seconds == pytest.approx(6 * 25600)
    for pattern in ("two_phase", "reduce_scatter"):
        exact = predict(pattern, 8, 1 << 16, None, thin)
        int8_block = predict(pattern, 8, 1 << 16, int8(256), thin)
        assert int8_block.seconds / exact.seconds == pytest.approx((1 + 4 / 256) / 4)
    # The chain sends little more than one payload; the tree one for each doubling.
    assert predict("broadcast", 64, 1 << 26, None, thin).seconds < 1.13 * 4 * (1 << 26)
    assert predict("broadcast", 64, 1000, None, thin).seconds == pytest.approx(6 * 4000)


def test_slow_and_fast_links_are_timed_apart():
    slow, fast = Link(1.0, 10.0), Link(0.0, 1000.0)
    cost = predict("hierarchical", (2, 4), 800, None, (slow, fast))
    # 2 hops of a half chunk of 200 elements each across; 2 * 3/4 of the vector inside.
    assert cost.bytes_per_axis == (800, 4800)
    assert cost.link_seconds == pytest.approx(2 * 1.0 + 800 / 10 + 4800 / 1000)


def test_coding_takes_time_where_its_rate_is_known():
    cost = predict("all_gather", 4, 1000, int8(), LINK, codec_rate=1e4)
    assert cost.codec_seconds == pytest.approx((1 + 4) * 4000 / 1e4)
    assert cost.seconds == cost.link_seconds + cost.codec_seconds
    assert predict("all_gather", 4, 1000, None, LINK, codec_rate=1e4).codec_seconds == 0


@pytest.mark.parametrize("pattern", [*TOPOLOGIES, *COLLECTIVES])
def test_a_lone_worker_pays_nothing(pattern):
    num_workers = (1, 1) if pattern == "hierarchical" else 1
    cost = predict(pattern, num_workers, 100, int8(), LINK, codec_rate=1.0)
    assert (cost.num_hops, cost.sent_bytes, cost.seconds) == (0, 0, 0)


def test_error_feedback_sends_nothing_more():
    alone = predict("ring", 4, 1000, int8(), LINK)
    assert predict("ring", 4, 1000, error_feedback(int8()), LINK) == alone


def test_refuses_what_cannot_work():
    for arguments, message in [
        (("star", 4, 10, None, LINK), "'star' is not one of"),
        (("hierarchical", 4, 10, None, LINK), r"takes \(slow, fast\)"),
        (("ring", (2, 2), 10, None, LINK), "one of each"),
        (("ring", 0, 10, None, LINK), "num_workers=0"),
        (("ring", 4, 0, None, LINK), "num_elements=0"),
        (("ring", 4, 10, None, LINK, 0.0), "codec_rate=0.0"),
        (("ring", 4, 10, power_sgd(4), LINK), "depends on the shapes"),
        (("ring", 4, 10, int8, LINK), "forget to call"),
    ]:
        with pytest.raises(ValueError, match=message):
            predict(*arguments)
    with pytest.raises(ValueError, match="200 Mbit/s"):
        Link(1e-3, 0.0)
