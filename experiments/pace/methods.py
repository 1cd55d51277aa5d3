"""The paces by name, at one learning rate: what the server does, and what the workers push."""

import functools
from typing import NamedTuple

import optax

from jdml.communicate.pace import (
    Rule,
    add,
    asynchronous,
    average,
    backup,
    dc_asgd,
    stale_synchronous,
    synchronous,
)

_sgd = functools.cache(optax.sgd)  # one object, so that what is compiled for it serves all
_GRADIENTS = optax.identity()


class Method(NamedTuple):
    """A rule for the server, and a chain for the workers."""

    rule: Rule
    tx: optax.GradientTransformation


def method(name: str, num_workers: int, learning_rate: float, compensation: float = 0.04) -> Method:
    """All move the model by the learning rate times the mean gradient, once all N have pushed.

    Args:
      name: ``BSP``, ``SSP s = 4``, ``asynchronous``, ``DC-ASGD`` or ``backup b = 2``.
      num_workers: N.
      learning_rate: Of a clock.
      compensation: DC-ASGD's λ.

    Raises:
      ValueError: another name.
    """
    step, share = _sgd(learning_rate), 1 / num_workers
    kind, _, number = name.partition(" = ")
    if (kind in ("SSP s", "backup b")) != number.isdecimal():
        kind = ""
    if kind == "BSP":
        return Method(Rule(synchronous(), average()), step)
    if kind == "SSP s":
        return Method(Rule(stale_synchronous(int(number)), add(share)), step)
    if kind == "asynchronous":
        return Method(Rule(asynchronous(), add(share)), step)
    if kind == "DC-ASGD":  # the server steps, by what it makes of the gradients
        compensated = dc_asgd(learning_rate * share, compensation)
        return Method(Rule(asynchronous(), compensated), _GRADIENTS)
    if kind == "backup b":
        return Method(Rule(backup(int(number)), average()), step)
    raise ValueError(
        f"no method is called {name!r}; expected BSP, asynchronous, DC-ASGD, 'SSP s = 4' or "
        "'backup b = 2', with any number."
    )
