"""What the code being traced will run on: the one place that asks."""

import jax
from jax.sharding import AxisType


def traced_for_tpu() -> bool:
    """Whether this is traced for TPU devices, those at hand or those of a topology compiled for.

    Read off the mesh around it, at trace time: the default backend is another one when compiling
    ahead of time, and a choice left to the compiler would trace both sides everywhere. Without a
    mesh (plain ``jax.jit``) the answer is no.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device is not None and device.platform == "tpu"


def kernels_run_here() -> bool:
    """Whether a Pallas kernel may be called: on TPU, inside ``shard_map``, every mesh axis manual.

    The partitioner cannot divide a kernel along an axis that is still automatic.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return traced_for_tpu() and all(t == AxisType.Manual for t in mesh.axis_types)
