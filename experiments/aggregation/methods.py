"""Every method of ``jdml.aggregate`` as one would first use it: one inner optimiser, no search."""

from collections.abc import Callable
from typing import NamedTuple

import optax

from jdml.aggregate import (
    adasum,
    average_params,
    backup_workers,
    bmuf,
    choco,
    consensus_admm,
    dgc,
    elastic_average,
    gossip,
    mean_gradients,
    one_bit_adam,
    parameter_server,
    push_sum,
    streaming_diloco,
    zero_one_adam,
)
from jdml.communicate import error_feedback
from jdml.communicate.codecs import int8, one_bit, power_sgd, top_k
from jdml.communicate.frequency import delayed
from jdml.communicate.pace import log_normal
from jdml.communicate.topology import random_pairs, ring

SGD, ADAM = 0.03, 2e-3
"""Learning rates: of SGD with momentum 0.9, and of Adam."""
EPSILON = 1e-4
"""Of Adam: signs move every element of a block alike, those of hardly any variance too."""
EVERY = 8
"""Steps from one exchange to the next, where a method has such a number."""


class Method(NamedTuple):
    """A chain, and what it keeps besides the parameters and what the optimiser would keep alone."""

    tx: Callable[[], optax.GradientTransformation]
    keeps: str = "nothing"


def momentum() -> optax.GradientTransformation:
    return optax.sgd(SGD, momentum=0.9)


def outer() -> optax.GradientTransformation:
    return optax.sgd(0.7, momentum=0.6, nesterov=True)


def first(method: optax.GradientTransformation) -> optax.GradientTransformation:
    """Gradients are exchanged, then a step is taken."""
    return optax.chain(method, momentum())


def last(method: optax.GradientTransformation) -> optax.GradientTransformation:
    """A step is taken, then models are mixed."""
    return optax.chain(momentum(), method)


FEEDBACK = error_feedback(one_bit())
OWN = "own models and momenta"

METHODS: dict[str, Method] = {
    "synchronous": Method(lambda: first(mean_gradients("data"))),
    "synchronous, a step late": Method(
        lambda: first(delayed(mean_gradients("data"))), "gradients of the last step"
    ),
    "synchronous, int8": Method(lambda: first(mean_gradients("data", int8()))),
    "synchronous, one bit + EF": Method(
        lambda: first(mean_gradients("data", FEEDBACK)), "residual"
    ),
    "synchronous, PowerSGD 2": Method(
        lambda: first(mean_gradients("data", power_sgd(2))), "residual, factors"
    ),
    "DGC, 1 %": Method(
        lambda: optax.chain(dgc("data", sparsity=0.99), optax.sgd(SGD)), "velocity, unsent"
    ),
    "1-bit Adam": Method(lambda: one_bit_adam("data", ADAM, 36, eps=EPSILON), "residual"),
    "0/1 Adam": Method(
        lambda: zero_one_adam("data", ADAM, 36, eps=EPSILON), "progress, anchor, residual"
    ),
    "Adasum": Method(lambda: first(adasum("data"))),
    "2 backup workers": Method(lambda: first(backup_workers("data", 2, log_normal(0.5)))),
    "parameter server": Method(lambda: parameter_server(momentum(), "data"), "1/K of the momentum"),
    "Downpour": Method(
        lambda: parameter_server(
            momentum(),
            "data",
            push_every=4,
            pull_every=EVERY,
            local=optax.sgd(SGD),
        ),
        "own models, accrued gradients, slices",
    ),
    "local SGD": Method(lambda: last(average_params("data", EVERY)), OWN),
    "BMUF": Method(lambda: last(bmuf("data", EVERY, 0.5)), f"{OWN}, anchor, block momentum"),
    "DiLoCo": Method(
        lambda: last(average_params("data", EVERY, outer())), f"{OWN}, anchor, outer momentum"
    ),
    "streaming DiLoCo": Method(
        lambda: last(streaming_diloco("data", EVERY, 2, outer(), delay=1, mixing=0.5)),
        f"{OWN}, anchor, outer momentum, what left",
    ),
    "EAMSGD": Method(lambda: last(elastic_average("data", EVERY, 0.9 / 8)), f"{OWN}, centre"),
    "consensus ADMM": Method(
        lambda: consensus_admm(momentum(), "data", rho=0.1, every=EVERY), f"{OWN}, z, dual"
    ),
    "gossip, ring": Method(lambda: last(gossip("data", ring)), OWN),
    "gossip, random pairs": Method(lambda: last(gossip("data", random_pairs(8, 8, seed=0))), OWN),
    "CHOCO, ring, 10 %": Method(
        lambda: last(choco("data", ring, top_k(0.1), 0.3)), f"{OWN}, public copy, what was heard"
    ),
    "push-sum": Method(lambda: last(push_sum("data")), f"{OWN}, weights"),
}

ENSEMBLES = {
    "alone: mean of models": "",
    "alone: ensemble": "all models, in use",
    "alone: vote": "all models, in use",
    "EC-DNN": "own models and momenta",
}
"""By ensembling: of models trained alone, how they are asked in the end; and by distillation."""
