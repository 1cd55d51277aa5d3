"""The parameters at the server, and what becomes of the updates that come in.

Without locks or waiting, which are the server's.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import jax

from jdml.communicate.pace.members import Members
from jdml.communicate.pace.messages import Applied, Arrival, Snapshot
from jdml.communicate.pace.payload import Format, Leaves, empty_like, frozen
from jdml.communicate.pace.rules.base import Book, Rule


class Model:
    """Parameters, the rule that changes them, and the book that the rule looks at.

    Attributes:
      leaves: The parameters, read-only arrays.
      apply_state: What the rule's apply remembers.
      book: Members, versions, and updates that are in but not due.
      staleness: How many applied updates were how many clocks stale.
    """

    def __init__(
        self,
        params: Any,
        rule: Rule,
        num_workers: int,
        push_format: Format,
        pull_format: Format,
        seed: int,
        on_applied: Callable[[Applied], None] | None,
        room: Callable[[Leaves], Leaves] = empty_like,
    ) -> None:
        self.rule, self.push_format, self.pull_format = rule, push_format, pull_format
        self._seed, self._on_applied = seed, on_applied
        self.leaves: Leaves = tuple(frozen(x) for x in jax.tree.leaves(params))
        self.book = Book(num_workers, push_format, Members(), room=room)
        self.apply_state = rule.apply.init(self.leaves, self.book)
        self.staleness: Counter[int] = Counter()
        self._published: Snapshot | None = None

    def release(self) -> bool:
        """Applies whatever is due; whether anything was."""
        book, released = self.book, False
        while batch := self.rule.pace.due(book):
            self.leaves, self.apply_state = self.rule.apply(
                self.leaves, self.apply_state, batch, book
            )
            released = True
            book.version += 1
            for arrival in batch:
                book.counted[arrival.worker] = book.version
                self.staleness[arrival.staleness] += 1
                if self._on_applied is not None:
                    self._on_applied(_applied(arrival, book.version))
        return released

    def publish(self) -> Snapshot:
        """The parameters as they are, encoded once for all who read this version."""
        version, min_clock = self.book.version, self.book.members.min_clock
        last = self._published
        if last is None or last.version != version:
            parcel = self.pull_format.encode(self.leaves, self._key(version))
            last = self._published = Snapshot(version, min_clock, parcel, self.pull_format)
        elif last.min_clock != min_clock:
            last = self._published = Snapshot(version, min_clock, last.parcel, self.pull_format)
        return last

    def _key(self, version: int) -> jax.Array | None:
        codec = self.pull_format.codec
        if codec is None or not codec.needs_key:
            return None
        # The workers' own keys are folded from the seed and their numbers.
        return jax.random.fold_in(jax.random.key(self._seed ^ 0x5EED), version)

    def to_state(self) -> dict[str, Any]:
        """Plain data from which :meth:`restore` makes the same model."""
        book = self.book
        return {
            "leaves": self.leaves,
            "num_workers": book.num_workers,
            "apply": jax.tree.leaves(self.apply_state),
            "version": book.version,
            "held": {slot: [tuple(a) for a in held] for slot, held in book.held.items()},
            "counted": dict(book.counted),
            "members": book.members.to_state(),
            "staleness": dict(self.staleness),
        }

    def restore(self, state: dict[str, Any], now: float) -> None:
        leaves = self.push_format.checked(state["leaves"])
        before = Book(state["num_workers"], self.push_format, Members())
        structure: Any = jax.tree.structure(self.rule.apply.init(leaves, before))
        if structure.num_leaves != len(state["apply"]):
            raise ValueError(
                f"restore: the rule's state was saved with {len(state['apply'])} leaves, and "
                f"{self.rule.apply} keeps {structure.num_leaves}: another rule."
            )
        self.leaves = tuple(frozen(x) for x in leaves)
        self.apply_state = self.rule.apply.resized(
            jax.tree.unflatten(structure, state["apply"]), self.leaves, self.book.num_workers
        )
        self.book = Book(
            self.book.num_workers,
            self.push_format,
            Members.from_state(state["members"], now),
            state["version"],
            {slot: [Arrival(*a) for a in held] for slot, held in state["held"].items()},
            dict(state["counted"]),
            self.book.room,
        )
        self.staleness = Counter(state["staleness"])
        self._published = None


def _applied(arrival: Arrival, version: int) -> Applied:
    delay = version - 1 - arrival.base_version
    return Applied(arrival.worker, arrival.clock, version, delay, arrival.staleness)
