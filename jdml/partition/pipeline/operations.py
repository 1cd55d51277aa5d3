"""What a stage does in a tick: F, B, W, or nothing, on the slots that its row names."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jdml.partition.pipeline.buffers import get, put_at, take, wide, zeros
from jdml.partition.pipeline.layer import Layer, make_layer
from jdml.partition.pipeline.parts import (
    Keys,
    Local,
    Parts,
    added,
    check_block,
    check_exchanges,
    replaced,
    used_leaves,
)
from jdml.partition.pipeline.rows import put_together, tables
from jdml.partition.pipeline.schedule import Kind
from jdml.partition.pipeline.timetable import BRANCHES, COLUMNS, Timetable

PyTree = Any


class Mail(NamedTuple):
    """What neighbours sent, in slots."""

    input: PyTree
    gradient: PyTree


class State(NamedTuple):
    """What operations change. Buffers are of slots, then of a part's layers; see Timetable."""

    kept: list[jax.Array]
    kept_for_w: list[jax.Array]
    crossing: list[jax.Array]
    layer_gradients: PyTree
    other_gradients: PyTree
    loss: jax.Array
    metrics: dict[str, jax.Array]


class Read(NamedTuple):
    """What an operation finds in the slots that its row names."""

    input: PyTree
    gradient: PyTree
    kept: list[jax.Array]
    kept_for_w: list[jax.Array]
    crossing: list[jax.Array]


class Row:
    """One stage's line of the timetable: ``row.branch``, ``row.micro_batch``, …"""

    def __init__(self, numbers: jax.Array) -> None:
        self._numbers = numbers

    def __getattr__(self, name: str) -> jax.Array:
        return self._numbers[COLUMNS.index(name)]


