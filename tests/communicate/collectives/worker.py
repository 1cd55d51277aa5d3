"""One of four processes: every topology and collective over Gloo, against NumPy; silent if right.

Run by ``test_processes.py`` through ``jdml.launch``.
"""

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from jdml.communicate import (
    all_gather,
    all_reduce_mean,
    all_to_all,
    broadcast,
    error_feedback,
    reduce_scatter_mean,
)
from jdml.communicate.codecs import int8
from jdml.communicate.collectives.all_reduce import TOPOLOGIES
from jdml.sharding import initialize, make_mesh

K, SIZE = 4, 4 << 15  # a broadcast takes the chain: pieces of 32 KiB
AXES = ("slow", "fast")


def main() -> None:
    initialize()
    mesh = make_mesh({"slow": 2, "fast": 2})
    me = jax.process_index()
    x = np.random.default_rng(0).standard_normal((K, SIZE), np.float32)
    local = jax.make_array_from_process_local_data(jax.NamedSharding(mesh, P(AXES)), x[me : me + 1])

    def run(f, *args):
        body = lambda *a: jax.tree.map(lambda y: y[None], f(*(y[0] for y in a)))  # noqa: E731
        mapped = jax.shard_map(body, mesh=mesh, in_specs=P(AXES), out_specs=P(AXES))
        out = jax.block_until_ready(jax.jit(mapped)(*args))
        return jax.tree.map(lambda y: np.asarray(y.addressable_shards[0].data)[0], out)

    for topology in TOPOLOGIES:
        exact = run(lambda v: all_reduce_mean(v, AXES, None, topology), local)  # noqa: B023
        np.testing.assert_allclose(exact, x.mean(0), atol=1e-6, err_msg=topology)
        codec = error_feedback(int8())
        mean, owed = run(
            lambda v, e: all_reduce_mean(v, AXES, codec, topology, residual=e),  # noqa: B023
            local,
            jax.numpy.zeros_like(local),
        )
        # A few quantisations to 1/254 of the largest, of partial sums at most.
        np.testing.assert_allclose(mean, x.mean(0), atol=0.1, err_msg=topology)
        both = run(lambda m, e: all_reduce_mean((m, e), AXES), *_placed(mesh, mean, owed))
        np.testing.assert_array_equal(both[0], mean, err_msg=topology)  # so equal everywhere
        np.testing.assert_allclose(both[0] + both[1], x.mean(0), atol=1e-5, err_msg=topology)

    parts = x.reshape(K, K, -1)
    for f, expected, tolerance in [
        (lambda v: reduce_scatter_mean(v, AXES), parts[:, me].mean(0), 1e-6),
        (lambda v: all_gather(v, AXES), x.reshape(-1), 0),
        (lambda v: all_to_all(v, AXES), parts[:, me].reshape(-1), 0),
        (lambda v: broadcast(v, AXES, root=2), x[2], 0),
        (lambda v: reduce_scatter_mean(v, AXES, int8()), parts[:, me].mean(0), 0.02),
        (lambda v: all_gather(v, AXES, int8()), x.reshape(-1), 0.02),
        (lambda v: all_to_all(v, AXES, int8()), parts[:, me].reshape(-1), 0.02),
        (lambda v: broadcast(v, AXES, int8(), root=2), x[2], 0.02),
    ]:
        np.testing.assert_allclose(run(f, local), expected, rtol=0, atol=tolerance)


def _placed(mesh, *arrays):
    sharding = jax.NamedSharding(mesh, P(AXES))
    return [jax.make_array_from_process_local_data(sharding, a[None]) for a in arrays]


if __name__ == "__main__":
    main()
