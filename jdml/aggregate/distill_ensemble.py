"""EC-DNN: workers train alone, hear what all their models say of some samples, and learn that."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jdml.aggregate.ensemble import Of
from jdml.aggregate.relabel import AutoRoute, Exchange, Relabel, Share
from jdml.communicate.codecs import Codec
from jdml.communicate.collectives.payloads import key_of
from jdml.sharding import Rules
from jdml.sharding.fit import axes_of

PyTree = Any
Batch = Mapping[str, PyTree]
Step = Callable[[Any, PyTree], tuple[Any, dict[str, jax.Array]]]
"""``(state, batch) -> (state, metrics)``, such as ``jdml.train.make_step`` gives."""


class Part(NamedTuple):
    """What a round distils: samples that the ensemble has relabelled; a pytree of arrays.

    Attributes:
      inputs: Each worker's own, ``[K, batches, batch per worker, ...]``, dim 0 over the workers.
      targets: Their labels, likewise.
      asked: With ``share="inputs"`` the inputs of all, the same on every worker; else ``None``.
      ensemble: The ensemble's answers, f32: of ``asked`` if that is there, else of ``inputs``.
    """

    inputs: PyTree
    targets: PyTree
    asked: PyTree
    ensemble: jax.Array


def distill_ensemble(
    apply_fn: Callable[[PyTree, PyTree, jax.Array | None], jax.Array],
    loss_fn: Callable[[jax.Array, PyTree], jax.Array],
    mesh: Mesh,
    workers: str | tuple[str, ...] = "data",
    *,
    local_steps: int,
    distill_steps: int,
    num_batches: int = 1,
    weight: float = 1.0,
    of: Of = "outputs",
    distill_loss_fn: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
    share: Share = "own",
    route: AutoRoute = "auto",
    common_inputs: bool = False,
    codec: Codec | None = None,
    rules: Rules | None = None,
) -> "DistillEnsemble":
    """Aggregation by ensemble and compression (EC-DNN), in place of averaging parameters.

    A round, on every worker k: tau local steps on ``L(f(w_k; x), y)``; the ensemble
    ``o(x) = mean_j f(w_j; x)`` relabels part of the worker's samples; p steps on
    ``L(f(w_k; x), y) + weight L(f(w_k; x), o(x))`` distil it into w_k itself. So each worker has
    one model, of one size, before and after; the models differ. Averaging parameters has no such
    bound as this has for a loss convex in the outputs: ``L(o) <= mean_k L(f(w_k; x))``.

    The steps are those of ``make_step`` with the loss that is given back, and a chain that
    exchanges nothing by itself::

        distil = distill_ensemble(apply_fn, loss_fn, mesh, local_steps=32, distill_steps=16)
        init, step = make_step(distil.loss_fn, optax.sgd(0.1, momentum=0.9), mesh)
        state = init(params, 0)
        for _ in range(num_rounds):
            state, metrics = distil.round(step, state, batches)

    Between rounds the state is whole: a ``Checkpointer`` saves it, with the position of
    ``batches``. Specs, further mesh axes, micro-batches and mixed precision are ``make_step``'s.

    Args:
      apply_fn: ``(params, inputs, key) -> outputs [num_samples, ...]`` of one model; the key is
        ``None`` where the model is asked for its opinion (no dropout). Models with state that is
        not trained by gradients are not covered.
      loss_fn: L, ``(outputs, targets) -> scalar``, the mean over samples.
      mesh: Mesh with ``Auto`` axes.
      workers: The worker axis, or a tuple of axes, as in ``make_step``.
      local_steps: tau >= 1.
      distill_steps: p >= 1.
      num_batches: How many batches are relabelled in a round; distillation goes through them in
        turn, over and over.
      weight: Of the ensemble's term, >= 0 (lambda in the paper).
      of: What is averaged, see :func:`jdml.aggregate.ensemble`; ``"probabilities"`` for logits.
      distill_loss_fn: ``(outputs, answers) -> scalar``, where L does not take the ensemble's
        answers for targets: L is used by default, as in the paper (cross-entropy of one-hot labels
        and ``of="probabilities"``; squared error).
      share: ``"own"``: a worker distils what the ensemble says of its own samples, as in the paper.
        ``"inputs"``: of all workers' samples, whose inputs (not labels) it then has; the term of
        the labels stays with its own. For workers whose data differ: what a worker never sees, no
        answer about its own samples can teach it. Each step then runs the model twice.
      route: ``"outputs"``: inputs go to all, outputs back to their owner. ``"parameters"``: models
        go to all. ``"auto"``: that which sends fewer bytes, counted from shapes, outputs if equal.
      common_inputs: Whether every worker (every process) has the whole batches, so that no input
        need be sent: the arrays given are then the same everywhere, not divided.
      codec: For the outputs (on that route, and where answers are shared): a codec without memory.
      rules: Logical axis rules for ``constrain`` in ``apply_fn``.

    Returns:
      A :class:`DistillEnsemble`: ``loss_fn`` for ``make_step``, ``round``, ``relabel``,
      ``exchange`` (bytes), ``outputs`` (of all models, to be combined by ``ensemble`` or ``vote``).

    Bytes each device sends in a round, K workers, n relabelled samples each: by outputs
    ``(K-1) (n x + c)``, x bytes of an input, c those of n outputs (f32 or encoded); by parameters
    ``(K-1) p``, p the bytes of the model's shard. ``exchange`` counts them.

    Raises:
      ValueError: an argument is out of its range, or the mesh lacks an axis.

    Reference: Sun et al., "Ensemble-Compression: A New Method for Parallel Training of Deep Neural
    Networks", ECML-PKDD 2017. Not in it: the route of the outputs, codecs, ``share="inputs"``.
    """
    counts = {"local_steps": local_steps, "distill_steps": distill_steps}
    for name, count in (counts | {"num_batches": num_batches}).items():
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise ValueError(f"distill_ensemble({name}={count!r}): expected an int >= 1.")
    if not 0 <= weight < float("inf"):
        raise ValueError(
            f"distill_ensemble(weight={weight!r}): expected a finite number >= 0; 0 hears nothing."
        )
    choices = {"of": (of, Of), "share": (share, Share), "route": (route, AutoRoute)}
    for name, (choice, known) in choices.items():
        if choice not in get_args(known):
            raise ValueError(
                f"distill_ensemble({name}={choice!r}): expected one of {get_args(known)}."
            )
    if codec is not None and not isinstance(codec, Codec):
        raise ValueError(
            f"distill_ensemble(codec={codec!r}): expected None or a codec such as int8(). Error "
            "feedback and reducers remember the last round's error, but each round's outputs are "
            "of other samples."
        )
    missing = [axis for axis in axes_of(workers) if axis not in mesh.axis_names]
    if missing or not axes_of(workers):
        raise ValueError(
            f"distill_ensemble: workers={workers!r}, but the mesh has axes {mesh.axis_names}."
        )
    relabel = Relabel(apply_fn, mesh, workers, of, share, route, common_inputs, codec, rules)
    return DistillEnsemble(
        relabel,
        loss_fn,
        loss_fn if distill_loss_fn is None else distill_loss_fn,
        local_steps,
        distill_steps,
        num_batches,
        float(weight),
    )


@dataclasses.dataclass(frozen=True)
class DistillEnsemble:
    """See :func:`distill_ensemble`."""

    asks: Relabel
    label_loss_fn: Callable[[jax.Array, PyTree], jax.Array]
    distill_loss_fn: Callable[[jax.Array, jax.Array], jax.Array]
    local_steps: int
    distill_steps: int
    num_batches: int
    weight: float

    @property
    def steps_per_round(self) -> int:
        """Optimiser steps of a round."""
        return self.local_steps + self.distill_steps

    @property
    def batches_per_round(self) -> int:
        """Batches that a round takes."""
        return self.local_steps + self.num_batches

    def loss_fn(
        self, params: PyTree, batch: Batch, key: jax.Array | None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The loss for ``make_step``: of the labels, and of the ensemble's answers if it has them.

        Args:
          params: Of one model.
          batch: ``{"inputs", "targets"}``, and in distillation ``"ensemble"``, its answers, of
            ``"asked"`` if that is there and of ``"inputs"`` otherwise.
          key: For ``apply_fn``.
        """
        check_batch(batch)
        outputs = self.asks.apply_fn(params, batch["inputs"], key)
        loss = self.label_loss_fn(outputs, batch["targets"])
        if "ensemble" not in batch:
            return loss, {}
        if "asked" in batch:
            outputs = self.asks.apply_fn(params, batch["asked"], key_of(key, 1))
        distance = self.distill_loss_fn(outputs, batch["ensemble"])
        metrics = {"label_loss": loss, "distill_loss": distance}
        return loss + self.weight * distance, metrics

    def exchange(self, params: PyTree, batch: Batch) -> Exchange:
        """The route that a round takes and the bytes that each device sends; nothing is run.

        Args:
          params: ``state.params``, or what ``init.abstract`` says of them.
          batch: A batch like those of the rounds; arrays or ``ShapeDtypeStruct``s.
        """
        check_batch(batch)
        return self.asks.exchange(params, [batch["inputs"]] * self.num_batches)

    def outputs(self, params: PyTree, inputs: PyTree) -> jax.Array:
        """Each worker's model on the same inputs, ``[K, num_samples, ...]``; nothing is sent.

        ``ensemble(distil.outputs(state.params, x), 0, of=...)`` is the answer of all.
        """
        return self.asks.outputs(params, inputs)

    def relabel(
        self, params: PyTree, batches: Sequence[Batch], key: jax.Array | None = None
    ) -> Part:
        """Asks the ensemble of the workers' models: the one exchange of a round.

        Args:
          params: ``state.params``, per worker.
          batches: ``{"inputs", "targets"}``, global arrays with dim 0 divided over the workers.
          key: PRNG key, for codecs that draw random numbers.

        Raises:
          ValueError: the models are not per worker; batches differ in shape; outputs do not fit.
        """
        for batch in batches:
            check_batch(batch)
        codec = self.asks.codec
        if codec is not None and codec.needs_key and key is None:
            raise ValueError(f"distill_ensemble: {codec} draws random numbers; pass key=.")
        inputs, asked, answers = self.asks(params, [batch["inputs"] for batch in batches], key)
        return Part(inputs, self._stack([batch["targets"] for batch in batches]), asked, answers)

    def minibatch(self, part: Part, number: int) -> dict[str, PyTree]:
        """Batch ``number`` of distillation, for the step: its own batches in turn.

        Shared answers are gone through from another place on each worker, every batch with samples
        of many workers.
        """
        return self._minibatch(part, np.int32(number))

    def round(
        self, step: Step, state: Any, batches: Iterator[Batch]
    ) -> tuple[Any, dict[str, float]]:
        """Local steps, one relabelling, distillation.

        Args:
          step: From ``make_step`` with this object's ``loss_fn``.
          state: A ``TrainState``; donated.
          batches: Gives :attr:`batches_per_round` of ``{"inputs", "targets"}``, dim 0 divided over
            the workers in order.

        Returns:
          The state, and means over the round's steps: ``loss`` of the local steps; ``label_loss``
          and ``distill_loss`` of the others.
        """
        # On CPU, steps in flight together starve each other's collectives of threads.
        on_cpu = self.asks.mesh.devices.flat[0].platform == "cpu"
        local, distilled = [], []
        for _ in range(self.local_steps):
            state, metrics = step(state, _only(next(batches)))
            local.append(metrics)
            if on_cpu:
                jax.block_until_ready(state)
        relabelled = [_only(next(batches)) for _ in range(self.num_batches)]
        key = jax.random.fold_in(jax.random.fold_in(state.key, state.step), 1)
        part = self.relabel(state.params, relabelled, key)
        for number in range(self.distill_steps):
            if on_cpu:
                jax.block_until_ready((state, part))
            state, metrics = step(state, self.minibatch(part, number))
            distilled.append(metrics)
        if on_cpu:
            jax.block_until_ready(state)
        names = ("label_loss", "distill_loss")
        return state, _means(local, ("loss",)) | _means(distilled, names)

    @cached_property
    def _stack(self) -> Any:
        asks = self.asks

        def stack(batches: Sequence[PyTree]) -> PyTree:
            return asks.place(jax.tree.map(asks.stack, *batches), P(asks.workers))

        return jax.jit(stack)

    @cached_property
    def _minibatch(self) -> Any:
        mesh, axis = self.asks.mesh, self.asks.workers

        def own(x: jax.Array, number: jax.Array) -> jax.Array:
            return x[0, number % x.shape[1]]

        def of_all(x: jax.Array, number: jax.Array) -> jax.Array:
            num_workers, num_batches, size = x.shape[:3]
            # One sample of each worker after the other, so that a batch is a mixture.
            mixed = x.reshape(num_workers, num_batches * size, *x.shape[3:]).swapaxes(0, 1)
            mixed = mixed.reshape(-1, *mixed.shape[2:])
            start = jax.lax.axis_index(axis) * num_batches * size + number * size
            return jnp.take(mixed, (start + jnp.arange(size)) % len(mixed), axis=0)

        def cut(part: Part, number: jax.Array) -> dict[str, PyTree]:
            first = {"inputs": part.inputs, "targets": part.targets}
            rest = {"ensemble": part.ensemble}
            if part.asked is not None:
                rest |= {"asked": part.asked}
            take = own if part.asked is None else of_all
            return jax.tree.map(lambda x: own(x, number), first) | jax.tree.map(
                lambda x: take(x, number), rest
            )

        def run(part: Part, number: jax.Array) -> dict[str, PyTree]:
            answered = P(axis) if part.asked is None else P()
            specs: list[Any] = [P(axis), P(axis), answered, answered]
            return jax.shard_map(
                cut, mesh=mesh, in_specs=(Part(*specs), P()), out_specs=P(axis), check_vma=False
            )(part, number)

        return jax.jit(run, out_shardings=NamedSharding(mesh, P(axis)))


def check_batch(batch: Batch) -> None:
    """A batch is a mapping with inputs and targets."""
    if not isinstance(batch, Mapping) or not {"inputs", "targets"} <= set(batch):
        found = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
        raise ValueError(
            f"distill_ensemble: expected batches {{'inputs': ..., 'targets': ...}}, got {found}."
        )


def _only(batch: Batch) -> dict[str, PyTree]:
    check_batch(batch)
    return {name: batch[name] for name in ("inputs", "targets")}


def _means(rows: Sequence[Mapping[str, jax.Array]], names: Sequence[str]) -> dict[str, float]:
    rows = jax.device_get(rows)
    return {name: float(np.mean([row[name] for row in rows])) for name in names}
