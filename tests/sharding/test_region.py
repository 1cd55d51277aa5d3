"""Functions of one device's part, under rules."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdml.sharding import Rules, Without, make_mesh, no_mesh, use_rules
from jdml.sharding.region import alike, axes_of_name, manual, num_parts_of_name, platform

RULES = Rules(batch=("data", "fsdp"), seq="model", mlp="model", embed="fsdp").for_activations(
    embed=None
)


@pytest.fixture
def mesh():
    return make_mesh({"data": 2, "fsdp": 2, "model": 2})


def product(x, kernel):
    """Each device has a part of the hidden units, and says so."""
    assert kernel.shape == (6, 4)
    return jax.lax.psum(x @ kernel @ kernel.T, "model")


NAMES = [("batch", "embed"), ("embed", "mlp")], ("batch", "embed")


def test_values_and_gradients_are_those_of_one_device(mesh):
    x = jax.random.normal(jax.random.key(0), (3, 8, 6))
    kernel = jax.random.normal(jax.random.key(1), (6, 8))

    def loss(kernel, x):
        with use_rules(mesh, RULES, hide=("data",)):
            return jnp.sum(jnp.sin(manual(product, *NAMES)(x, kernel)))

    def plain(kernel, x):
        return jnp.sum(jnp.sin(x @ kernel @ kernel.T))

    def gradients(function, x, **options):
        mapped = jax.vmap(jax.value_and_grad(function, (0, 1)), (None, 0), **options)
        return jax.jit(mapped)(kernel, x)

    x = x[:2]
    got, wanted = gradients(loss, x, spmd_axis_name="data"), gradients(plain, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, wanted)


def test_what_names_stand_for(mesh):
    with use_rules(mesh, RULES, hide=("data",)):
        assert axes_of_name("batch") == ("fsdp",)
        assert num_parts_of_name("batch") == 2
        assert axes_of_name("embed") == ()  # as activations have it
        assert axes_of_name(Without("seq", "mlp")) == ()
        assert platform() == "cpu"
    short = make_mesh({"data": 8, "fsdp": 1, "model": 1})
    with use_rules(short, RULES):
        assert axes_of_name("batch") == ("data",)
        assert num_parts_of_name("mlp") == 1
    with no_mesh():
        assert axes_of_name("batch") == ()


def test_without_a_mesh_it_is_the_function():
    with no_mesh():
        assert manual(lambda x: x + 1, [("batch",)], ("batch",))(1) == 2


def test_refuses(mesh):
    with pytest.raises(ValueError, match="manual: no rules are in force"):
        manual(product, *NAMES)
    with use_rules(mesh, RULES):
        run = manual(product, *NAMES)
        with pytest.raises(ValueError, match=r"1 arguments, but names for 2"):
            run(jnp.ones((4, 6)))
        with pytest.raises(ValueError, match=r"argument 1.*expected 2 dims"):
            run(jnp.ones((4, 6)), jnp.ones(6))
        with pytest.raises(ValueError, match=r"argument 0.*does not divide"):
            run(jnp.ones((3, 6)), jnp.ones((6, 8)))


def test_types_made_alike(mesh):
    def body(x, y):
        x, y = alike(x, y)
        assert jax.typeof(x) == jax.typeof(y)
        return x * y

    with use_rules(mesh, RULES):
        run = jax.jit(manual(body, [("batch",), ("mlp",)], (("batch", "mlp"),)))
        assert run(jnp.ones(4), jnp.ones(2)).shape == (8,)
