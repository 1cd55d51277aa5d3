"""What an ensemble of the workers' models says of each worker's samples, for the fewest bytes.

Two routes lead there. Either the inputs go to all workers, each asks its own model, and the outputs
come back to the inputs' owner as a mean; or the models go from worker to worker, one hop at a time,
and each owner asks them all. The answers are the same, so the bytes decide, counted from shapes.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jdml.aggregate.ensemble import Of, answer, settle
from jdml.communicate.codecs import Codec
from jdml.communicate.collectives.all_gather import all_gather
from jdml.communicate.collectives.payloads import key_of
from jdml.communicate.collectives.reduce_scatter import reduce_scatter_mean
from jdml.communicate.permute import permute
from jdml.sharding import Rules, use_rules
from jdml.sharding.fit import axes_of, num_parts
from jdml.sharding.paths import leaves_with_paths

PyTree = Any
Route = Literal["outputs", "parameters"]
Share = Literal["own", "inputs"]
AutoRoute = Literal["auto", "outputs", "parameters"]


class Exchange(NamedTuple):
    """The bytes that each device sends in one relabelling, counted from shapes.

    A compiled program sends as many; on TPU parameters may go in bf16, where products take that.

    Attributes:
      route: The one taken; on ``"auto"`` that of fewer bytes, the outputs' if they are equal.
      outputs: By sending inputs to all, and outputs to the inputs' owner.
      parameters: By sending models to all.
    """

    route: Route
    outputs: int
    parameters: int

    @property
    def sent(self) -> int:
        """Bytes on the route taken."""
        return self.outputs if self.route == "outputs" else self.parameters


class Relabelled(NamedTuple):
    """Samples ``[K, batches, batch per worker, ...]`` and what the ensemble says of them.

    Attributes:
      inputs: Each worker's own, dim 0 divided over the workers.
      asked: With ``share="inputs"`` those of all, the same on every worker; else ``None``.
      answers: The ensemble's, f32: of ``inputs``, or of ``asked``, where that is there.
    """

    inputs: PyTree
    asked: PyTree
    answers: jax.Array


@dataclasses.dataclass(frozen=True)
class Relabel:
    """``(params, batches of inputs, key) -> Relabelled``, compiled; see ``distill_ensemble``."""

    apply_fn: Callable[[PyTree, PyTree, jax.Array | None], jax.Array]
    mesh: Mesh
    workers: str | tuple[str, ...]
    of: Of = "outputs"
    share: Share = "own"
    route: AutoRoute = "auto"
    common_inputs: bool = False
    codec: Codec | None = None
    rules: Rules | None = None

    @property
    def num_workers(self) -> int:
        """K."""
        return num_parts(self.workers, self.mesh)

    def __call__(
        self, params: PyTree, inputs: Sequence[PyTree], key: jax.Array | None = None
    ) -> Relabelled:
        route = self.exchange(params, inputs).route
        if self.common_inputs:
            # Left to the compiler, host arrays are divided first and gathered then.
            inputs = jax.device_put(inputs, NamedSharding(self.mesh, P()))
        return self._compiled(params, tuple(inputs), key, _specs(params), route)

    def lower(self, params: PyTree, inputs: Sequence[PyTree], key: jax.Array | None = None) -> Any:
        """``jax.jit(...).lower`` of the call, to read what it sends."""
        route = self.exchange(params, inputs).route
        if self.common_inputs:
            whole = NamedSharding(self.mesh, P())
            inputs = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), inputs
            )
        return self._compiled.lower(params, tuple(inputs), key, _specs(params), route)

    def outputs(self, params: PyTree, inputs: PyTree) -> jax.Array:
        """Each worker's model on the same inputs: ``[K, num_samples, ...]``, nothing sent.

        Args:
          params: Per worker, with a leading worker dim.
          inputs: The same on every worker, ``[num_samples, ...]``.
        """
        self._check_params(params)
        return self._outputs(params, inputs)

    def exchange(self, params: PyTree, inputs: Sequence[PyTree]) -> Exchange:
        """Which route is taken, and the bytes of both; arrays or ``ShapeDtypeStruct``s.

        With K workers, n samples each, per device: ``outputs = (K-1) (n x + c)``, x the bytes of
        an input (0 for common inputs), c those of n outputs, encoded or f32;
        ``parameters = (K-1) p``, p the bytes of its shard of a model. Sharing inputs adds on either
        route what is missing: the inputs, and the ensemble's answers, ``(K-1) c``.

        Raises:
          ValueError: parameters are not per worker, batches differ, outputs do not fit.
        """
        self._check_params(params)
        shape = self._check_inputs(params, inputs)
        others, num_batches = self.num_workers - 1, len(inputs)
        size = num_batches * math.prod(shape.shape)
        values = 4 * size
        if self.codec is not None:
            values = self.codec.payload_bytes(self.codec.whole(size))
        # Whole inputs: they are not divided over other axes on the way.
        asked = num_batches * sum(_nbytes(x) for x in jax.tree.leaves(inputs[0]))
        asked = 0 if self.common_inputs else asked // self.num_workers
        model = sum(_nbytes(x, x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(params))
        outputs, parameters = others * (asked + values), others * model
        if self.share == "inputs":
            outputs, parameters = outputs + others * values, parameters + others * (asked + values)
        cheaper: Route = "outputs" if outputs <= parameters else "parameters"
        return Exchange(cheaper if self.route == "auto" else self.route, outputs, parameters)

    # Checks

    def _check_params(self, params: PyTree) -> None:
        for path, x in leaves_with_paths(params):
            spec = getattr(getattr(x, "sharding", None), "spec", P())
            stacked = bool(x.ndim) and x.shape[0] == self.num_workers
            if not stacked or axes_of(next(iter(spec), None)) != axes_of(self.workers):
                raise ValueError(
                    f"distill_ensemble: params leaf {path!r} of shape {x.shape} and spec {spec} is "
                    f"not per worker; expected dim 0 of {self.num_workers} divided over axis "
                    f"{self.workers!r}. Leave transformations that make the workers' models equal "
                    "after every step out of the chain: an ensemble of one model is that model."
                )

    def _check_inputs(self, params: PyTree, inputs: Sequence[PyTree]) -> jax.ShapeDtypeStruct:
        """Shape and dtype of a model's outputs for one worker's part of one batch."""
        if not inputs:
            raise ValueError("distill_ensemble: no batches to relabel; give at least one.")
        one = _shapes(inputs[0])
        for number, batch in enumerate(inputs):
            if _shapes(batch) != one:
                raise ValueError(
                    f"distill_ensemble: inputs of batch {number} are {_shapes(batch)}, those of "
                    f"batch 0 {one}; all batches of a round must have the same shapes."
                )
        for path, x in leaves_with_paths(inputs[0]):
            if not x.ndim or not x.shape[0] or x.shape[0] % self.num_workers:
                raise ValueError(
                    f"distill_ensemble: inputs leaf {path!r} has shape {x.shape}; its dim 0 is not "
                    f"a positive multiple of {self.num_workers}, the workers on axis "
                    f"{self.workers!r}."
                )
            spec = getattr(getattr(x, "sharding", None), "spec", P())
            if self.common_inputs and set(axes_of(next(iter(spec), None))) & set(
                axes_of(self.workers)
            ):
                raise ValueError(
                    f"distill_ensemble(common_inputs=True): inputs leaf {path!r} is divided over "
                    f"the workers ({spec}). Give every worker the whole of it (PartitionSpec()), "
                    "or leave out common_inputs."
                )
        model = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), params)
        part = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((x.shape[0] // self.num_workers, *x.shape[1:]), x.dtype),
            inputs[0],
        )
        with self._rules_context():
            shape = jax.eval_shape(lambda p, x: self.apply_fn(p, x, None), model, part)
        samples = jax.tree.leaves(part)[0].shape[0]
        if not hasattr(shape, "shape") or shape.shape[:1] != (samples,):
            raise ValueError(
                f"distill_ensemble: apply_fn gave {shape} for {samples} samples; expected one "
                f"array [{samples}, ...], the outputs of each sample."
            )
        if not jnp.issubdtype(shape.dtype, jnp.floating):
            raise ValueError(
                f"distill_ensemble: apply_fn gave outputs of dtype {shape.dtype}; expected floats."
            )
        if self.of != "outputs" and len(shape.shape) < 2:
            raise ValueError(
                f"distill_ensemble(of={self.of!r}): outputs of shape {shape.shape} have no dim of "
                "classes after that of the samples."
            )
        return shape

    # Traced

    @cached_property
    def _compiled(self) -> Any:
        return jax.jit(self._program, static_argnums=(3, 4))

    @cached_property
    def _outputs(self) -> Any:
        ask = self._over_workers(lambda params, x: self.apply_fn(params, x, None))
        return jax.jit(lambda params, inputs: ask(params, self._for_each(inputs)))

    def _program(
        self,
        params: PyTree,
        batches: tuple[PyTree, ...],
        key: jax.Array | None,
        specs: tuple[P, ...],
        route: Route,
    ) -> Relabelled:
        asked = jax.tree.map(self.stack, *batches)
        everyones = None
        if self.common_inputs:
            everyones = self.place(asked, P())
            own = self._cut_out(everyones)
        else:
            own = self.place(asked, P(self.workers))
            if route == "outputs" or self.share == "inputs":
                everyones = self._gather(own)
        if route == "outputs":
            said = self._over_workers(self._ask_all)(params, self._for_each(everyones))
            mean = self._take_means(said, key)
        else:
            mean = self._ask_in_turn(params, own, specs)
        answers = settle(mean, self.of)
        if self.share == "own":
            return Relabelled(own, None, answers)
        return Relabelled(own, everyones, self._tell_all(answers, key))

    def _ask(self, params: PyTree, inputs: PyTree) -> jax.Array:
        """One model's answers to batches ``[m, b, ...]``, f32, in the memory of one batch."""
        return jax.lax.map(
            lambda x: answer(self.apply_fn(params, x, None), self.of).astype(jnp.float32), inputs
        )

    def _ask_all(self, params: PyTree, inputs: PyTree) -> jax.Array:
        """The same for everyone's batches, ``[K, m, b, ...]``."""
        return jax.lax.map(lambda x: self._ask(params, x), inputs)

    def _ask_in_turn(self, params: PyTree, own: PyTree, specs: tuple[P, ...]) -> jax.Array:
        """The mean of all models' answers to each worker's own batches; models go round a ring."""
        ask = self._over_workers(self._ask)
        leaves, treedef = jax.tree.flatten(params)
        ring = [(k, (k + 1) % self.num_workers) for k in range(self.num_workers)]

        @self._region(in_specs=specs, out_specs=specs)
        def pass_on(*shards: jax.Array) -> tuple[jax.Array, ...]:
            return tuple(permute(x, self.workers, ring) for x in shards)

        def hop(carry: Any, _: None) -> tuple[Any, None]:
            models, total = carry
            models = pass_on(*models)
            return (models, total + ask(jax.tree.unflatten(treedef, models), own)), None

        first = (tuple(leaves), self.place(ask(params, own), P(self.workers)))
        (_, total), _ = jax.lax.scan(hop, first, length=self.num_workers - 1)
        return total / self.num_workers

    def _take_means(self, said: jax.Array, key: jax.Array | None) -> jax.Array:
        """``[model, owner, m, b, ...]`` to means over the models, each at the owner."""
        return self._region(in_specs=(P(self.workers), P()), out_specs=P(self.workers))(
            lambda x, key: reduce_scatter_mean(x[0], self.workers, self.codec, key=key)
        )(said, key)

    def _tell_all(self, answers: jax.Array, key: jax.Array | None) -> jax.Array:
        return self._region(in_specs=(P(self.workers), P()), out_specs=P())(
            lambda x, key: all_gather(x, self.workers, self.codec, key=key_of(key, 1))
        )(answers, key)

    def _gather(self, own: PyTree) -> PyTree:
        """Everyone's inputs, of any dtype."""
        return self._region(in_specs=(P(self.workers),), out_specs=P())(
            lambda tree: jax.tree.map(
                lambda x: jax.lax.all_gather(x, self.workers, tiled=True, to="invarying"), tree
            )
        )(own)

    def _cut_out(self, everyones: PyTree) -> PyTree:
        """Each worker's own; a sharding constraint would divide first and gather everyone's."""
        return self._region(in_specs=(P(),), out_specs=P(self.workers))(
            lambda tree: jax.tree.map(
                lambda x: jax.lax.dynamic_index_in_dim(x, jax.lax.axis_index(self.workers)), tree
            )
        )(everyones)

    def _region(self, in_specs: Any, out_specs: Any) -> Callable[[Callable[..., Any]], Any]:
        """A ``shard_map`` manual over every axis: what is sent is what the device holds."""
        return lambda f: jax.shard_map(f, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs)

    def _for_each(self, tree: PyTree) -> PyTree:
        """What all have, with a leading worker dim: each its own copy.

        Mapped over only one of two arguments, a gather of rows makes the partitioner divide the
        samples over the workers first, and send them to where they were.
        """
        return self._region(in_specs=(P(),), out_specs=P(self.workers))(
            lambda tree: jax.tree.map(lambda x: x[None], tree)
        )(tree)

    def _over_workers(
        self, f: Callable[[PyTree, PyTree], jax.Array]
    ) -> Callable[[PyTree, PyTree], jax.Array]:
        """``f(params, inputs)`` on every worker at once; the other mesh axes stay automatic."""

        def unstacked(*trees: PyTree) -> jax.Array:
            return f(*jax.tree.map(lambda x: x[0], trees))[None]

        def run(params: PyTree, inputs: PyTree) -> jax.Array:
            with self._rules_context():
                if self.mesh.size > self.num_workers:
                    return jax.vmap(f, spmd_axis_name=self.workers)(params, inputs)
                # No worker dim in the products, of which CPU's compiler makes transposes and
                # grouped convolutions. Unchecked: nothing in the model is exchanged over the axis.
                return jax.shard_map(
                    unstacked,
                    mesh=self.mesh,
                    in_specs=(P(self.workers), P(self.workers)),
                    out_specs=P(self.workers),
                    check_vma=False,
                )(params, inputs)

        return run

    def stack(self, *batches: jax.Array) -> jax.Array:
        """Batches ``[K b, ...]`` as ``[K, m, b, ...]``."""
        split = [jnp.reshape(x, (self.num_workers, -1, *x.shape[1:])) for x in batches]
        return jnp.stack(split, axis=1)

    def place(self, tree: PyTree, spec: P) -> PyTree:
        sharding = NamedSharding(self.mesh, spec)
        return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, sharding), tree)

    def _rules_context(self) -> contextlib.AbstractContextManager[None]:
        if self.rules is None:
            return contextlib.nullcontext()
        return use_rules(self.mesh, self.rules, hide=axes_of(self.workers))


def _specs(params: PyTree) -> tuple[P, ...]:
    return tuple(x.sharding.spec for x in jax.tree.leaves(params))


def _nbytes(x: Any, shape: tuple[int, ...] | None = None) -> int:
    return math.prod(x.shape if shape is None else shape) * jnp.dtype(x.dtype).itemsize


def _shapes(tree: PyTree) -> list[tuple[str, str]]:
    return [(path, f"{x.dtype}{list(x.shape)}") for path, x in leaves_with_paths(tree)]
