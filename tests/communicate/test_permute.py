import itertools

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jdml.communicate.permute import permute
from jdml.sharding import make_mesh


@pytest.mark.parametrize("axes", [*itertools.permutations("abc")])
def test_workers_are_numbered_as_axis_index_does(axes):
    mesh = make_mesh({"c": 2, "a": 2, "b": 2})
    pairs = [(i, (i + 3) % 8) for i in range(7)]  # the last one sends nothing

    def body(x):
        return permute(x, axes, pairs), jax.lax.axis_index(axes)[None]

    moved, index = jax.jit(
        jax.shard_map(body, mesh=mesh, in_specs=P(axes), out_specs=(P(axes), P(axes)))
    )(np.arange(8.0))
    np.testing.assert_array_equal(index, np.arange(8))
    np.testing.assert_array_equal(moved, [5, 6, 0, 0, 1, 2, 3, 4])
