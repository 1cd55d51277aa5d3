import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jdml.communicate import all_reduce_mean, error_feedback
from jdml.communicate.codecs import int8, random_k, threshold, top_k
from jdml.sharding import collectives, make_mesh


def gaussian(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def from_bits(bits):
    return np.asarray(bits, np.uint32).view(np.float32)


@functools.cache
def compiled(codec):
    return jax.jit(lambda x: codec.decode(codec.encode(x)))


def round_trip(codec, x):
    return np.asarray(compiled(codec)(x))


def magnitudes(x):
    return np.asarray(x, np.float32).view(np.uint32) & 0x7FFFFFFF


def check_largest(decoded, x, k):
    """Each is 0 or as it was, and those that are as they were are k of the largest."""
    sent = magnitudes(decoded) > 0
    np.testing.assert_array_equal(decoded[sent].view(np.uint32), x[sent].view(np.uint32))
    largest = np.sort(magnitudes(x))[::-1][:k]
    np.testing.assert_array_equal(np.sort(magnitudes(decoded[sent]))[::-1], largest[largest > 0])


@pytest.mark.parametrize(
    ("length", "k"),
    [
        (1, 1),
        (33, 1.0),
        (1000, 0.01),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [(1000, 1), (1000, 0.3), (20_000, 0.01), (20_000, 0.3)]
        ),
    ],
)
def test_keeps_the_largest(length, k):
    x = gaussian(length, seed=length)
    codec = top_k(k)
    check_largest(round_trip(codec, x), x, codec.num_slots(length))


@pytest.mark.parametrize(
    "sampled", [pytest.param("alike", marks=pytest.mark.slow), "all zero", "all large", "all equal"]
)
def test_a_sample_that_tells_nothing_costs_time_alone(sampled):
    """Long rows have their bound guessed from every fifth element (327,680 // 65,536)."""
    x = gaussian(5 * 65_536)
    if sampled == "all zero":
        x[::5] = 0
    elif sampled == "all large":
        x[::5] += 100
    elif sampled == "all equal":
        x[::5] = 2.5
    codec = top_k(0.01)
    check_largest(round_trip(codec, x), x, codec.num_slots(x.size))


