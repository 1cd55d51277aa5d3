import jax
import jax.numpy as jnp
import numpy as np

from jdml.communicate.wire import Wire, settle


def test_known_parameters_are_taken_unless_the_updates_were_changed():
    wire = Wire(key=None)
    params, updates, known = {"a": jnp.ones(2)}, {"a": jnp.full(2, 0.5)}, {"a": jnp.zeros(2)}
    settle(wire, updates, known)
    np.testing.assert_array_equal(wire.settled.apply(params, updates)["a"], known["a"])
    halved = jax.tree.map(lambda u: u / 2, updates)
    np.testing.assert_array_equal(wire.settled.apply(params, halved)["a"], 1.25)
    settle(None, updates, known)  # outside make_step there is none
