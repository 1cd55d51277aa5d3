"""One training step over a mesh: gradients per worker, then an Optax chain that may exchange.

1. ``value_and_grad(loss)`` on every worker at once (``jdml.train.gradients.over_workers``); every
   other mesh axis stays automatic.
2. The chain's ``update`` in a ``shard_map`` that is manual over the worker axis alone.
3. Collectives open one more region, manual over the other axes (``jdml.communicate.on_shards``).
4. JAX's types say which leaves of the new state are per worker (``jdml.train.state``).
"""

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jdml.communicate import Wire
from jdml.sharding import Rules, optimizer_specs, use_rules
from jdml.sharding.paths import leaves_with_paths
from jdml.train.gradients import (
    Mapping,
    Metrics,
    default_mapping,
    gradients_of,
    over_workers,
)
from jdml.train.state import TrainState, WorkerRegion, find_storage, stack_shapes, strong
from jdml.train.validate import (
    check_arguments,
    check_batch,
    check_params,
    check_specs,
    spec_leaves,
)

PyTree = Any


class Step(NamedTuple):
    """What :func:`make_step` returns; unpacks as ``init, step``."""

    init: "Init"
    step: "TrainStep"


def make_step(
    loss_fn: Callable[..., tuple[jax.Array, Any]],
    tx: optax.GradientTransformation,
    mesh: Mesh,
    workers: str = "data",
    specs: PyTree | None = None,
    *,
    rules: Rules | None = None,
    batch_axes: Sequence[str] = (),
    accumulate: int = 1,
    model_state: Literal["mean", "local"] | None = None,
    mapping: Mapping | None = None,
) -> Step:
    """Builds ``init`` and ``step`` of a distributed training run; both are compiled once.

    ``init(params, key) -> TrainState``; ``step(state, batch) -> (state, metrics)`` with the state
    donated. ``metrics`` holds ``"loss"`` and whatever ``loss_fn`` returns, as means over the
    workers.

    Args:
      loss_fn: ``(params, batch, key) -> (loss, metrics)`` on one worker's samples: a float scalar
        and a dict of arrays (or ``{}``). With ``model_state``: ``(params, model_state, batch, key)
        -> (loss, (metrics, new model_state))``. The key differs by worker, step and micro-batch.
      tx: An Optax chain; transformations of ``jdml.aggregate`` in it decide what the workers tell
        each other. With none of them each worker trains a model of its own.
      mesh: Mesh with ``Auto`` axes (``jdml.sharding.make_mesh``).
      workers: Mesh axis whose positions are the workers.
      specs: ``PartitionSpec`` of every parameter over the other axes; ``None`` reads them off the
        parameters given to ``init``.
      rules: Logical axis rules for the ``constrain`` calls inside ``loss_fn``.
      batch_axes: Further axes over which each worker's samples are divided (``("fsdp",)``).
      accumulate: Number of micro-batches whose gradients each worker averages before ``tx``.
      model_state: For models that update state without gradients: ``"mean"`` averages it over the
        workers after every step, ``"local"`` keeps each worker's own.
      mapping: How gradients are mapped over the workers, ``"vmap"`` or ``"shard_map"``: the same
        numbers, another compiled program. ``None`` takes what
        :func:`jdml.train.gradients.default_mapping` gives.

    Returns:
      ``(init, step)``. The batch of ``step`` is a pytree of global arrays, placed or not, whose dim
      0 is divided over the workers in order. ``init.abstract(params)`` gives the state's shapes and
      shardings without making it (to restore into); ``step.lower(state, batch)`` is ``jax.jit``'s.

    Raises:
      ValueError: before anything is compiled: an axis that the mesh lacks, specs that use the
        worker axis, parameters that are not floating, a batch that the workers do not divide.
    """
    check_arguments(mesh, workers, batch_axes, accumulate, model_state, mapping)
    program = _Program(
        loss_fn,
        tx,
        mesh,
        workers,
        specs,
        rules,
        tuple(batch_axes),
        accumulate,
        model_state,
        mapping or default_mapping(mesh, workers),
    )
    step = TrainStep(program)
    return Step(Init(program, step), step)


class Init:
    """``init(params, key, model_state=()) -> TrainState``: makes the state, sharded."""

    def __init__(self, program: "_Program", step: "TrainStep") -> None:
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
    """``step(state, batch) -> (state, metrics)``: one compiled step, the state donated."""

    def __init__(self, program: "_Program") -> None:
        self._program = program
        self._jitted: Any = None
        self._signature: Any = None

    def __call__(self, state: TrainState, batch: PyTree) -> tuple[TrainState, Metrics]:
        if self._jitted is None:
            raise ValueError("Call init(params, key), or init.abstract(params), before step.")
        return self._jitted(state, batch)

    def lower(self, state: TrainState, batch: PyTree) -> Any:
        """``jax.jit(step).lower``; arrays or ``ShapeDtypeStruct``s."""
        if self._jitted is None:
            raise ValueError("Call init(params, key), or init.abstract(params), before step.lower.")
        return self._jitted.lower(state, batch)

    def consensus(self, state: TrainState) -> tuple[PyTree, PyTree]:
        """``(params, model_state)`` without worker dims: means over workers where they differ."""
        return self._program.consensus(state)

    def _ready(self, abstract: TrainState) -> None:
        signature = jax.tree.flatten(abstract)
        if signature == self._signature:
            return
        self._signature = signature
        shardings = jax.tree.map(lambda x: x.sharding, abstract)
        self._jitted = jax.jit(
            self._program.step,
            in_shardings=(shardings, None),
            out_shardings=(shardings, None),
            donate_argnums=0,
        )