@pytest.mark.parametrize("k", [5, pytest.param(300, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "values",
    [
        [1.0],
        [1.0, -1.0, 2.0, 0.0],
        [0.0] * 100 + [1e-3],
        list(from_bits([1, 2, 3, 0x7FFFFF, 0x800000, 0x80000001])),  # subnormal and next to it
        [3e38, -3e38, 1e-38],
    ],
)
def test_ties_zeros_and_extremes(k, values):
    """Both with few candidates (k = 5) and without; what has equals is not sent twice or too often.

    ``check_largest`` counts what is sent.
    """
    x = np.resize(np.asarray(values, np.float32), 3000)
    np.random.default_rng(0).shuffle(x)
    check_largest(round_trip(top_k(k), x), x, k)


@pytest.mark.parametrize("block", [pytest.param(None, marks=pytest.mark.slow), 1024])
def test_nan_comes_before_infinity_and_that_before_all_numbers(block):
    x = gaussian(2048)
    x[[3, 700, 900]] = [np.inf, np.finfo(np.float32).max, -np.inf]
    x[[5, 6]] = from_bits([0x7FC00000, 0xFFFFFFFF])
    decoded = round_trip(top_k(2, block=block), x)
    assert np.isnan(decoded[[5, 6]]).all()
    assert not decoded[:5].any()
    decoded = round_trip(top_k(4, block=block), x)
    np.testing.assert_array_equal(decoded[[3, 900]], [np.inf, -np.inf])
    assert decoded[700] == 0
    every = np.full(4096, from_bits([0x7FFFFFFF])[0])
    assert np.isnan(round_trip(top_k(7, block=block), every)).sum() == (7 if block is None else 28)


def test_of_each_block_the_largest():
    x = gaussian(3 * 96) * np.repeat([1, 100, 0.01], 96).astype(np.float32)
    codec = top_k(5, block=96)
    decoded = round_trip(codec, x)
    for part, whole in zip(decoded.reshape(3, 96), x.reshape(3, 96), strict=True):
        check_largest(part, whole, 5)
    assert codec.num_slots(3 * 96) == 15
    # A leaf that ends within a block: zeros fill it up and are not sent.
    check_largest(round_trip(codec, x[:100])[96:], x[96:100], 5)


@pytest.mark.parametrize("block", [pytest.param(None, marks=pytest.mark.slow), 128])
def test_contracts_by_k_of_d_and_no_more_where_all_are_equal(block):
    for x in (gaussian(1024), gaussian(1024) ** 5, np.sign(gaussian(1024))):
        error = ((round_trip(top_k(1 / 16, block=block), x) - x).astype(np.float64) ** 2).sum()
        bound = (1 - 1 / 16) * (x.astype(np.float64) ** 2).sum()
        assert error <= bound * (1 + 1e-6)
    assert error == pytest.approx(bound)


def test_values_go_through_their_codec_in_the_order_of_their_places():
    """Forty values in blocks of 16: the last block is filled up and comes back cut."""
    x, values = gaussian(2000), int8(16)
    codec = top_k(40, values)
    sent = np.argsort(-np.abs(x))[:40]
    sent = sent[np.argsort(sent // 63 + 1000 * (sent % 63))]  # bit i of word w: element 63 i + w
    expected = np.zeros_like(x)
    expected[sent] = round_trip(values, x[sent])
    np.testing.assert_array_equal(round_trip(codec, x), expected)
    bytes_of_values = values.payload_bytes(48)
    assert codec.payload_bytes(2000) == top_k(40).payload_bytes(2000) - 4 * 40 + bytes_of_values


def test_rows_are_chosen_from_by_themselves_and_summed_at_once():
    rows = gaussian(3, 3000) * np.asarray([[1], [1e-20], [1e20]], np.float32)
    codec = top_k(100)
    payload = codec.encode_rows(jnp.asarray(rows))
    decoded = np.asarray(codec.decode_rows(payload, 3000))
    for part, whole in zip(decoded, rows, strict=True):
        check_largest(part, whole, 100)
    np.testing.assert_allclose(codec.decode_sum(payload, 3000), decoded.sum(0), rtol=1e-6)


def test_sums_without_making_rows():
    codec, length = top_k(10), 4096
    payload = jax.eval_shape(codec.encode_rows, jnp.zeros((7, length)))
    traced = jax.make_jaxpr(lambda p: codec.decode_sum(p, length))(payload)
    assert max(v.aval.size for e in traced.jaxpr.eqns for v in e.outvars) == length


def test_one_percent_in_int8_costs_under_three_bytes_per_element_sent():
    codec, length = top_k(0.01, int8()), 1 << 22
    assert codec.payload_bytes(length) / codec.num_slots(length) < 2.2
    # Four workers that gather all payloads, beside a ring all-reduce of f32.
    assert 3 * codec.payload_bytes(length) / (2 * 3 / 4 * 4 * length) < 0.012


def test_mean_over_workers_owes_what_its_residuals_hold():
    mesh = make_mesh({"data": 4}, devices=jax.devices()[:4])
    codec = error_feedback(top_k(0.125))

    def body(x, e):
        mean, e = all_reduce_mean(x[0], "data", codec, residual=e[0])
        return mean, e[None]

    specs = {"in_specs": P("data"), "out_specs": (P(), P("data"))}
    step = jax.jit(jax.shard_map(body, mesh=mesh, **specs))
    x, e, total = gaussian(4, 1001), np.zeros((4, 1001), np.float32), 0
    for i in range(1, 6):
        mean, e = step(x, e)
        total = total + np.asarray(mean)
        np.testing.assert_allclose(total + np.mean(e, axis=0), i * x.mean(0), atol=1e-4)
    compiled = step.lower(x, e).compile()
    found = collectives(compiled, mesh)
    assert {d for c in found for d in c.dtypes} <= {"u8", "s8"}
    assert sum(c.sent_bytes for c in found) == 2 * 3 * codec.codec.payload_bytes(251)


@pytest.mark.parametrize("k", [0, -1, 0.0, 1.5, float("nan"), True, "10", None])
def test_refuses_an_amount_that_is_neither_a_count_nor_a_part(k):
    with pytest.raises(ValueError, match=r"top_k\(k=.*expected an int >= 1.*or a float in \(0, 1"):
        top_k(k)


def test_one_element_and_all_of_them_are_two_codecs():
    """Though 1 == 1.0: programs are cached by codec."""
    for one, every in ((top_k(1), top_k(1.0)), (random_k(1), random_k(1.0))):
        assert one != every
    assert threshold(0, 1) != threshold(0, 1.0)
    x = gaussian(33)
    assert (round_trip(top_k(1), x) != 0).sum() == 1
    np.testing.assert_array_equal(round_trip(top_k(1.0), x), x)


def test_refuses_more_than_there_are_and_odd_arguments():
    codec = top_k(11)
    for attempt in (
        lambda: codec.encode(jnp.ones(10)),
        lambda: jax.eval_shape(codec.encode_rows, jnp.ones((2, 10))),
        lambda: codec.payload_bytes(10),
    ):
        with pytest.raises(ValueError, match=r"k=11.*a row of 10 elements.*give a fraction"):
            attempt()
    with pytest.raises(ValueError, match=r"k=65.*row of 64"):
        top_k(65, block=64)
    for block in (0, 100, 64.0):
        with pytest.raises(ValueError, match="multiple of 32"):
            top_k(1, block=block)
    with pytest.raises(ValueError, match="forget to call the factory"):
        top_k(1, values=int8)
