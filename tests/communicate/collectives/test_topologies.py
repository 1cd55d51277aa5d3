"""Every topology: equal results everywhere, exact without a codec, and errors that add up."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jdml.communicate import all_reduce_mean, error_feedback
from jdml.communicate.codecs import int8, random_k, top_k
from jdml.communicate.collectives.all_reduce import TOPOLOGIES
from jdml.sharding import make_mesh

CODECS = {"int8": int8(16), "top_k": top_k(0.1, values=int8(8)), "random_k": random_k(0.3)}
SHAPES = {2: (1, 2), 3: (3, 1), 4: (2, 2), 8: (4, 2)}
"""Workers along the slow and the fast axis."""


def mean_of(x, topology, codec=None, residual=None, key=None):
    """Every worker's ``(mean, residual)`` of leaves ``[K, ...]``; two axes where two are needed."""
    num_workers = len(jax.tree.leaves(x)[0])
    shape = {"slow": SHAPES[num_workers][0], "fast": SHAPES[num_workers][1]}
    axes = ("slow", "fast")
    if topology != "hierarchical":
        shape, axes = {"data": num_workers}, "data"
    mesh = make_mesh(shape, devices=jax.devices()[:num_workers])

    def body(x, residual, key):
        local, owed = jax.tree.map(lambda a: a[0], (x, residual))
        out = all_reduce_mean(local, axes, codec, topology, key=key, residual=owed)
        mean, rest = out if residual is not None else (out, None)
        assert not any(jax.typeof(leaf).mat.varying for leaf in jax.tree.leaves(mean))
        return jax.tree.map(lambda a: a[None], (mean, rest))

    in_specs, out_specs = (P(axes), P(axes), P()), P(axes)
    mapped = jax.shard_map(body, mesh=mesh, in_specs=in_specs, out_specs=out_specs)
    return jax.tree.map(np.asarray, jax.jit(mapped)(x, residual, key))


def draw(num_workers, size, seed=0):
    return np.random.default_rng(seed).standard_normal((num_workers, size), np.float32)


@pytest.mark.parametrize("num_workers", SHAPES)
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_without_a_codec_it_is_the_mean(topology, num_workers):
    x = {"odd": draw(num_workers, 37), "scalar": draw(num_workers, 1)[:, 0]}
    mean, _ = mean_of(x, topology)
    for name, leaf in x.items():
        for got in mean[name]:
            np.testing.assert_array_equal(got, mean[name][0])
            np.testing.assert_allclose(got, leaf.mean(0), atol=1e-6)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("num_workers", SHAPES)
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_residuals_average_to_what_the_mean_still_owes(topology, num_workers, codec):
    """For a second round too, which starts from residuals that are not zero."""
    x = {"a": draw(num_workers, 77), "b": draw(num_workers, 16, seed=1)}
    rest = jax.tree.map(np.zeros_like, x)
    for turn in range(2):
        said = jax.tree.map(np.add, x, rest)
        mean, rest = mean_of(
            x, topology, error_feedback(CODECS[codec]), rest, jax.random.key(turn)
        )
        for name in x:
            for got in mean[name]:
                np.testing.assert_array_equal(got, mean[name][0])
            owed = said[name].mean(0) - mean[name][0]
            np.testing.assert_allclose(rest[name].mean(0), owed, atol=2e-6 * num_workers)
            assert np.abs(owed).max() > 1e-4 or (SHAPES[num_workers][0] == 1)