class _Program:
    """The traced functions; knows the layout once :meth:`plan` has run."""

    def __init__(
        self,
        loss_fn: Callable[..., tuple[jax.Array, Any]],
        tx: optax.GradientTransformation,
        mesh: Mesh,
        workers: str,
        specs: PyTree | None,
        rules: Rules | None,
        batch_axes: tuple[str, ...],
        accumulate: int,
        model_state: str | None,
        mapping: Mapping,
    ) -> None:
        self.loss_fn = loss_fn
        self.tx = optax.with_extra_args_support(tx)
        self.mesh = mesh
        self.workers = workers
        self.specs = specs
        self.rules = rules
        self.batch_axes = batch_axes
        self.accumulate = accumulate
        self.model_state = model_state
        self.mapping = mapping
        self.region = WorkerRegion(mesh, workers)
        self.num_workers = mesh.shape[workers]
        self.flags: TrainState | None = None
        self.param_specs: PyTree = None

    # Layout

    def plan(self, params: PyTree, key: jax.Array, model_state: PyTree) -> TrainState:
        """Finds out where every leaf lives; returns the abstract state with shardings."""
        check_params(params)
        if (self.model_state is None) != (not jax.tree.leaves(model_state)):
            raise ValueError(
                f"make_step(model_state={self.model_state!r}) but init got "
                f"{len(jax.tree.leaves(model_state))} leaves of model state. Give both or neither: "
                "'mean' or 'local' to make_step, and the initial state to init."
            )
        given = jax.tree.map(_spec_of_array, params) if self.specs is None else self.specs
        self.param_specs = check_specs(params, given, self.mesh, self.workers)
        self._wire_specs = tuple(
            (path, spec)
            for (path, _), spec in zip(
                leaves_with_paths(params), spec_leaves(self.param_specs), strict=True
            )
        )
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)

        def update(gradients: PyTree, params: PyTree, opt_state: PyTree) -> tuple[PyTree, PyTree]:
            return self.update(gradients, params, opt_state, jnp.zeros(()), jax.random.key(0))

        opt_state, params_flags, opt_flags = find_storage(
            self.region, lambda p: strong(self.tx.init(p)), update, shapes
        )
        local = self.model_state == "local"
        self.flags = TrainState(
            False, params_flags, opt_flags, jax.tree.map(lambda _: local, model_state), False
        )
        abstract = TrainState(
            step=jax.ShapeDtypeStruct((), jnp.int32),
            params=shapes,
            opt_state=opt_state,
            model_state=jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), model_state),
            key=jax.ShapeDtypeStruct(key.shape, key.dtype),
        )
        state_specs = TrainState(
            step=PartitionSpec(),
            params=self.param_specs,
            opt_state=optimizer_specs(opt_state, shapes, self.param_specs),
            model_state=jax.tree.map(lambda _: PartitionSpec(), model_state),
            key=PartitionSpec(),
        )
        stacked = stack_shapes(abstract, self.flags, self.num_workers)
        leaves, treedef = jax.tree.flatten(stacked)
        placed = [
            jax.ShapeDtypeStruct(
                x.shape,
                x.dtype,
                sharding=NamedSharding(
                    self.mesh, PartitionSpec(self.workers, *spec) if flag else spec
                ),
            )
            for x, spec, flag in zip(
                leaves, spec_leaves(state_specs), jax.tree.leaves(self.flags), strict=True
            )
        ]
        return jax.tree.unflatten(treedef, placed)

    # Traced functions

    def initial_state(self, params: PyTree, key: jax.Array, model_state: PyTree) -> TrainState:
        assert self.flags is not None

        def on_worker(params: PyTree, model_state: PyTree) -> tuple[PyTree, PyTree, PyTree]:
            return params, strong(self.tx.init(params)), model_state

        # Copies: an output that is an input would be deleted when the state is donated.
        params, model_state = jax.tree.map(jnp.copy, (params, model_state))
        once = jax.tree.map(lambda _: False, (params, model_state))
        new_params, opt_state, new_model_state = self.region.run(
            on_worker,
            (params, model_state),
            once,
            (self.flags.params, self.flags.opt_state, self.flags.model_state),
        )
        return TrainState(
            jnp.zeros((), jnp.int32), new_params, opt_state, new_model_state, jnp.copy(key)
        )

    def step(self, state: TrainState, batch: PyTree) -> tuple[TrainState, Metrics]:
        assert self.flags is not None
        flags = self.flags
        key = jax.random.fold_in(state.key, state.step)
        workers_key, update_key = jax.random.split(key)
        worker_keys = jax.vmap(lambda i: jax.random.fold_in(workers_key, i))(
            jnp.arange(self.num_workers)
        )

        per_worker_gradients = over_workers(
            gradients_of(self.loss_fn, self.accumulate, self.model_state is not None),
            self.mesh,
            self.workers,
            self.mapping,
            flags.params,
            flags.model_state,
        )
        with self.rules_context():
            gradients, losses, metrics, model_state = per_worker_gradients(
                state.params, state.model_state, self.split_batch(batch), worker_keys
            )
        gradients = jax.tree.map(
            lambda g, spec: self.constrain(g, PartitionSpec(self.workers, *spec)),
            gradients,
            self.param_specs,
        )
        loss = jnp.mean(losses, axis=0)
        everywhere = jax.tree.map(lambda _: True, gradients)
        params, opt_state = self.region.run(
            self.update,
            (gradients, state.params, state.opt_state, loss, update_key),
            (everywhere, flags.params, flags.opt_state, False, False),
            (flags.params, flags.opt_state),
        )
        if self.model_state == "mean":
            model_state = jax.tree.map(_mean_over_workers, model_state)
        metrics = {name: jnp.mean(x, axis=0) for name, x in metrics.items()}
        state = TrainState(state.step + 1, params, opt_state, strong(model_state), state.key)
        return state, {"loss": loss, **metrics}

    def update(
        self, gradients: PyTree, params: PyTree, opt_state: PyTree, loss: jax.Array, key: jax.Array
    ) -> tuple[PyTree, PyTree]:
        """The chain and its result applied, on one worker (inside the worker region)."""
        others = tuple(a for a in self.mesh.axis_names if a != self.workers)
        wire = Wire(key, others, self._wire_specs)
        updates, opt_state = self.tx.update(gradients, opt_state, params, wire=wire, value=loss)
        return strong(optax.apply_updates(params, updates)), strong(opt_state)

    def split_batch(self, batch: PyTree) -> PyTree:
        """``[batch, ...]`` to ``[workers, (accumulate,) batch per worker, ...]``."""
        inner = math.prod(self.mesh.shape[a] for a in self.batch_axes)
        check_batch(batch, self.workers, self.num_workers, self.accumulate, self.batch_axes, inner)

        def split(x: jax.Array) -> jax.Array:
            x = jnp.asarray(x)
            size = x.shape[0] // (self.num_workers * self.accumulate)
            within = self.batch_axes or None
            if self.accumulate == 1:
                x = x.reshape(self.num_workers, size, *x.shape[1:])
                return self.constrain(x, PartitionSpec(self.workers, within))
            # Micro-batch i takes every accumulate-th sample, so that no sample changes its device.
            x = x.reshape(self.num_workers, size, self.accumulate, *x.shape[1:]).swapaxes(1, 2)
            return self.constrain(x, PartitionSpec(self.workers, None, within))

        return jax.tree.map(split, batch)

    def consensus(self, state: TrainState) -> tuple[PyTree, PyTree]:
        assert self.flags is not None
        flags = (self.flags.params, self.flags.model_state)
        trees = (state.params, state.model_state)
        if not any(jax.tree.leaves(flags)):
            return trees
        return _consensus(trees, tuple(jax.tree.leaves(flags)))

    def rules_context(self) -> contextlib.AbstractContextManager[None]:
        """The rules for ``constrain`` in the loss, where the worker axis is mapped already."""
        if self.rules is None:
            return contextlib.nullcontext()
        return use_rules(self.mesh, self.rules, hide=(self.workers,))

    def constrain(self, x: jax.Array, spec: PartitionSpec) -> jax.Array:
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec))


def _consensus_of(trees: PyTree, flags: tuple[bool, ...]) -> PyTree:
    leaves, treedef = jax.tree.flatten(trees)
    means = [_mean_over_workers(x) if f else x for x, f in zip(leaves, flags, strict=True)]
    return jax.tree.unflatten(treedef, means)


_consensus = jax.jit(_consensus_of, static_argnums=1)


def _mean_over_workers(x: jax.Array) -> jax.Array:
    """Mean over dim 0; counters and the like, which are equal everywhere, are taken as they are."""
    if jnp.issubdtype(x.dtype, jnp.floating):
        return jnp.mean(x, axis=0, dtype=jnp.float32).astype(x.dtype)
    return x[0]


def _typed_key(key: jax.Array | int) -> jax.Array:
    if isinstance(key, int):
        return jax.random.key(key)
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(key)
    return key


def _spec_of_array(x: Any) -> PartitionSpec:
    sharding = getattr(x, "sharding", None)
    return sharding.spec if isinstance(sharding, NamedSharding) else PartitionSpec()
