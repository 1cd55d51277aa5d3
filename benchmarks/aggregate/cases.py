"""Every method beside the hand-written steps that it is to keep up with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from benchmarks.aggregate.hand import Exchange, Hand, PyTree
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
from jdml.communicate import all_reduce_mean, error_feedback
from jdml.communicate.codecs import one_bit, top_k
from jdml.communicate.frequency import delayed
from jdml.communicate.pace import log_normal
from jdml.communicate.topology import ring

AXIS = "data"
LEARNING_RATE = 1e-3
NUM_FRAGMENTS = 2


class Case(NamedTuple):
    """A method, and what each of its steps in turn is compared with.

    Attributes:
      tx: The whole chain.
      phases: Names in ``HANDS``, one for each step of a cycle; ``"alone"``: no exchange is due.
      optimizer: Of the hand-written steps.
    """

    tx: Callable[[], optax.GradientTransformation]
    phases: tuple[str, ...]
    optimizer: str = "adamw"


def adamw() -> optax.GradientTransformation:
    return optax.adamw(LEARNING_RATE)


def momentum() -> optax.GradientTransformation:
    return optax.sgd(LEARNING_RATE, momentum=0.9)


def outer() -> optax.GradientTransformation:
    return optax.sgd(0.7, momentum=0.9, nesterov=True)


OPTIMIZERS = {"adamw": adamw, "sgd": momentum}


def first(method: optax.GradientTransformation) -> optax.GradientTransformation:
    return optax.chain(method, adamw())


def last(method: optax.GradientTransformation) -> optax.GradientTransformation:
    return optax.chain(adamw(), method)


def fragments(params: PyTree) -> PyTree:
    """Leaves by turns, largest first, so that the fragments are about equal."""
    leaves, treedef = jax.tree.flatten(params)
    order = sorted(range(len(leaves)), key=lambda i: -leaves[i].size)
    ids = [0] * len(leaves)
    sizes = [0] * NUM_FRAGMENTS
    for i in order:
        ids[i] = sizes.index(min(sizes))
        sizes[ids[i]] += leaves[i].size
    return jax.tree.unflatten(treedef, ids)


def mean(tree: PyTree, kept: PyTree) -> tuple[PyTree, PyTree]:
    return jax.lax.pmean(tree, AXIS), kept


def mean_of_fragment(number: int) -> Exchange:
    def exchange(tree: PyTree, kept: PyTree) -> tuple[PyTree, PyTree]:
        def one(x: jax.Array, fragment: int) -> jax.Array:
            return jax.lax.pmean(x, AXIS) if fragment == number else x

        return jax.tree.map(one, tree, fragments(tree)), kept

    return exchange


def neighbours(*shifts: int) -> Exchange:
    """The mean with the workers at these distances, who send what they have."""

    def exchange(tree: PyTree, kept: PyTree) -> tuple[PyTree, PyTree]:
        num = jax.lax.axis_size(AXIS)

        def one(x: jax.Array) -> jax.Array:
            total = x
            for shift in shifts:
                pairs = [(i, (i + shift) % num) for i in range(num)]
                total = total + jax.lax.ppermute(x, AXIS, pairs)
            return total / (1 + len(shifts))

        return jax.tree.map(one, tree), kept

    return exchange


def chunks_and_back(tree: PyTree, kept: PyTree) -> tuple[PyTree, PyTree]:
    """Each worker gets its chunk of all, adds them, and says the sum: Adasum's two collectives."""

    def one(x: jax.Array) -> jax.Array:
        num = jax.lax.axis_size(AXIS)
        rows = jnp.pad(x.reshape(-1), (0, -x.size % num)).reshape(num, -1)
        mine = jnp.mean(jax.lax.all_to_all(rows, AXIS, 0, 0, tiled=True), axis=0)
        return jax.lax.all_gather(mine, AXIS, tiled=True)[: x.size].reshape(x.shape)

    return jax.tree.map(one, tree), kept


def slices_and_back(tree: PyTree, kept: PyTree) -> tuple[PyTree, PyTree]:
    """Each worker gets the mean of its slice of every leaf, and says it: a push and a pull."""

    def one(x: jax.Array) -> jax.Array:
        num = jax.lax.axis_size(AXIS)
        vector = jnp.pad(x.reshape(-1), (0, -x.size % num))
        mine = jax.lax.psum_scatter(vector, AXIS, tiled=True) / num
        return jax.lax.all_gather(mine, AXIS, tiled=True)[: x.size].reshape(x.shape)

    return jax.tree.map(one, tree), kept


