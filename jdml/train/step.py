"""One training step over a mesh: gradients per worker, then an Optax chain that may exchange.

1. ``value_and_grad(loss)`` on every worker at once (``jdml.train.gradients.over_workers``); every
   other mesh axis stays automatic.
2. The chain's ``update`` in a ``shard_map`` that is manual over the worker axis alone.
3. Collectives open one more region, manual over the other axes (``jdml.communicate.on_shards``).
4. JAX's types say which leaves of the new state are per worker (``jdml.train.state``).
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jdml.sharding import Rules
from jdml.train.gradients import Mapping, Metrics, default_mapping
from jdml.train.host import Memory, check_memory, constrain_on_device
from jdml.train.loss_scale import check_float16
from jdml.train.program import StepProgram, Zero
from jdml.train.state import TrainState
from jdml.train.unused import axes_in_jaxpr, equations, unused_axes, warn_of_unused
from jdml.train.validate import check_arguments, check_batches, check_steps_per_call

PyTree = Any


class Step(NamedTuple):
    """What :func:`make_step` returns; unpacks as ``init, step``."""

    init: "Init"
    step: "TrainStep"


def make_step(
    loss_fn: Callable[..., tuple[jax.Array, Any]],
    tx: optax.GradientTransformation,
    mesh: Mesh,
    workers: str | tuple[str, ...] = "data",
    specs: PyTree | None = None,
    *,
    rules: Rules | None = None,
    batch_axes: Sequence[str] = (),
    zero: Zero = 0,
    optimizer_memory: Memory = "device",
    accumulate: int = 1,
    model_state: Literal["mean", "local"] | None = None,
    mapping: Mapping | None = None,
    steps_per_call: int = 1,
    compiler_options: dict[str, str] | None = None,
) -> Step:
    """Builds ``init`` and ``step`` of a distributed training run; both are compiled once.

    ``init(params, key) -> TrainState``; ``step(state, batch) -> (state, metrics)`` with the state
    donated. ``metrics`` holds ``"loss"`` and whatever ``loss_fn`` returns, as means over the
    workers.

    With ``steps_per_call=n`` a call takes n steps in one program, a ``jax.lax.scan``: the leaves of
    its batch have a leading dim of n, one batch for each step, and so do those of ``metrics``.
    They are not averaged: a step's own value tells which branches it took
    (:mod:`jdml.communicate.branch`), and a mean is easily had. The steps are those of n single
    calls, keys included; only rounding may differ, where the compiler orders a sum otherwise. A
    device then need not wait for the host between steps, and what a delayed exchange
    (:func:`jdml.communicate.frequency.delayed`) leaves open in one step lies in one program with
    the next.

    Args:
      loss_fn: ``(params, batch, key) -> (loss, metrics)`` on one worker's samples: a float scalar
        and a dict of arrays (or ``{}``). With ``model_state``: ``(params, model_state, batch, key)
        -> (loss, (metrics, new model_state))``. The key differs by worker, step and micro-batch.
      tx: An Optax chain; transformations of ``jdml.aggregate`` in it decide what the workers tell
        each other. With none of them each worker trains a model of its own.
      mesh: Mesh with ``Auto`` axes (``jdml.sharding.make_mesh``).
      workers: Mesh axis whose positions are the workers, or several: worker k is then position k in
        the row-major order of the axes as named (``("slice", "data")``: the data axis of slice 0,
        then that of slice 1, …).
      specs: ``PartitionSpec`` of every parameter over the other axes; ``None`` reads them off the
        parameters given to ``init``.
      rules: Logical axis rules for the ``constrain`` calls inside ``loss_fn``.
      batch_axes: Further axes over which each worker's samples are divided (``("fsdp",)``).
      zero: What else is divided over ``batch_axes``, beside what ``specs`` divide: 1, the optimiser
        state, and the exchange between workers; 2, the gradients too; 3, the parameters too (ZeRO,
        Rajbhandari et al. 2020). Gradients are summed exactly inside a worker, whose devices tell
        other workers their slices: the numbers are those of 0, but that a codec's blocks are of
        slices then.
      optimizer_memory: Where the state of ``tx`` is between steps: ``"pinned_host"`` keeps all but
        its scalars in the memory of each device's host. A device then sends the share that it has
        of it both ways over its link to the host in every step: with Adam 8 bytes each way for each
        parameter of its share, 4 for momentum (Ren et al. 2021, but updated on the device).
      accumulate: Number of micro-batches whose gradients each worker averages before ``tx``.
      model_state: For models that update state without gradients: ``"mean"`` averages it over the
        workers after every step, ``"local"`` keeps each worker's own.
      mapping: How gradients are mapped over the workers, ``"vmap"`` or ``"shard_map"``: the same
        numbers, another compiled program. ``None`` takes the loss function's attribute ``mapping``
        if it has one (a pipeline asks for ``"shard_map"``), else what
        :func:`jdml.train.gradients.default_mapping` gives.
      steps_per_call: Steps of one call of ``step``; 1 takes a batch without the further dim.
      compiler_options: Options of XLA for the step, such as
        :data:`jdml.sharding.ASYNCHRONOUS_ON_TPU`.

    Returns:
      ``(init, step)``. The batch of ``step`` is a pytree of global arrays, placed or not, whose dim
      0 is divided over the workers in order. ``init.abstract(params)`` gives the state's shapes and
      shardings without making it (to restore into); ``step.lower(state, batch)`` is ``jax.jit``'s.

    Raises:
      ValueError: before anything is compiled: an axis that the mesh lacks, a memory that its
        devices do not reach, specs that use the worker axis, parameters that are not floating, a
        batch that the workers do not divide or that does not hold ``steps_per_call`` batches.

    Warns:
      UserWarning: at the first step, of a mesh axis longer than 1 along which nothing is divided.
    """
    check_arguments(mesh, workers, batch_axes, accumulate, model_state, mapping, zero)
    check_steps_per_call(steps_per_call)
    check_memory(optimizer_memory, mesh)
    axis = workers if isinstance(workers, str) or len(workers) > 1 else workers[0]
    program = StepProgram(
        loss_fn,
        tx,
        mesh,
        axis,
        specs,
        rules,
        tuple(batch_axes),
        zero,
        accumulate,
        model_state,
        mapping or getattr(loss_fn, "mapping", None) or default_mapping(mesh, axis),
        optimizer_memory,
    )
    step = TrainStep(program, steps_per_call, compiler_options)
    return Step(Init(program, step), step)


class Init:
    """``init(params, key, model_state=()) -> TrainState``: makes the state, sharded."""

    def __init__(self, program: "StepProgram", step: "TrainStep") -> None:
        self._program = program
        self._step = step

    def __call__(
        self, params: PyTree, key: jax.Array | int = 0, model_state: PyTree = ()
    ) -> TrainState:
        """Makes the initial state; ``params`` stay valid.

        Args:
          params: Pytree of float arrays, one copy (no worker dim).
          key: Typed PRNG key, or an int seed.
          model_state: Untrained state of the model, one copy.
        """
        key = _typed_key(key)
        abstract = self.abstract(params, key, model_state)
        shardings = jax.tree.map(lambda x: x.sharding, abstract)
        make = jax.jit(self._program.initial_state, out_shardings=shardings)
        return make(params, key, model_state)

    def abstract(
        self, params: PyTree, key: jax.Array | int = 0, model_state: PyTree = ()
    ) -> TrainState:
        """The state's ``ShapeDtypeStruct``s with shardings; readies ``step`` for such a state."""
        abstract = self._program.plan(params, _typed_key(key), model_state)
        self._step._ready(abstract)
        return abstract


