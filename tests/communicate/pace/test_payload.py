"""What travels: encoded on push and on pull, and counted as it is."""

import functools

import jax
import numpy as np
import pytest

from jdml.communicate import error_feedback
from jdml.communicate.codecs import int8, one_bit, qsgd
from jdml.communicate.pace import Connection, Rule, Server, add, asynchronous, dc_asgd

SIZE = 512
START = {"b": np.zeros(3, np.float32), "w": np.zeros((2, SIZE // 2), np.float32)}


def noise(seed):
    draws = np.random.default_rng(seed)
    return {k: draws.standard_normal(x.shape).astype(np.float32) for k, x in START.items()}


@functools.partial(jax.jit, static_argnums=0)
def said(codec, x):
    """What the receiver reads."""
    return codec.decode(codec.encode(x))


def connected(**options):
    server = Server(START, Rule(asynchronous(), add()), 1, **options)
    return server, Connection(server, 0)


def push(line, update):
    base = line.pull().version
    seq, parcel = line.encode(update)
    line.push(seq, parcel, base)
    return parcel


@pytest.mark.parametrize("codec", [int8(64), one_bit(64), qsgd(8, 64)])
def test_bytes_are_those_of_the_arrays_that_travel(codec):
    server, line = connected(push=codec, pull=codec)
    parcel = push(line, noise(0))
    measured = sum(x.nbytes for x in jax.tree.leaves(parcel.content))
    filled = (3 + -3 % codec.granularity, SIZE)
    assert measured == sum(codec.payload_bytes(n) for n in filled)
    assert server.traffic.pushed_bytes == measured
    assert server.traffic.pulled_bytes == measured  # the same shapes, the same codec
    assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(parcel.content))


def test_without_a_codec_the_bytes_are_the_trees():
    server, line = connected()
    push(line, noise(0))
    assert server.traffic == (1, 4 * (SIZE + 3), 1, 4 * (SIZE + 3))


def test_the_server_adds_what_the_codec_says():
    codec = int8(64)
    server, line = connected(push=codec)
    update = noise(1)
    push(line, update)
    for k, x in update.items():
        np.testing.assert_array_equal(server.params[k], said(codec, x))


def test_a_worker_reads_what_the_codec_says_and_the_server_keeps_the_rest():
    codec = int8(64)
    server, line = connected(pull=codec)
    push(line, noise(2))
    read = line.pull()
    exact = server.params["w"]
    np.testing.assert_array_equal(read.params["w"], said(codec, exact))
    assert not np.array_equal(read.params["w"], exact)
    with pytest.raises(ValueError, match="read-only"):
        read.params["w"][0] = 0


def test_error_feedback_owes_one_rounds_error_and_no_more():
    """The server has the sum of the updates less what the worker still holds."""
    server, line = connected(push=error_feedback(one_bit(64)))
    total = {k: np.zeros_like(x) for k, x in START.items()}
    for t in range(30):
        update = noise(t)
        push(line, update)
        total = {k: total[k] + update[k] for k in total}
    residual = dict(zip(sorted(START), line.sender.residual, strict=True))
    for k in total:
        np.testing.assert_allclose(server.params[k] + residual[k], total[k], atol=1e-4)


def test_random_codecs_repeat_themselves_and_differ_by_worker_and_push():
    def sent(worker, seq, seed=0):
        server = Server(START, Rule(asynchronous(), add()), 1, push=qsgd(2, 64), seed=seed)
        content = server.sender(worker)(noise(0), seq).content
        return np.concatenate([x.ravel() for x in jax.tree.leaves(content)])

    first = sent(0, 0)
    np.testing.assert_array_equal(first, sent(0, 0))
    for other in (sent(1, 0), sent(0, 1), sent(0, 0, seed=1)):
        assert not np.array_equal(first, other)


def test_compensation_is_from_the_model_that_the_worker_read():
    """Where pulls are coded, w_base is what was read and not what the server had."""
    codec = int8(64)
    start = noise(3)
    server = Server(start, Rule(asynchronous(), dc_asgd(0.1, 1.0)), 1, pull=codec)
    line = Connection(server, 0)
    g = noise(4)
    read = line.pull()
    seq, parcel = line.encode(g)
    line.push(seq, parcel, read.version)
    for k in g:
        corrected = g[k] + g[k] * g[k] * (start[k] - read.params[k])
        np.testing.assert_allclose(server.params[k], start[k] - 0.1 * corrected, rtol=1e-5)