def compressed(codec: Any, topology: str) -> Exchange:
    """The library's collective in a step of one's own: what the method adds to it is measured."""

    def exchange(tree: PyTree, kept: PyTree) -> tuple[PyTree, PyTree]:
        return all_reduce_mean(tree, AXIS, codec, topology, residual=kept)

    return exchange


def zeros(params: PyTree) -> PyTree:
    return jax.tree.map(jnp.zeros_like, params)


SIGNS = error_feedback(one_bit())
LARGEST = error_feedback(top_k(0.001), two_sided=False)

HANDS: dict[str, Hand] = {
    "alone": Hand(),
    "mean of gradients": Hand(gradients=mean, own_models=False),
    "mean of parameters": Hand(params=mean),
    "mean of fragment 0": Hand(params=mean_of_fragment(0)),
    "mean of fragment 1": Hand(params=mean_of_fragment(1)),
    "two neighbours": Hand(params=neighbours(1, -1)),
    "one neighbour": Hand(params=neighbours(1)),
    "all-to-all, all-gather": Hand(gradients=chunks_and_back, own_models=False),
    "reduce-scatter, all-gather": Hand(gradients=slices_and_back, own_models=False),
    "signs of gradients": Hand(compressed(SIGNS, "two_phase"), kept=zeros, own_models=False),
    "signs of parameters": Hand(params=compressed(SIGNS, "two_phase"), kept=zeros),
    "largest of gradients": Hand(compressed(LARGEST, "all_gather"), kept=zeros, own_models=False),
}

AVERAGING = ("alone", "mean of parameters")

CASES: dict[str, Case] = {
    "mean_gradients": Case(lambda: first(mean_gradients(AXIS)), ("mean of gradients",)),
    "delayed mean_gradients": Case(
        lambda: first(delayed(mean_gradients(AXIS))), ("mean of gradients",)
    ),
    "backup_workers": Case(
        lambda: first(backup_workers(AXIS, 1, log_normal(0.5))), ("mean of gradients",)
    ),
    "adasum": Case(lambda: first(adasum(AXIS)), ("all-to-all, all-gather",)),
    "dgc": Case(
        lambda: optax.chain(dgc(AXIS, 0.999), optax.sgd(LEARNING_RATE)),
        ("largest of gradients",),
        "sgd",
    ),
    "one_bit_adam": Case(lambda: one_bit_adam(AXIS, LEARNING_RATE, 1), ("signs of gradients",)),
    "zero_one_adam": Case(
        lambda: zero_one_adam(AXIS, LEARNING_RATE, 1, double_every=1, max_interval=2),
        ("signs of parameters", "alone"),
    ),
    "average_params": Case(lambda: last(average_params(AXIS, 2)), AVERAGING),
    "average_params, outer (DiLoCo)": Case(
        lambda: last(average_params(AXIS, 2, outer())), AVERAGING
    ),
    "bmuf": Case(lambda: last(bmuf(AXIS, 2)), AVERAGING),
    "streaming_diloco": Case(
        lambda: last(streaming_diloco(AXIS, 4, NUM_FRAGMENTS, outer(), fragment_of=fragments)),
        ("alone", "mean of fragment 0", "alone", "mean of fragment 1"),
    ),
    "streaming_diloco, delayed": Case(
        lambda: last(
            streaming_diloco(
                AXIS, 4, NUM_FRAGMENTS, outer(), delay=1, mixing=0.5, fragment_of=fragments
            )
        ),
        ("mean of fragment 1", "alone", "mean of fragment 0", "alone"),
    ),
    "elastic_average": Case(
        lambda: last(elastic_average(AXIS, 2, 0.9 / 8)), ("mean of parameters", "alone")
    ),
    "consensus_admm": Case(lambda: consensus_admm(adamw(), AXIS, every=2), AVERAGING),
    "gossip": Case(lambda: last(gossip(AXIS, ring, every=2)), ("alone", "two neighbours")),
    "choco": Case(lambda: last(choco(AXIS, ring, None, 0.5)), ("two neighbours",)),
    "push_sum": Case(lambda: last(push_sum(AXIS)), ("one neighbour",)),
    "parameter_server": Case(
        lambda: parameter_server(adamw(), AXIS), ("reduce-scatter, all-gather",)
    ),
    "parameter_server, every 2": Case(
        lambda: parameter_server(adamw(), AXIS, push_every=2, pull_every=2),
        ("alone", "reduce-scatter, all-gather"),
    ),
}