class Operations:
    """The operations of a stage."""

    def __init__(
        self,
        parts: Parts,
        local: Local,
        timetable: Timetable,
        num_layers: int,
        backward: bool,
        split: bool,
        remat: bool,
        static_count: int | None,
    ) -> None:
        self.parts = parts
        self.local = local
        self.slots = timetable.slots
        self.backward = backward
        self.split = split
        self.remat = remat
        self.static_count = static_count
        self.keys = Keys(local.key, num_layers)
        self.num_micro_batches = jax.tree.leaves(local.batches)[0].shape[0]
        others, batch = local.others, self.batch(0)
        self.x = jax.eval_shape(parts.first, others, batch, self.keys.first(0))
        loss, metrics = jax.eval_shape(parts.last, others, self.x, batch, self.keys.last(0))
        self.loss_shapes = (loss, metrics)
        layer = jax.tree.map(lambda a: a[0, 0], local.layers)
        extras = (batch, self.keys.layer(0, 0))
        check_block(self.x, jax.eval_shape(parts.block, layer, self.x, *extras))
        if timetable.columns["branch"].shape[1] > 1:
            check_exchanges(parts.first, others, batch, self.keys.first(0))
            check_exchanges(parts.block, layer, self.x, *extras)
            check_exchanges(parts.last, others, self.x, batch, self.keys.last(0))
        self.layer: Layer | None = None
        if backward:
            self.layer = make_layer(
                lambda p, x, extras: parts.block(p, x, *extras), layer, self.x, extras, split
            )
        # Gradients only of what each part uses: an untied table takes no part in the head.
        self.used_by_first = used_leaves(parts.first, others, batch, self.keys.first(0))
        self.used_by_last = used_leaves(parts.last, others, self.x, batch, self.keys.last(0))
        read = tables(parts.first, others, batch, self.keys.first(0))
        read |= tables(parts.last, others, self.x, batch, self.keys.last(0))
        self.local = local._replace(others=put_together(others, read))

    def batch(self, micro_batch: Any) -> PyTree:
        return take(self.local.batches, micro_batch)

    def start(self) -> tuple[Mail, State]:
        """Buffers of zeros."""
        inputs = zeros(self.x, max(1, self.slots["input"]))  # one stage alone is sent nothing
        loss, metrics = jax.tree.map(lambda s: jnp.zeros(s.shape, wide(s.dtype)), self.loss_shapes)
        if self.layer is None:
            return Mail(inputs, ()), State([], [], [], (), (), loss, metrics)
        size = jax.tree.leaves(self.local.layers)[0].shape[1]
        kept: Any = [zeros(s, self.slots["kept"], size) for s in self.layer.kept]
        if self.remat:
            kept = [zeros(s, self.slots["kept"]) for s in jax.tree.leaves(self.x)]
        totals = lambda a: jnp.zeros(a.shape, wide(a.dtype))  # noqa: E731
        state = State(
            kept,
            [zeros(s, self.slots["kept_for_w"], size) for s in self.layer.kept_for_w],
            [zeros(s, self.slots["crossing"], size) for s in self.layer.crossing],
            jax.tree.map(totals, self.local.layers),
            jax.tree.map(totals, self.local.others),
            loss,
            metrics,
        )
        return Mail(inputs, zeros(self.x, self.slots["gradient"])), state

    def operate(self, mail: Mail, state: State, row: Row) -> tuple[State, PyTree, PyTree]:
        """``(state, what goes forward, what goes back)`` after one tick's operation."""
        # Read here and not in the branches: a buffer that one branch reads and returns as it came,
        # and another writes to, XLA copies whole in every tick.
        read = Read(
            take(mail.input, row.input),
            take(mail.gradient, row.gradient) if self.backward else (),
            self._read(state.kept, row.kept, row, "B"),
            self._read(state.kept_for_w, row.kept_for_w, row, "B", "W"),
            self._read(state.crossing, row.crossing, row, "W"),
        )
        branches = [self.idle, self.f]
        if self.backward:
            branches.append(self.b)
        if self.split:
            branches.append(self.w)
        # Named, so that who reads the compiled program can tell how often each of them runs.
        with jax.named_scope("branch.stage"):
            return jax.lax.switch(row.branch, [lambda f=f: f(read, state, row) for f in branches])

    def _read(
        self, buffers: list[jax.Array], slot: jax.Array, row: Row, *readers: Kind
    ) -> list[jax.Array]:
        """The slot if the row's operation is among the readers, else zeros."""
        if not buffers:
            return []
        is_read = jnp.isin(row.branch, jnp.array([BRANCHES.index(kind) for kind in readers]))
        return jax.lax.cond(
            is_read,
            lambda: take(buffers, slot),
            lambda: [jnp.zeros(a.shape[1:], a.dtype) for a in buffers],
        )

    def idle(self, read: Read, state: State, row: Row) -> tuple[State, PyTree, PyTree]:
        return state, self._nothing(), self._nothing() if self.backward else ()

    def f(self, read: Read, state: State, row: Row) -> tuple[State, PyTree, PyTree]:
        m, batch, others = row.micro_batch, self.batch(row.micro_batch), self.local.others
        x = jax.lax.cond(
            row.is_first == 1,
            lambda: self.parts.first(others, batch, self.keys.first(m)),
            lambda: read.input,
        )
        if self.layer is None:
            y = self._layers(row, x, lambda i, p, x: self.parts.block(p, x, *self._extras(row, i)))
            loss, metrics = jax.lax.cond(
                row.is_last == 1,
                lambda: self._loss(others, y, batch, m),
                lambda: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), self.loss_shapes),
            )
            return self._add_loss(state, loss, metrics), y, ()
        if self.remat:
            kept = [
                put_at(a, b, row.kept) for a, b in zip(state.kept, jax.tree.leaves(x), strict=True)
            ]
            y = self._forward(row, x, None, row.kept, row.kept_for_w)[0]
            return state._replace(kept=kept), y, self._nothing()
        buffers = (state.kept, state.kept_for_w)
        y, (kept, for_w) = self._forward(row, x, buffers, row.kept, row.kept_for_w)
        return state._replace(kept=kept, kept_for_w=for_w), y, self._nothing()

    def b(self, read: Read, state: State, row: Row) -> tuple[State, PyTree, PyTree]:
        assert self.layer is not None
        layer, others = self.layer, self.local.others
        m, batch = row.micro_batch, self.batch(row.micro_batch)
        ends = (state.other_gradients, state.loss, state.metrics)

        def final() -> tuple[Any, PyTree]:
            leaves, treedef = jax.tree.flatten(others)

            def loss_of(used: list[jax.Array], y: PyTree) -> Any:
                whole = jax.tree.unflatten(treedef, replaced(leaves, self.used_by_last, used))
                return self._loss(whole, y, batch, m)

            used = [leaves[i] for i in self.used_by_last]
            (loss, metrics), (d_used, dy) = jax.value_and_grad(loss_of, (0, 1), has_aux=True)(
                used, read.gradient
            )
            new = self._add_loss(state, loss, metrics)
            gradients = added(state.other_gradients, self.used_by_last, d_used)
            return (gradients, new.loss, new.metrics), dy

        ends, dy = jax.lax.cond(row.is_last == 1, final, lambda: (ends, read.gradient))
        if self.split:
            dx, crossing = self._backward_input(read, state.crossing, row, dy)
            state = state._replace(crossing=crossing)
        else:
            kept = self._remade(read, row) if self.remat else read.kept

            def layer_back(i: Any, p: PyTree, carry: Any) -> Any:
                dy, gradients = carry
                dx, dp = layer.backward(p, self._extras(row, i), take(kept, i), dy)
                return dx, self._add_layer(gradients, row, i, dp)

            dx, gradients = self._layers(
                row, (dy, state.layer_gradients), layer_back, backwards=True
            )
            state = state._replace(layer_gradients=gradients)

        def initial() -> PyTree:
            leaves, treedef = jax.tree.flatten(others)

            def x_of(used: list[jax.Array]) -> PyTree:
                whole = jax.tree.unflatten(treedef, replaced(leaves, self.used_by_first, used))
                return self.parts.first(whole, batch, self.keys.first(m))

            _, pull = jax.vjp(x_of, [leaves[i] for i in self.used_by_first])
            return added(ends[0], self.used_by_first, pull(dx)[0])

        gradients = jax.lax.cond(row.is_first == 1, initial, lambda: ends[0])
        state = state._replace(other_gradients=gradients, loss=ends[1], metrics=ends[2])
        return state, self._nothing(), dx

    def w(self, read: Read, state: State, row: Row) -> tuple[State, PyTree, PyTree]:
        assert self.layer is not None
        layer = self.layer

        def layer_w(i: Any, p: PyTree, gradients: PyTree) -> PyTree:
            for_w, crossed = take(read.kept_for_w, i), take(read.crossing, i)
            dp = layer.backward_params(p, self._extras(row, i), for_w, crossed)
            return self._add_layer(gradients, row, i, dp)

        gradients = self._layers(row, state.layer_gradients, layer_w)
        return state._replace(layer_gradients=gradients), self._nothing(), self._nothing()

    def _forward(
        self, row: Row, x: PyTree, kept: Any, slot: Any, slot_for_w: Any
    ) -> tuple[PyTree, Any]:
        """A part's forward pass, and the buffers, if any, with what it leaves in these slots."""
        assert self.layer is not None
        layer = self.layer

        def one(i: Any, p: PyTree, carry: Any) -> Any:
            x, buffers = carry
            y, leaves, for_w = layer.forward(p, x, self._extras(row, i))
            if buffers is not None:
                buffers = (
                    [put_at(a, b, slot, i) for a, b in zip(buffers[0], leaves, strict=True)],
                    [put_at(a, b, slot_for_w, i) for a, b in zip(buffers[1], for_w, strict=True)],
                )
            return y, buffers

        return self._layers(row, (x, kept), one)

    def _remade(self, read: Read, row: Row) -> list[jax.Array]:
        """What a part's forward pass leaves for its backward pass, from the part's input."""
        assert self.layer is not None
        x = jax.tree.unflatten(jax.tree.structure(self.x), read.kept)
        size = jax.tree.leaves(self.local.layers)[0].shape[1]
        empty = [zeros(s, 1, size) for s in self.layer.kept]
        _, (kept, _) = self._forward(row, x, (empty, []), 0, 0)
        return take(kept, 0)

    def _backward_input(
        self, read: Read, crossing: list[jax.Array], row: Row, dy: PyTree
    ) -> tuple[PyTree, list[jax.Array]]:
        assert self.layer is not None
        layer = self.layer

        def one(i: Any, p: PyTree, carry: Any) -> Any:
            dy, crossing = carry
            kept, for_w = take(read.kept, i), take(read.kept_for_w, i)
            dx, crossed = layer.backward_input(p, self._extras(row, i), kept, for_w, dy)
            crossing = [
                put_at(a, b, row.crossing, i) for a, b in zip(crossing, crossed, strict=True)
            ]
            return dx, crossing

        return self._layers(row, (dy, crossing), one, backwards=True)

    def _layers(
        self, row: Row, state: Any, f: Callable[[Any, PyTree, Any], Any], backwards: bool = False
    ) -> Any:
        """``state = f(i, layer i of the row's chunk, state)`` over the chunk's layers."""
        count: Any = self.static_count
        if count is None:
            count = self.local.counts[row.chunk]

        def body(step: Any, state: Any) -> Any:
            i = count - 1 - step if backwards else step
            return f(i, jax.tree.map(lambda a: get(a, row.chunk, i), self.local.layers), state)

        if count is self.static_count and count == 1:
            return body(0, state)
        return jax.lax.fori_loop(0, count, body, state)

    def _extras(self, row: Row, i: Any) -> tuple[PyTree, Any]:
        number = self.local.offsets[row.chunk] + i
        return self.batch(row.micro_batch), self.keys.layer(row.micro_batch, number)

    def _loss(self, others: PyTree, y: PyTree, batch: PyTree, m: Any) -> Any:
        """The micro-batch's share of the means."""
        loss, metrics = self.parts.last(others, y, batch, self.keys.last(m))
        return jax.tree.map(lambda a: a / self.num_micro_batches, (loss, metrics))

    def _add_loss(self, state: State, loss: jax.Array, metrics: dict[str, jax.Array]) -> State:
        loss, metrics = jax.tree.map(
            lambda total, a: total + a.astype(total.dtype),
            (state.loss, state.metrics),
            (loss, metrics),
        )
        return state._replace(loss=loss, metrics=metrics)

    def _add_layer(self, gradients: PyTree, row: Row, i: Any, dp: PyTree) -> PyTree:
        def add(total: jax.Array, d: jax.Array) -> jax.Array:
            return put_at(total, get(total, row.chunk, i) + d.astype(total.dtype), row.chunk, i)

        return jax.tree.map(add, gradients, dp)

    def _nothing(self) -> PyTree:
        return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), self.x)
