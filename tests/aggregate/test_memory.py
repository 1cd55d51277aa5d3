"""What every method keeps, as its docstring says, and what a compiled step needs besides."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jdml.aggregate
from jdml.communicate.frequency import delayed
from jdml.sharding import make_mesh
from jdml.train import make_step
from tests.aggregate.methods import METHODS

K = 4
INNER = 3  # adamw alone: the parameters and two moments
# What LLVM makes of a program changes nothing in its buffers: a third of the time to compile.
FAST_COMPILE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}

# Copies of the parameters that each device keeps beyond those of adamw alone.
KEPT = {
    "mean_gradients": 0,
    "mean_gradients int8": 0,
    "mean_gradients int8 with error feedback": 1,  # the residual
    "average_params H=1": 0,
    "average_params H=2": 0,
    "average_params int8 with error feedback": 2,  # the anchor, the residual
    "DiLoCo": 2,  # the anchor, the outer momentum
    "DiLoCo int8": 2,
    "adasum": 0,
    "backup_workers, one missing": 0,
    "backup_workers with error feedback": 1,
    "EASGD": 1,  # the centre
    "EASGD int8": 1,
    "consensus_admm": 2,  # z, the dual
    "consensus_admm int8 with error feedback": 3,
    "streaming DiLoCo": 2,
    "streaming DiLoCo, delayed and mixed": 3,  # and what left
    "parameter_server": -2 + 2 / K,  # moments in slices
    "parameter_server int8 with error feedback": -2 + 2 / K + 1 + 1 / K,  # both residuals
    "parameter_server, Downpour": -2 + 2 / K + 1 + 1 / K + 1,  # accrued, a slice, the server's
    "gossip": 0,
    "gossip, adapt then combine, one peer": 0,
    "gossip int8": 0,
    "choco": 2,  # the public copy, the pull
    "choco int8": 2,
    "push_sum": 0,
    "push_sum, directed": 0,
    "mean_gradients PowerSGD": 1,  # the residual; its factors are counted below
    "average_params PowerSGD": 2,
    "one_bit_adam, exact": 0,  # instead of adamw
    "one_bit_adam int8 with error feedback": 1,
    "zero_one_adam, exact": 2,  # local steps: the progress, the anchor
    "zero_one_adam int8 with error feedback": 1,
    "dgc, all sent": 2,  # the velocity, what is unsent
    "dgc": 2,
}

# Copies that a step needs while it runs beyond those of local training; of methods that differ.
WORKING = {
    "mean_gradients": 0,
    "average_params H=2": 1,
    "DiLoCo": 1,
    "adasum": 1.5,
    "backup_workers, one missing": 0,
    "EASGD": 1,
    "consensus_admm": 2,
    "streaming DiLoCo": 1,
    "streaming DiLoCo, delayed and mixed": 1.5,
    "parameter_server": 0.5,
    "parameter_server, Downpour": 2,
    "gossip": 3,
    "choco": 4,
    "push_sum": 2,
    "one_bit_adam, exact": 3,
    "zero_one_adam, exact": 3,
    "dgc, all sent": 1,
}

PARAMS = {
    "in": {"kernel": jnp.zeros((64, 96)), "bias": jnp.zeros(96)},
    "out": {"kernel": jnp.zeros((96, 64))},
    "scale": jnp.ones(()),
}
COPY = sum(x.nbytes for x in jax.tree.leaves(PARAMS))
BATCH = jax.ShapeDtypeStruct((K, 64), jnp.float32)  # next to nothing, so that gradients count


def loss_fn(params, batch, key):
    hidden = jnp.tanh(batch @ params["in"]["kernel"] + params["in"]["bias"])
    return jnp.mean((params["scale"] * (hidden @ params["out"]["kernel"])) ** 2), {}


def planned(tx):
    mesh = make_mesh({"data": K}, devices=jax.devices()[:K])
    init, step = make_step(loss_fn, tx, mesh)
    return init.abstract(PARAMS), step


def device_bytes(tree):
    return sum(
        int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
    )


def analysed(tx):
    state, step = planned(tx)
    return state, step.lower(state, BATCH).compile(FAST_COMPILE).memory_analysis()


@pytest.fixture(scope="module")
def plain():
    """A step of adamw on each worker's own model, nothing exchanged."""
    return analysed(optax.adamw(1e-2))[1]


def test_every_method_is_listed():
    assert set(KEPT) == set(METHODS)


DEAR = ("int8", "PowerSGD", "feedback", "dgc")


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow) if any(d in n for d in DEAR) else n for n in METHODS],
)
def test_keeps_as_many_copies_as_stated(name):
    state, _ = planned(METHODS[name].make(optax.adamw(1e-2)))
    copies = device_bytes(state) / COPY
    small = 0.06 if "PowerSGD" in name else 0.01  # its factors, of rank 2 and 4; counters
    assert INNER + KEPT[name] <= copies <= INNER + KEPT[name] + small


QUICK = ("mean_gradients", "average_params H=2", "parameter_server")


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in WORKING]
)
def test_a_compiled_step_holds_no_more(name, plain):
    state, memory = analysed(METHODS[name].make(optax.adamw(1e-2)))
    own = device_bytes(state)
    # Scalars and counters are filled up to a few bytes each.
    assert own <= memory.argument_size_in_bytes <= own + device_batch() + 0.01 * COPY
    # All of the state is updated in place; what comes out besides are metrics.
    assert memory.alias_size_in_bytes == pytest.approx(own, abs=0.01 * COPY)
    assert memory.output_size_in_bytes - memory.alias_size_in_bytes < 0.01 * COPY
    more = (memory.temp_size_in_bytes - plain.temp_size_in_bytes) / COPY
    assert more <= WORKING[name] + 0.1


def device_batch():
    return BATCH.size * BATCH.dtype.itemsize  # whole: it is not placed


def test_delay_keeps_a_copy_for_each_step():
    tx = optax.chain(delayed(jdml.aggregate.mean_gradients("data"), steps=2), optax.adamw(1e-2))
    state, memory = analysed(tx)
    assert device_bytes(state) / COPY == pytest.approx(INNER + 2, abs=0.01)
    assert memory.alias_size_in_bytes / COPY == pytest.approx(INNER + 2, abs=0.01)


@pytest.mark.parametrize(
    "factory",
    [
        "adasum",
        "average_params",
        "backup_workers",
        "bmuf",
        "choco",
        "consensus_admm",
        "dgc",
        "elastic_average",
        "gossip",
        "mean_gradients",
        "one_bit_adam",
        "parameter_server",
        "push_sum",
        "streaming_diloco",
        "zero_one_adam",
    ],
)
def test_says_what_it_keeps(factory):
    assert "State kept: " in getattr(jdml.aggregate, factory).__doc__