class TrainStep:
    """``step(state, batch) -> (state, metrics)``: one compiled step, the state donated.

    Attributes:
      steps_per_call: Steps that a call takes; over 1, batch and metrics have that leading dim.
    """

    def __init__(
        self,
        program: "StepProgram",
        steps_per_call: int = 1,
        compiler_options: dict[str, str] | None = None,
    ) -> None:
        self.steps_per_call = steps_per_call
        self._compiler_options = compiler_options
        self._program = program
        self._jitted: Any = None
        self._signature: Any = None
        self._traced_checked = False

    def __call__(self, state: TrainState, batch: PyTree) -> tuple[TrainState, Metrics]:
        if self._jitted is None:
            raise ValueError("Call init(params, key), or init.abstract(params), before step.")
        self._check_traced(state, batch)
        return self._jitted(state, batch)

    def lower(self, state: TrainState, batch: PyTree) -> Any:
        """``jax.jit(step).lower``; arrays or ``ShapeDtypeStruct``s."""
        if self._jitted is None:
            raise ValueError("Call init(params, key), or init.abstract(params), before step.lower.")
        self._check_traced(state, batch)
        return self._jitted.lower(state, batch)

    def consensus(self, state: TrainState) -> tuple[PyTree, PyTree]:
        """``(params, model_state)`` without worker dims: means over workers where they differ."""
        return self._program.consensus(state)

    def _check_traced(self, state: TrainState, batch: PyTree) -> None:
        """What only the traced loss tells, once: unused mesh axes, a loss scale without float16."""
        leaves = jax.tree.leaves((state, batch))
        if self._traced_checked or any(isinstance(x, jax.core.Tracer) for x in leaves):
            return
        program = self._program
        left = unused_axes(program.mesh, program.dividing_axes, leaves)
        if left or program.scales_loss:  # JAX keeps the trace for the call that follows
            jaxpr = self._jitted.trace(state, batch).jaxpr
            if program.scales_loss:
                check_float16(equations(jaxpr))
            named = axes_in_jaxpr(jaxpr) if left else set()
            warn_of_unused(program.mesh, tuple(axis for axis in left if axis not in named))
        self._traced_checked = True

    def _ready(self, abstract: TrainState) -> None:
        signature = jax.tree.flatten(abstract)
        if signature == self._signature:
            return
        self._signature = signature
        shardings = jax.tree.map(lambda x: x.sharding, abstract)

        def steps(state: TrainState, batches: PyTree) -> tuple[TrainState, Metrics]:
            check_batches(batches, self.steps_per_call)

            def one(state: TrainState, batch: PyTree) -> tuple[TrainState, Metrics]:
                state, metrics = self._program.step(state, batch)
                # As between calls: else the partitioner would choose where the state lives.
                return constrain_on_device(state, shardings), metrics

            return jax.lax.scan(one, state, batches)

        self._jitted = jax.jit(
            self._program.step if self.steps_per_call == 1 else steps,
            in_shardings=(shardings, None),
            out_shardings=(shardings, None),
            donate_argnums=0,
            compiler_options=self._compiler_options,
        )


def _typed_key(key: jax.Array | int) -> jax.Array:
    if isinstance(key, int):
        return jax.random.key(key)
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(key)
    return key
