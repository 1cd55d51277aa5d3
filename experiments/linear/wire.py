"""Bytes of a round: what the compiled step says on the wire, and how often its loops run.

``collectives`` lists what a step sends on a mesh, and how often, save for branches and for loops
that end when something is reached: conjugate gradients, line searches. How often those ran is
counted where the same step is taken without a mesh: each product with X or Xᵀ and each objective
calls back.
"""

import collections
import functools
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from jdml.optimize import Method
from jdml.sharding import Collective, collectives

SAMPLES, FEATURES = "data", "model"
LIGHTLY = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
"""What LLVM would optimise is left out of programs that are only read or counted in."""
SCALARS = 64
"""Bytes up to which a payload is no vector but some scalars."""


class Wire(NamedTuple):
    """What one step sends, per device.

    Attributes:
      known: Bytes of collectives that run a known number of times.
      known_products: How many of them are sums of margins, and of parameters.
      others: Bytes for each product more, in a branch or a loop of unknown length: of margins, of
        parameters; and of the scalars there.
    """

    known: int
    known_products: tuple[int, int]
    others: tuple[float, float, float]

    @property
    def wants_counting(self) -> bool:
        return any(self.others)

    def sent(self, counts: collections.Counter[str]) -> int:
        """Bytes of a round in which products and objectives were computed so many times.

        A loop's scalars are taken to run as often as anything in the round, which is the most.
        """
        margins = max(counts["margins"] - self.known_products[0], 0)
        parameters = max(counts["parameters"] - self.known_products[1], 0)
        scalars = max(margins, parameters, counts["objectives"])
        times = margins, parameters, scalars
        return self.known + round(sum(n * b for n, b in zip(times, self.others, strict=True)))


def wire_of(method: Method, problem: Any, mesh: Mesh) -> Wire:
    """Of a step on a problem that is on the mesh; it is compiled and not run."""
    state = first_state(method, problem)
    step = jax.jit(method.step).lower(problem, state)
    compiled = step.compile(compiler_options=LIGHTLY)
    known, products = 0, [0, 0]
    others, places = [0, 0, 0], [0, 0, 1]
    for found in collectives(compiled, mesh):
        kind = _kind(found)
        # XLA makes one all-reduce of several sums that are ready together.
        num_sums = (
            sum(b > SCALARS for b in found.operand_bytes) if found.kind == "all-reduce" else 0
        )
        if found.count is None or found.conditional:
            others[kind] += found.sent_bytes
            places[kind] += num_sums
        else:
            known += found.count * found.sent_bytes
            if kind < 2:
                products[kind] += found.count * num_sums
    # Where products stand in several loops, each has its share of what these send.
    each = [sent / max(number, 1) for sent, number in zip(others, places, strict=True)]
    return Wire(known, (products[0], products[1]), (each[0], each[1], each[2]))


def _kind(found: Collective) -> int:
    """0: along the features, 1: along the samples, 2: scalars."""
    if found.payload_bytes <= SCALARS:
        return 2
    return 0 if FEATURES in (found.axes or ()) else 1


def first_state(method: Method, problem: Any) -> Any:
    return method.seeded(jax.jit(method.init, compiler_options=LIGHTLY)(problem, problem.init()))


class Tally:
    """Counts of what was called while compiled programs ran."""

    def __init__(self) -> None:
        self.counts: collections.Counter[str] = collections.Counter()

    def note(self, name: str) -> None:
        """In a traced function: one more of that name, each time that this place is passed."""
        jax.debug.callback(functools.partial(self._add, name))

    def _add(self, name: str) -> None:
        self.counts[name] += 1

    def take(self) -> collections.Counter[str]:
        """What was counted since the last call."""
        jax.effects_barrier()
        found, self.counts = self.counts, collections.Counter()
        return found


class _Delegates:
    """Has what the object inside has."""

    def __init__(self, inside: Any, tally: Tally) -> None:
        self.inside, self.tally = inside, tally

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.inside, name)


class CountedRows(_Delegates):
    """Rows whose products are counted, by what is summed of them: margins or parameters."""

    def matvec(self, w: jax.Array) -> jax.Array:
        self.tally.note("margins")
        return self.inside.matvec(w)

    def rmatvec(self, v: jax.Array) -> jax.Array:
        self.tally.note("parameters")
        return self.inside.rmatvec(v)

    def squared_norms(self) -> jax.Array:
        self.tally.note("margins")
        return self.inside.squared_norms()

    def gram(self, weights: jax.Array) -> jax.Array:
        self.tally.note("parameters")
        return self.inside.gram(weights)


class CountedProblem(_Delegates):
    """A problem whose objectives are counted, and the products of whose rows."""

    def loss_at(self, margins: jax.Array) -> jax.Array:
        self.tally.note("objectives")
        return self.inside.loss_at(margins)


for _cls in (CountedRows, CountedProblem):
    jax.tree_util.register_pytree_node(
        _cls, lambda x: ((x.inside,), x.tally), lambda tally, x, cls=_cls: cls(x[0], tally)
    )


def counted(problem: Any, tally: Tally) -> CountedProblem:
    return CountedProblem(problem.replace(rows=CountedRows(problem.rows, tally)), tally)
