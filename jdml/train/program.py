"""The program of a step: where its state lives, and what is traced. ``step.py`` is its face."""

import contextlib
import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jdml.communicate import Wire
from jdml.partition.pipeline import Pipeline
from jdml.sharding import Rules, optimizer_specs, use_rules, zero_specs
from jdml.sharding.fit import axes_of, num_parts
from jdml.sharding.paths import leaves_with_paths
from jdml.train.gradients import Mapping, Metrics, gradients_of, over_workers
from jdml.train.host import Memory, fetch, placed_in, send_back
from jdml.train.loss_scale import check_outermost, loss_scale_of
from jdml.train.state import TrainState, WorkerRegion, find_storage, stack_shapes, strong
from jdml.train.unused import UPDATE_SCOPE
from jdml.train.validate import Axis, check_batch, check_params, check_specs, spec_leaves

PyTree = Any
Zero = Literal[0, 1, 2, 3]


@dataclasses.dataclass
class StepProgram:
    """What ``make_step`` was given, and the functions that are traced from it.

    ``flags`` (True for a leaf with a worker dim) and ``param_specs`` are known once :meth:`plan`
    has run, and so are ``divided_specs``, which ``zero`` makes of them, and ``opt_shardings``.
    """

    loss_fn: Callable[..., tuple[jax.Array, Any]]
    tx: optax.GradientTransformation
    mesh: Mesh
    workers: Axis
    specs: PyTree | None
    rules: Rules | None
    batch_axes: tuple[str, ...]
    zero: Zero
    accumulate: int
    model_state: Literal["mean", "local"] | None
    mapping: Mapping
    optimizer_memory: Memory = "device"
    flags: TrainState | None = dataclasses.field(default=None, init=False)
    param_specs: PyTree = dataclasses.field(default=None, init=False)
    divided_specs: PyTree = dataclasses.field(default=None, init=False)
    opt_shardings: PyTree = dataclasses.field(default=None, init=False)
    scales_loss: bool = dataclasses.field(default=False, init=False)
    _storage: Any = dataclasses.field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        self.tx = optax.with_extra_args_support(self.tx)
        self.region = WorkerRegion(self.mesh, self.workers)
        self.num_workers = num_parts(self.workers, self.mesh)

    # Layout

    @property
    def dividing_axes(self) -> tuple[str, ...]:
        """Axes that divide something whatever the loss does."""
        return (*axes_of(self.workers), *self.batch_axes)

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
        self.divided_specs = self.param_specs
        if self.zero:
            for axis in self.batch_axes:
                self.divided_specs = zero_specs(params, self.divided_specs, self.mesh, axis)
        if self.zero == 3:
            self.param_specs = self.divided_specs
        paths = [path for path, _ in leaves_with_paths(params)]
        self.wire_specs = tuple(zip(paths, spec_leaves(self.divided_specs), strict=True))
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)

        def update(gradients: PyTree, params: PyTree, opt_state: PyTree) -> tuple[PyTree, PyTree]:
            return self.update(gradients, params, opt_state, jnp.zeros(()), jax.random.key(0))

        asked = (*jax.tree.flatten(shapes), self.wire_specs)
        if self._storage is None or self._storage[0] != asked:  # init.abstract, then init: once
            init = lambda p: strong(self.tx.init(p))  # noqa: E731
            self._storage = asked, find_storage(self.region, init, update, shapes)
        opt_state, params_flags, opt_flags = self._storage[1]
        check_outermost(opt_state)
        self.scales_loss = loss_scale_of(opt_state) is not None
        if self.scales_loss and isinstance(self.loss_fn, Pipeline):
            raise ValueError(
                "make_step: dynamic_loss_scale with a pipeline, which computes its gradients of "
                "the loss as it is and scales them after: too late for float16. Use bfloat16."
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
            opt_state=optimizer_specs(opt_state, shapes, self.divided_specs, mesh=self.mesh),
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
        state = jax.tree.unflatten(treedef, placed)
        state = state._replace(
            opt_state=placed_in(self.optimizer_memory, state.opt_state, opt_state)
        )
        self.opt_shardings = jax.tree.map(lambda x: x.sharding, state.opt_state)
        return state

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
        scaling = loss_scale_of(state.opt_state)
        with self.rules_context():
            gradients, losses, metrics, model_state = per_worker_gradients(
                state.params,
                state.model_state,
                self.split_batch(batch),
                worker_keys,
                None if scaling is None else scaling.loss_scale,
            )
        gradients = jax.tree.map(
            lambda g, spec: self.constrain(g, PartitionSpec(self.workers, *spec)),
            gradients,
            self.divided_specs if self.zero >= 2 else self.param_specs,
        )
        loss = jnp.mean(losses, axis=0)
        everywhere = jax.tree.map(lambda _: True, gradients)
        fetched = fetch(state.opt_state, self.opt_shardings)
        with jax.named_scope(UPDATE_SCOPE):
            params, opt_state = self.region.run(
                self.update,
                (gradients, state.params, fetched, loss, update_key),
                (everywhere, flags.params, flags.opt_state, False, False),
                (flags.params, flags.opt_state),
            )
        if self.model_state == "mean":
            model_state = jax.tree.map(_mean_over_workers, model_state)
        if scaling is not None:
            after = loss_scale_of(opt_state)
            assert after is not None
            taken = after.skipped_steps == scaling.skipped_steps
            model_state = jax.tree.map(
                lambda new, old: jnp.where(taken, new, old), model_state, state.model_state
            )
        metrics = {name: jnp.mean(x, axis=0) for name, x in metrics.items()}
        metrics |= _metrics_of(opt_state)
        opt_state = send_back(opt_state, self.opt_shardings)
        state = TrainState(state.step + 1, params, opt_state, strong(model_state), state.key)
        return state, {"loss": loss, **metrics}

    def update(
        self, gradients: PyTree, params: PyTree, opt_state: PyTree, loss: jax.Array, key: jax.Array
    ) -> tuple[PyTree, PyTree]:
        """The chain and its result applied, on one worker (inside the worker region)."""
        others = tuple(a for a in self.mesh.axis_names if a not in axes_of(self.workers))
        wire = Wire(key, others, self.wire_specs)
        updates, opt_state = self.tx.update(gradients, opt_state, params, wire=wire, value=loss)
        return strong(wire.settled.apply(params, updates)), strong(opt_state)

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
        return use_rules(self.mesh, self.rules, hide=axes_of(self.workers))

    def constrain(self, x: jax.Array, spec: PartitionSpec) -> jax.Array:
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec))


def _metrics_of(opt_state: PyTree) -> Metrics:
    """What transformations say of their last step: their states' fields called ``metrics``."""
    found: Metrics = {}
    for _, metrics in optax.tree.get_all_with_path(opt_state, "metrics"):
        found |= {
            name: jnp.mean(x, axis=0) if x.ndim else x  # a transformation's value of each worker
            for name, x in metrics.items()
        }
    return found


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


def _spec_of_array(x: Any) -> PartitionSpec:
    sharding = getattr(x, "sharding", None)
    return sharding.spec if isinstance(sharding, NamedSharding) else PartitionSpec()
