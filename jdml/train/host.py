"""The optimiser's state in the host's memory from one step to the next.

A step fetches it for the update and sends it back, inside the compiled program, so that the
compiler can put the copies beside other work. Each leaf is divided as it would be on the device: a
device has its share in the memory of its own host. Scalars (counts, a loss scale) stay on the
device, for branches depend on them.

Reference: Ren et al., "ZeRO-Offload", 2021, arXiv:2101.06840, which also updates on the host; here
the device does.
"""

from typing import Any, Literal, get_args

import jax
from jax.sharding import Mesh, NamedSharding

PyTree = Any
Memory = Literal["device", "pinned_host"]
"""Where the optimiser's state is between steps."""

HOST = "pinned_host"


def check_memory(memory: str, mesh: Mesh) -> None:
    """Checks that there is such a memory, and that the devices reach it."""
    if memory not in get_args(Memory):
        raise ValueError(
            f"make_step: optimizer_memory={memory!r}; expected one of {get_args(Memory)}."
        )
    kinds = memory_kinds(mesh)
    if memory == HOST and HOST not in kinds:
        raise ValueError(
            f"make_step: optimizer_memory={memory!r}: the devices have memories {sorted(kinds)}, "
            f"and no {HOST!r}. Use optimizer_memory='device', and divide the state over more "
            "devices (zero=1) if it does not fit."
        )


def memory_kinds(mesh: Mesh) -> frozenset[str]:
    """Memories that devices of the mesh reach, as far as this process sees them."""
    return frozenset(m.kind for d in mesh.devices.flat for m in d.addressable_memories())


def placed_in(memory: Memory, state: PyTree, on_worker: PyTree) -> PyTree:
    """An abstract optimiser state with all but the scalars in this memory.

    Args:
      memory: Which.
      state: ``ShapeDtypeStruct``s with shardings.
      on_worker: The same without worker dims, where a scalar can be told.
    """
    if memory != HOST:
        return state

    def put(x: jax.ShapeDtypeStruct, own: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        if not own.ndim:
            return x
        sharding = NamedSharding(x.sharding.mesh, x.sharding.spec, memory_kind=HOST)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(put, state, on_worker)


def fetch(tree: PyTree, shardings: PyTree) -> PyTree:
    """What is in the host's memory, on the devices; inside ``jit``."""
    return jax.tree.map(
        lambda x, s: jax.device_put(x, jax.memory.Space.Device) if _on_host(s) else x,
        tree,
        shardings,
    )


def send_back(tree: PyTree, shardings: PyTree) -> PyTree:
    """The inverse of :func:`fetch`."""
    return jax.tree.map(lambda x, s: jax.device_put(x, s) if _on_host(s) else x, tree, shardings)


def constrain_on_device(tree: PyTree, shardings: PyTree) -> PyTree:
    """Layouts of what is on the devices; what is on the host got its own when it was sent there."""
    return jax.tree.map(
        lambda x, s: x if _on_host(s) else jax.lax.with_sharding_constraint(x, s), tree, shardings
    )


def _on_host(sharding: NamedSharding) -> bool:
    return sharding.memory_kind == HOST
