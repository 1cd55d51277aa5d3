"""How programs are compiled: as users' are, or without what LLVM optimises, which is sooner."""

import contextlib
from collections.abc import Iterator

import jax


@contextlib.contextmanager
def compiling_lightly(lightly: bool) -> Iterator[None]:
    """XLA's own passes run in any case."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", lightly)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)
