import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdml.communicate import Link, predict
from jdml.communicate.codecs import e3m0

BLOCK = 16
CODEC = e3m0(BLOCK)


@pytest.mark.parametrize("length", [2, 30, 34, 166])
def test_each_run_is_said_as_if_it_were_filled_up(length):
    rows = np.random.default_rng(length).standard_normal((3, length)).astype(np.float32)
    rows[2, -1] = np.nan

    @jax.jit
    def there_and_back(rows):
        payload = CODEC.encode_rows(rows)
        decoded = CODEC.decode_rows(payload, length)
        total, half = (CODEC.decode_sum(payload, length, n) for n in (1, 2))
        return payload, decoded, total, half

    payload, decoded, total, half = there_and_back(rows)
    num_bytes = sum(x.nbytes for x in jax.tree.leaves(payload))
    run = length // 2
    num_blocks = -(-run // BLOCK)
    assert num_bytes == 3 * CODEC.payload_bytes(length) == 3 * (run + 2 * num_blocks)
    runs = np.zeros((3, 2, BLOCK * num_blocks), np.float32)
    runs[:, :, :run] = rows.reshape(3, 2, run)
    whole = jax.jit(lambda x: CODEC.decode_rows(CODEC.encode_rows(x), x.shape[1]))
    expected = np.asarray(whole(runs.reshape(3, -1))).reshape(runs.shape)[:, :, :run]
    np.testing.assert_array_equal(decoded, expected.reshape(3, length))
    assert np.isnan(decoded[2, -1])
    assert np.isfinite(decoded[:2]).all()
    np.testing.assert_allclose(total, np.asarray(decoded).sum(0), rtol=1e-6)
    np.testing.assert_array_equal(half, total / 2)


def test_long_rows_are_filled_up_to_whole_blocks_and_short_ones_to_whole_bytes():
    codec = e3m0(512)
    assert [codec.whole(n) for n in (0, 1, 3596, 7191)] == [0, 2, 3596, 7192]
    assert codec.whole(600_000) == 1024 * 586
    for n in np.random.default_rng(0).integers(1, 1 << 21, 2000).tolist():
        length = codec.whole(n)
        assert codec.whole(length) == length
        assert length - n <= max(1, n / 512)
        exact = 4 * length + 8 * length / 512
        assert exact <= 8 * codec.payload_bytes(length) < exact + 16


def test_an_exchange_sends_no_more_than_its_elements():
    cost = predict("two_phase", 8, 28_768, e3m0(), Link(0.0, 1.0))
    assert cost.sent_bytes == 2 * 7 * (3596 // 2 + 2 * 4)
    assert jnp.isclose(2 * 7 / 8 * 4 * 28_768 / cost.sent_bytes, 8, rtol=0.005)
