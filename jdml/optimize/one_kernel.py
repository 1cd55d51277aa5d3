"""Sequential loops over samples as one kernel of the CPU."""

from collections.abc import Callable
from typing import Any

import jax
from jax.experimental.xla_metadata import set_xla_metadata


def one_kernel(f: Callable[..., Any]) -> Callable[..., Any]:
    """``f``, which XLA compiles to a single function for a CPU, loops and branches included.

    XLA dispatches what stands in the body of a loop operation by operation: some microseconds for
    each sample of a coordinate method, whose arithmetic takes fifty nanoseconds. A call with these
    attributes is left alone by XLA's inliner and goes through LLVM as a whole. Other back ends, and
    XLA should it forget the attributes, run ``f`` as it is written. The result is the same.

    What ``f`` must keep to:

    - No scatter, sort or library call (``dynamic_update_slice`` writes elements, a product is a
      multiplication and a sum). So ``vmap`` does not apply, which makes scatters of writes.
    - What is read of an array is read before the array is written to, by operations on which the
      writing depends; a ``lax.cond`` around the writing sees to that. Otherwise XLA copies the
      array at each step.
    - Every argument is used, and none comes back as it went in: XLA's compiler aborts on others.

    Args:
      f: A function of arrays, positional; ``jit`` knows a program by this object.
    """
    inner = jax.jit(f)

    def on_cpu(*args):
        with set_xla_metadata(xla_cpu_small_call="true", inlineable="false"):
            return inner(*args)

    def call(*args):
        return jax.lax.platform_dependent(*args, cpu=on_cpu, default=f)

    return call
