"""A model cut into stages along its layers: the loss of a pipeline, and its gradients.

    pipe = pipeline(first, block, last, mesh, num_layers=8, schedule=one_f_one_b(), micro_batches=8)
    init, step = make_step(pipe, tx, mesh, specs=pipe.specs(specs))
    state = init(pipe.arrange(params), key)

``pipe(params, batch, key)`` is a loss like any other: ``jax.value_and_grad`` of it runs the
schedule, forward and backward, and a plain call the forward passes alone.
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from jdml.partition.pipeline.checks import check_arranged, check_batch, check_ends, check_entry
from jdml.partition.pipeline.division import Division, check_stack, divide, division_of
from jdml.partition.pipeline.ends import (
    Ends,
    check_specs,
    divided_ends,
    gathered,
    manual_specs,
    summed,
)
from jdml.partition.pipeline.execute import run
from jdml.partition.pipeline.parts import Keys, Local, Parts
from jdml.partition.pipeline.schedule import Schedule
from jdml.partition.pipeline.schedules import one_f_one_b
from jdml.partition.pipeline.timetable import Timetable, timetable
from jdml.sharding.paths import path_str

PyTree = Any
Metrics = dict[str, jax.Array]


def pipeline(
    first: Callable[..., PyTree],
    block: Callable[..., PyTree],
    last: Callable[..., tuple[jax.Array, Metrics]],
    mesh: Mesh,
    *,
    num_layers: int,
    micro_batches: int,
    axis: str = "stage",
    schedule: Schedule | None = None,
    layers: Sequence[int] | None = None,
    stack: str = "layers",
    remat: bool = False,
) -> "Pipeline":
    """A model of ``num_layers`` like blocks on the stages of a mesh axis, as a loss function.

    ``loss = mean_b last(others, block(l_n, … block(l_1, first(others, b), b) …, b), b)``, over
    micro-batches b.

    Parameters are a dict whose entry ``stack`` has the blocks', stacked along dim 0, laid out by
    :meth:`Pipeline.arrange`; the other entries are given to ``first`` and ``last``, and may be used
    by both (a tied table). These are on every stage, though used on the ends alone, unless
    :meth:`Pipeline.divide_ends` gives each stage a slice; one that they read by rows is whole on
    every device within a step where the mesh leaves two axes automatic
    (:mod:`jdml.partition.pipeline.rows`). ``x`` may be any pytree of float arrays; an auxiliary
    loss can travel in it. Keys differ by micro-batch and layer and do not depend on the cut: the
    numbers are those of :meth:`Pipeline.reference`, one device's, to rounding.

    Kept between F and B is what ``jax.vjp`` of a block keeps (wrap it in ``jax.checkpoint`` to keep
    less) for as many micro-batches as the schedule says; ``first`` and the final part are computed
    once in F and in B respectively, ``first`` once more for its gradient. Gradients are added up in
    f32. Metrics, batch and key get no gradients.

    On the wire, per device and step: each part's output once forward and its gradient once back,
    ``2 chunks M`` × the bytes of a micro-batch's x, and the gradients of ``others`` in one
    all-reduce: with n bytes of them and S stages, ``2 (S-1)/S n``.

    Args:
      first: ``(others, batch, key) -> x``, on one micro-batch.
      block: ``(layer, x, batch, key) -> x``, of the same shapes and dtypes.
      last: ``(others, x, batch, key) -> (loss, metrics)``: means over the micro-batch's samples, a
        float scalar and a dict of float arrays.
      mesh: The mesh; with other axes, batch and parameters may be divided over them, and ``block``
        be parallel over them, as in any ``jax.jit``.
      num_layers: Blocks in the stack.
      micro_batches: M. Micro-batch i takes every M-th sample from the i-th on.
      axis: The stage axis.
      schedule: :func:`gpipe`, :func:`one_f_one_b` (the default), :func:`interleaved`,
        :func:`zero_bubble`.
      layers: Blocks of each part, in the model's order; None divides equally. With interleaved
        chunks, part p is on stage ``p % stages``.
      stack: The entry of the parameters that is the stack.
      remat: Keep the input of each part alone and run it forward again before its backward pass:
        a third more computation, activations of one micro-batch instead of many.

    Raises:
      ValueError: an axis that the mesh lacks; layers that the parts do not divide; micro-batches
        fewer than stages or that the schedule cannot group; ``remat`` with a schedule that splits
        the backward pass.
    """
    schedule = one_f_one_b() if schedule is None else schedule
    if axis not in mesh.axis_names:
        raise ValueError(
            f"pipeline: the mesh has axes {mesh.axis_names}, not {axis!r}. Name one of them, or "
            f"build the mesh with it: make_mesh({{{axis!r}: ..., ...}})."
        )
    num_stages = mesh.shape[axis]
    schedule.check(num_stages, micro_batches)
    if remat and schedule.splits_backward:
        raise ValueError(
            f"pipeline: remat=True with {schedule.name}, whose W would need what B has computed "
            "again. Wrap the block in jax.checkpoint instead, or take another schedule."
        )
    if layers is None:
        division = divide(num_layers, num_stages, schedule.chunks)
    else:
        division = division_of(layers, num_stages, schedule.chunks)
        if division.num_layers != num_layers:
            raise ValueError(
                f"pipeline: layers={tuple(layers)} are {division.num_layers} in all; expected "
                f"num_layers={num_layers}."
            )
    return Pipeline(
        Parts(first, block, last), mesh, axis, schedule, micro_batches, division, stack, remat
    )


class Pipeline:
    """What :func:`pipeline` returns: ``(params, batch, key=None) -> (loss, metrics)``.

    Attributes:
      division: Which layers are on which stage.
      schedule: The schedule.
      timetable: What each stage does in each tick of a training step.
      ends: Specs of the leaves, but the stack's, that are divided over the stages, by path; empty
        unless :meth:`divide_ends` made this.
      mapping: What ``make_step`` is to map workers with: a region over the stages cannot be put
        under ``vmap`` over another mesh axis.
    """

    mapping: ClassVar[Literal["shard_map"]] = "shard_map"

    def __init__(
        self,
        parts: Parts,
        mesh: Mesh,
        axis: str,
        schedule: Schedule,
        micro_batches: int,
        division: Division,
        stack: str,
        remat: bool,
        ends: Ends | None = None,
    ) -> None:
        self.parts = parts
        self.mesh = mesh
        self.axis = axis
        self.schedule = schedule
        self.micro_batches = micro_batches
        self.division = division
        self.stack = stack
        self.remat = remat
        self.ends = ends or {}
        self.timetable = timetable(schedule.orders(division.num_stages, micro_batches))
        forward = [
            [op for op in order if op.kind == "F"]
            for order in schedule.orders(division.num_stages, micro_batches)
        ]
        self._forward_only = timetable(forward)
        self._loss = jax.custom_vjp(self._evaluate)
        self._loss.defvjp(self._value_and_gradients, _scaled)

    def __call__(self, params: PyTree, batch: PyTree, key: Any = None) -> tuple[jax.Array, Metrics]:
        """The mean loss over the micro-batches, and the means of the metrics.

        Args:
          params: As :meth:`arrange` lays them out.
          batch: Leaves ``[batch, ...]``.
          key: Typed key, or None: the parts then get None.

        Raises:
          ValueError: before anything is compiled: parameters not laid out so; a batch that the
            micro-batches do not divide.
        """
        check_entry(params, self.stack)
        check_arranged(params[self.stack], self.stack, self.division)
        check_ends(self._others(params), self.ends, self.axis, self.division.num_stages)
        check_batch(batch, self.micro_batches)
        return self._loss(params, batch, key)

    def arrange(self, params: PyTree) -> PyTree:
        """The parameters with the stack as ``[chunks, stages, layers of a part, ...]``.

        Raises:
          ValueError: no entry ``stack``, or one with another number of layers.
        """
        check_entry(params, self.stack)
        return {**params, self.stack: self.division.arrange(params[self.stack])}

    def divide_ends(self, params: PyTree, specs: PyTree) -> "Pipeline":
        """The same pipeline, each stage with a slice of the parameters of first and final part.

        Of each leaf but the stack's, the largest dim that no axis divides yet and the stages do is
        divided over them; a leaf without one stays whole. :meth:`specs` of the result says so, and
        the gradients come out so: these parameters, their gradients and their optimiser state take
        ``1/S`` of the memory from step to step. Within a step each stage gathers them, and holds
        them and the f32 sums of their gradients whole until it ends.

        On the wire, per device and step, of n bytes of them: an all-gather in their own dtype and,
        in the place of the gradients' all-reduce, a reduce-scatter in f32, ``(S-1)/S n`` each: what
        the all-reduce would take, where they are f32. Of a leaf that another axis divides too, n
        is what a device stores if the mesh names the stage axis before that one; else the leaf is
        put together over that axis first.

        Args:
          params: The parameters, plain or arranged, or their shapes and dtypes.
          specs: The plain specs, those that :meth:`specs` will be given.

        Raises:
          ValueError: no entry ``stack``; specs of another structure.
        """
        check_entry(params, self.stack)
        ends = divided_ends(self._others(params), self._others(specs), self.mesh, self.axis)
        return Pipeline(
            self.parts,
            self.mesh,
            self.axis,
            self.schedule,
            self.micro_batches,
            self.division,
            self.stack,
            self.remat,
            ends,
        )

    def restore(self, params: PyTree) -> PyTree:
        """The inverse: the stack as ``[layers, ...]``, as one device has it."""
        return {**params, self.stack: self.division.restore(params[self.stack])}

    def specs(self, specs: PyTree) -> PyTree:
        """Specs of the arranged parameters from those of the plain ones.

        Args:
          specs: A ``PartitionSpec`` for each leaf, the stack's with an entry for its dim of layers.

        Raises:
          ValueError: a spec that divides the dim of layers; specs that are not those that
            :meth:`divide_ends` was given.
        """

        def arranged(spec: P) -> P:
            if spec and spec[0] is not None:
                raise ValueError(
                    f"pipeline: a leaf of the stack has spec {spec}, which divides its layers over "
                    f"{spec[0]!r}. Leave that entry None: they are divided over {self.axis!r}."
                )
            return P(None, self.axis, *(spec or (None,)))

        is_spec = lambda x: isinstance(x, P)  # noqa: E731
        stack = jax.tree.map(arranged, specs[self.stack], is_leaf=is_spec)
        others = self._others(specs)
        check_specs(others, self.ends, self.axis)
        others = jax.tree_util.tree_map_with_path(
            lambda path, spec: self.ends.get(path_str(path), spec), others, is_leaf=is_spec
        )
        return {**others, self.stack: stack}

    def reference(
        self, params: PyTree, batch: PyTree, key: Any = None
    ) -> tuple[jax.Array, Metrics]:
        """The same loss without a pipeline, one micro-batch after the other, differentiable.

        Args:
          params: The plain ones, the stack ``[layers, ...]``.
          batch: Leaves ``[batch, ...]``.
          key: Typed key, or None.
        """
        check_entry(params, self.stack)
        check_stack(params[self.stack], self.division.num_layers)
        check_batch(batch, self.micro_batches)
        first, block, last = self.parts
        others = self._others(params)
        keys = Keys(key, self.division.num_layers)

        def one(total: Any, xs: Any) -> tuple[Any, None]:
            batch, m = xs

            def layer(x: PyTree, ys: Any) -> tuple[PyTree, None]:
                p, number = ys
                return block(p, x, batch, keys.layer(m, number)), None

            x = first(others, batch, keys.first(m))
            numbers = jnp.arange(self.division.num_layers)
            x, _ = jax.lax.scan(layer, x, (params[self.stack], numbers))
            terms = last(others, x, batch, keys.last(m))
            return jax.tree.map(lambda t, a: t + a / self.micro_batches, total, terms), None

        xs = (self._divided(batch), jnp.arange(self.micro_batches))
        micro = jax.tree.map(lambda a: a[0], xs)
        terms = jax.eval_shape(
            lambda micro: last(
                others, first(others, micro[0], keys.first(0)), micro[0], keys.last(0)
            ),
            micro,
        )
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), terms)
        total, _ = jax.lax.scan(one, zeros, xs)
        return total

    def _evaluate(self, params: PyTree, batch: PyTree, key: Any) -> tuple[jax.Array, Metrics]:
        loss, metrics, _ = self._run(params, batch, key, self._forward_only, backward=False)
        return loss, metrics

    def _value_and_gradients(self, params: PyTree, batch: PyTree, key: Any) -> Any:
        loss, metrics, gradients = self._run(params, batch, key, self.timetable, backward=True)
        return (loss, metrics), gradients

    def _run(
        self, params: PyTree, batch: PyTree, key: Any, timetable: Timetable, backward: bool
    ) -> tuple[jax.Array, Metrics, PyTree]:
        axis, division = self.axis, self.division
        stack = params[self.stack]
        others = self._others(params)

        def on_stage(
            table: jax.Array,
            counts: jax.Array,
            offsets: jax.Array,
            stack: PyTree,
            others: PyTree,
            batches: PyTree,
            key: Any,
        ) -> Any:
            local = Local(
                jax.tree.map(lambda a: a[:, 0], stack),
                gathered(others, self.ends, self.mesh, axis),
                batches,
                key,
                counts[:, 0],
                offsets[:, 0],
            )
            loss, metrics, layers, rest = run(
                self.parts,
                local,
                timetable,
                table[:, 0],
                axis,
                division.num_layers,
                backward=backward,
                split=backward and self.schedule.splits_backward,
                remat=backward and self.remat,
                static_count=division.size if division.equal else None,
            )
            totals, rest = summed((loss, metrics), rest, self.ends, self.mesh, axis)
            return totals, rest, jax.tree.map(lambda a: a[:, None], layers)

        by_stage, whole = P(None, axis), P()
        slices = manual_specs(others, self.ends, axis)
        # Unchecked: types that vary over the stages would have to be declared in the user's model,
        # and no gradient passes through this region.
        (loss, metrics), rest, layers = jax.shard_map(
            on_stage,
            mesh=None if _inside_a_region() else self.mesh,
            in_specs=(by_stage, by_stage, by_stage, by_stage, slices, whole, whole),
            out_specs=(whole, slices if backward else whole, by_stage),
            axis_names={axis},
            check_vma=False,
        )(
            jnp.asarray(timetable.table()),
            jnp.asarray(division.counts),
            jnp.asarray(division.offsets),
            stack,
            others,
            self._divided(batch),
            key,
        )
        gradients: PyTree = ()
        if backward:
            gradients = jax.tree.map(
                lambda g, p: g.astype(p.dtype), {**rest, self.stack: layers}, dict(params)
            )
        return loss, metrics, gradients

    def _others(self, params: PyTree) -> PyTree:
        return {name: x for name, x in params.items() if name != self.stack}

    def _divided(self, batch: PyTree) -> PyTree:
        """``[batch, ...]`` → ``[micro_batches, batch / micro_batches, ...]``."""

        def split(x: Any) -> jax.Array:
            # Every M-th sample: none changes its device where an axis divides the batch.
            x = jnp.asarray(x)
            return jnp.swapaxes(x.reshape(-1, self.micro_batches, *x.shape[1:]), 0, 1)

        return jax.tree.map(split, batch)


def _scaled(gradients: PyTree, cotangents: Any) -> tuple[PyTree, None, None]:
    by_loss, _ = cotangents
    return jax.tree.map(lambda g: g * by_loss.astype(g.dtype), gradients), None, None


def _inside_a_region() -> bool:
    """Whether a surrounding ``shard_map`` gives the mesh already."""
    return AxisType.Manual in jax.sharding.get_abstract_mesh().axis_types
