"""What a worker of CoCoA does alone in a round: it ascends the dual on the samples that it has."""

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jdml.optimize.dual.ascent import Samples
from jdml.optimize.dual.sdca import local_sdca
from jdml.optimize.dual.sdna import maximise_block


class LocalSolver(Protocol):
    """A frozen object that ascends a worker's subproblem.

    ``(loss, samples, weight [n_k], alpha [n_k], u [d], seed, sigma) -> (Δα, Δu)``, as
    ``local_sdca``: it maximises, about, the dual along ``α_k`` alone with ``σ'`` times the
    curvature, and ``Δu = Σ_i scale_i Δα_i x_i`` is without σ'.
    """

    def __call__(
        self,
        loss: Any,
        samples: Samples,
        weight: jax.Array,
        alpha: jax.Array,
        u: jax.Array,
        seed: jax.Array,
        sigma: jax.Array | float,
    ) -> tuple[jax.Array, jax.Array]: ...


@dataclasses.dataclass(frozen=True)
class LocalSDCA:
    """``passes`` permutations of the worker's samples by SDCA."""

    passes: int = 1

    def __post_init__(self) -> None:
        _check_passes("LocalSDCA", self.passes)

    def __call__(self, loss, samples, weight, alpha, u, seed, sigma):
        return local_sdca(loss, samples, alpha, u, self.passes * len(alpha), seed, sigma)


@dataclasses.dataclass(frozen=True)
class LocalSDNA:
    """``passes`` over the worker's samples, ``block`` neighbours at a time, by SDNA's step.

    A worker with fewer samples than ``block`` takes all at once: its subproblem's maximum.
    """

    block: int = 32
    passes: int = 1

    def __post_init__(self) -> None:
        _check_passes("LocalSDNA", self.passes)
        if self.block < 1:
            raise ValueError(f"LocalSDNA(block={self.block}): expected at least 1.")

    def __call__(self, loss, samples, weight, alpha, u, seed, sigma):
        stretched = samples._replace(scale=sigma * samples.scale, q=sigma * samples.q)
        n, size = len(alpha), min(self.block, len(alpha))
        order = jnp.resize(jnp.arange(n), (-(-n // size), size))

        def one(carry, chosen):
            alpha, ahead = carry
            rows = samples.rows.take(chosen)
            part = stretched._replace(
                rows=rows,
                y=samples.y[chosen],
                scale=stretched.scale[chosen],
                q=stretched.q[chosen],
            )
            new = maximise_block(loss, part, weight[chosen], alpha[chosen], ahead)
            ahead = ahead + rows.rmatvec(part.scale * (new - alpha[chosen]))
            return (alpha.at[chosen].set(new), ahead), None

        order = jnp.tile(order, (self.passes, 1))
        (new, ahead), _ = jax.lax.scan(one, (alpha, u), order)
        return new - alpha, (ahead - u) / sigma


def _check_passes(name: str, passes: int) -> None:
    if not (isinstance(passes, (int, np.integer)) and passes >= 1):
        raise ValueError(f"{name}(passes={passes!r}): expected a whole number >= 1.")
