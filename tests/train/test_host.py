"""``make_step(optimizer_memory="pinned_host")``: the same numbers, the state in another memory."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jdml.aggregate import average_params, mean_gradients
from jdml.communicate import error_feedback
from jdml.communicate.codecs import int8
from jdml.sharding import make_mesh
from jdml.train import Checkpointer, host, make_step
from tests.train.problems import make_batch, pytree_problem

CHAINS = {
    "int8": lambda: optax.chain(mean_gradients("data", error_feedback(int8(16))), optax.adam(1e-2)),
    "local": lambda: optax.chain(optax.adam(1e-2), average_params("data", every=2)),
}


def build(memory, chain="int8", zero=1, steps_per_call=1, workers=2):
    mesh = make_mesh({"data": workers, "fsdp": 8 // workers})
    problem = pytree_problem(mesh)
    init, step = make_step(
        problem.loss_fn,
        CHAINS[chain](),
        mesh,
        specs=jax.tree.map(lambda _: P(), problem.params),
        batch_axes=("fsdp",),
        zero=zero,
        optimizer_memory=memory,
        steps_per_call=steps_per_call,
    )
    return functools.partial(init, problem.params, 0), init, step


def kinds(tree):
    return {x.sharding.memory_kind for x in jax.tree.leaves(tree)}


def arrays(state):
    """The optimiser's leaves that are no scalars, those of one worker each."""
    return [x for x in jax.tree.leaves(state.opt_state) if x.ndim > 1]


@pytest.mark.parametrize(
    ("chain", "zero", "steps_per_call"),
    [
        ("local", 0, 1),
        pytest.param("int8", 1, 1, marks=pytest.mark.slow),
        pytest.param("int8", 2, 2, marks=pytest.mark.slow),
        pytest.param("int8", 3, 1, marks=pytest.mark.slow),
    ],
)
def test_the_numbers_of_a_state_on_the_devices(chain, zero, steps_per_call):
    found = []
    for memory in ("device", "pinned_host"):
        start, _, step = build(memory, chain, zero, steps_per_call)
        state = start()
        for i in range(3):
            batch = make_batch(i)
            if steps_per_call > 1:
                batch = jax.tree.map(lambda x: jnp.stack([x] * steps_per_call), batch)
            state, metrics = step(state, batch)
            assert kinds(arrays(state)) == {"pinned_host"} or memory == "device"
        assert "pinned_host" not in kinds((state.params, state.step, metrics))
        found.append(jax.device_get((state.params, state.opt_state, metrics)))
    jax.tree.map(np.testing.assert_array_equal, *found)


@pytest.mark.slow
def test_a_checkpoint_comes_back_to_the_hosts_memory(tmp_path):
    """On as many workers; and on twice as many, for which residuals are moved."""
    start, _, step = build("pinned_host")
    state, _ = step(start(), make_batch(0))
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state, wait=True)
        after = jax.device_get(step(state, make_batch(1))[0].params)
        for workers in (2, 4):
            _, init, step = build("pinned_host", workers=workers)
            abstract = init.abstract(pytree_problem(make_mesh({"data": 2, "fsdp": 4})).params)
            resumed = checkpointer.restore(abstract).state
            assert kinds(arrays(resumed)) == {"pinned_host"}
            resumed, _ = step(resumed, make_batch(1))
            assert kinds(arrays(resumed)) == {"pinned_host"}
            if workers == 2:
                jax.tree.map(np.testing.assert_array_equal, resumed.params, after)


def test_refused(monkeypatch):
    with pytest.raises(ValueError, match=r"expected one of .'device', 'pinned_host'"):
        build("host")
    monkeypatch.setattr(host, "memory_kinds", lambda mesh: frozenset({"device"}))
    with pytest.raises(ValueError, match=r"\['device'\], and no 'pinned_host'. Use .*'device'"):
        build("pinned_host")


@pytest.mark.tpu_compile
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu not installed")
@pytest.mark.parametrize(("zero", "steps_per_call"), [(0, 1), (3, 2)])
def test_memory_of_a_device_on_tpu(zero, steps_per_call):
    """Adam's moments leave the device's arguments for the host's, to the byte."""
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices
    mesh = make_mesh({"data": 2, "fsdp": 4}, devices=devices)
    layers, width = 2, 512

    def loss_fn(params, batch, key):
        del key
        y = batch
        for layer in params.values():
            y = jnp.tanh(y @ layer)
        return jnp.mean(y**2), {}

    params = {str(i): jax.ShapeDtypeStruct((width, width), jnp.float32) for i in range(layers)}
    lead = (steps_per_call,) if steps_per_call > 1 else ()
    spec = P(*(None,) * len(lead), ("data", "fsdp"))
    batch = jax.ShapeDtypeStruct(
        (*lead, 64, width), jnp.float32, sharding=NamedSharding(mesh, spec)
    )

    def memory(kind):
        init, step = make_step(
            loss_fn,
            optax.chain(mean_gradients("data"), optax.adam(1e-3)),
            mesh,
            specs=dict.fromkeys(params, P()),
            batch_axes=("fsdp",),
            zero=zero,
            optimizer_memory=kind,
            steps_per_call=steps_per_call,
        )
        state = init.abstract(params)
        return step.lower(state, batch).compile().memory_analysis()

    here, there = memory("device"), memory("pinned_host")
    moments = 2 * layers * width * width * 4 // (4 if zero else 1)
    assert here.host_argument_size_in_bytes == here.host_output_size_in_bytes == 0
    assert there.host_argument_size_in_bytes == there.host_output_size_in_bytes == moments
    assert there.host_alias_size_in_bytes == moments
    assert here.argument_size_in_bytes - there.argument_size_in_bytes == moments
