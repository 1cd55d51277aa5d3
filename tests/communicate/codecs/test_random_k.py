import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdml.communicate.codecs import int8, random_k
from tests.marks import slow

KEYS = jax.random.split(jax.random.key(0), 2000)


def gaussian(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def draws(codec, x):
    """``[key, element]``: what each key's receiver reads."""
    one = jax.jit(jax.vmap(lambda key: codec.decode(codec.encode(jnp.asarray(x), key))))
    return np.asarray(one(KEYS), np.float64)


@pytest.mark.parametrize(
    ("length", "k"), [(12, 3), slow(10, 7), slow(7, 7), slow(11, 1), slow(50, 0.3)]
)
def test_every_element_is_sent_with_probability_k_of_d(length, k):
    codec = random_k(k)
    sent = draws(codec, np.ones(length, np.float32))
    slots = codec.num_slots(length)
    assert set(np.unique(sent)) <= {0, 1}
    assert (sent.sum(1) == slots).all()  # k of them, none twice
    p = slots / length
    assert np.abs(sent.mean(0) - p).max() <= 5 * np.sqrt(p * (1 - p) / len(KEYS))
    if 1 < slots < length:
        assert len(np.unique(sent, axis=0)) > length


@pytest.mark.slow
def test_contracts_on_average_by_k_of_d_exactly():
    x = gaussian(40)
    error = ((draws(random_k(10), x) - x) ** 2).sum(1).mean()
    assert error == pytest.approx((1 - 10 / 40) * (x.astype(np.float64) ** 2).sum(), rel=0.02)


@pytest.mark.slow
def test_unbiased_by_d_of_k_with_the_stated_variance():
    x = gaussian(40)
    decoded = draws(random_k(10, unbiased=True), x)
    deviation = np.abs(x) * np.sqrt(40 / 10 - 1) / np.sqrt(len(KEYS))
    assert (np.abs(decoded.mean(0) - x) <= 5 * deviation).all()
    variance = ((decoded - x) ** 2).sum(1).mean()
    assert variance == pytest.approx((40 / 10 - 1) * (x.astype(np.float64) ** 2).sum(), rel=0.05)


def test_only_values_and_a_seed_travel():
    codec = random_k(0.01)
    encoded = codec.encode(gaussian(10_000), KEYS[0])
    assert encoded.nbytes == codec.payload_bytes(10_000) == 4 * 100 + 8
    assert random_k(100, int8(64)).payload_bytes(10_000) == int8(64).payload_bytes(128) + 8
    # The receiver has no key.
    decoded = np.asarray(codec.decode(encoded))
    assert (decoded != 0).sum() == 100


@pytest.mark.slow
def test_the_receivers_default_generator_does_not_matter():
    codec, x = random_k(10), jnp.asarray(gaussian(100))
    encoded = codec.encode(x, jax.random.key(1, impl="rbg"))
    before = jax.config.jax_default_prng_impl
    try:
        jax.config.update("jax_default_prng_impl", "unsafe_rbg")
        decoded = codec.decode(encoded)
    finally:
        jax.config.update("jax_default_prng_impl", before)
    np.testing.assert_array_equal(decoded, codec.decode(encoded))
    sent = np.asarray(decoded) != 0
    np.testing.assert_array_equal(decoded[sent], x[sent])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_seen_though_not_drawn(bad):
    x = gaussian(3, 1000)
    x[1, 77] = bad
    codec = random_k(2)
    for key in KEYS[:5]:
        decoded = codec.decode_rows(codec.encode_rows(jnp.asarray(x), key), 1000)
        assert np.isnan(decoded[1]).sum() >= 1
        assert np.isfinite(decoded[::2]).all()


def test_scaling_up_stops_at_the_largest_number():
    largest = np.finfo(np.float32).max
    decoded = draws(random_k(1, unbiased=True), np.asarray([largest, -largest]))
    assert set(np.unique(decoded)) == {float(-largest), 0.0, float(largest)}


def test_refuses_what_it_cannot_draw():
    with pytest.raises(ValueError, match=r"random_k\(k=0"):
        random_k(0)
    with pytest.raises(ValueError, match=r"random_k\(k=11\).*row of 10"):
        random_k(11).encode(jnp.ones(10), KEYS[0])
    with pytest.raises(ValueError, match="random numbers"):
        random_k(1).encode(jnp.ones(10))
    with pytest.raises(ValueError, match=r"random_k\(values="):
        random_k(1, values=8)
