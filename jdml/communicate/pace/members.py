"""Who takes part: incarnations, clocks, and which pushes have been seen.

Bookkeeping without locks or waiting, which are the server's. A worker's **clock** is the number of
its pushes that have come without a gap. Push number ``seq`` is its update of clock ``seq``: so one
that comes twice is known, and one that overtakes another does not advance the clock before it.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any, NamedTuple

from jdml.communicate.pace.errors import Evicted


class Pulled(NamedTuple):
    """What is remembered of a pull until the update that was computed on it has come."""

    min_clock: int
    leaves: Any


@dataclasses.dataclass
class Member:
    """One worker.

    Attributes:
      incarnation: Which of its lives.
      clock: Its pushes that have come without a gap: the number of the next one.
      last_seen: When it last spoke, on the server's own clock.
      ahead: Numbers of pushes that overtook an earlier one.
      waiting: How many of its calls the server keeps waiting; then silence means nothing.
      refused: Numbers of pushes that came too late to count.
      pulled: By version, what it read and may still base an update on.
      why: Why it is out, or "" if it is in.
    """

    incarnation: int
    clock: int
    last_seen: float
    waiting: int = 0
    ahead: set[int] = dataclasses.field(default_factory=set)
    refused: set[int] = dataclasses.field(default_factory=set)
    pulled: dict[int, Pulled] = dataclasses.field(default_factory=dict)
    why: str = ""

    @property
    def live(self) -> bool:
        return not self.why

    def has(self, seq: int) -> bool:
        """Whether that push came before."""
        return seq < self.clock or seq in self.ahead


class Members:
    """All workers that ever registered, by number."""

    def __init__(self) -> None:
        self._all: dict[int, Member] = {}
        self._at_clock: dict[int, int] = {}
        self.num_live = 0
        self.min_clock = 0
        """Least clock of the live members; it never falls."""

    def register(self, worker: int, incarnation: int, now: float) -> Member:
        """A new worker starts at the least clock of the others; one that returns, where it was."""
        known = self._all.get(worker)
        clock = self.min_clock
        if known is not None:
            if incarnation == known.incarnation and known.live:
                raise ValueError(
                    f"worker {worker} is registered already, as incarnation {incarnation}: two "
                    "workers must not share a number; one that was started anew takes a greater "
                    "incarnation."
                )
            if incarnation <= known.incarnation:
                raise Evicted(self._fenced(worker, incarnation, known))
            # Nobody will send what the old incarnation left out.
            clock = max([clock, known.clock, *(seq + 1 for seq in known.ahead)])
            if known.live:
                # The least clock waits for the new one, which may be as far behind.
                self._drop(known)
        member = self._all[worker] = Member(incarnation, clock, now)
        self.num_live += 1
        self._at_clock[clock] = self._at_clock.get(clock, 0) + 1
        self._advance()
        return member

    def find(self, worker: int, incarnation: int | None = None) -> Member:
        """The live member.

        Raises:
          Evicted: it is none, or another incarnation than the one given.
        """
        member = self._all.get(worker)
        if member is None:
            raise Evicted(f"worker {worker} is not registered; call register(worker, incarnation).")
        if incarnation is not None and incarnation != member.incarnation:
            raise Evicted(self._fenced(worker, incarnation, member))
        if member.why:
            raise Evicted(f"worker {worker} (incarnation {member.incarnation}): {member.why}")
        return member

    def count(self, member: Member, seq: int, base_version: int) -> None:
        """A push has come: advances the clock over all that have come without a gap."""
        member.ahead.add(seq)
        before = member.clock
        while member.clock in member.ahead:
            member.ahead.discard(member.clock)
            member.clock += 1
        if member.clock == before:
            return
        self._move(before, member.clock)
        # Later pushes are based on this version or on later ones.
        for version in [v for v in member.pulled if v < base_version]:
            del member.pulled[version]

    def skip_to(self, member: Member, clock: int) -> None:
        """Moves a member's clock on to ``clock``: what it left out will never come."""
        if clock > member.clock:
            before, member.clock = member.clock, clock
            member.ahead = {seq for seq in member.ahead if seq >= clock}
            self._move(before, clock)

    def evict(self, worker: int, why: str) -> bool:
        """Takes a worker out; whether it was in."""
        member = self._all.get(worker)
        if member is None or not member.live:
            return False
        self._drop(member)
        self._advance()
        member.why = why
        member.pulled.clear()
        return True

    def live(self) -> Iterable[tuple[int, Member]]:
        return ((worker, m) for worker, m in self._all.items() if m.live)

    def last_incarnation(self, worker: int) -> int:
        """The newest that ever registered, or -1."""
        member = self._all.get(worker)
        return -1 if member is None else member.incarnation

    def is_live(self, worker: int) -> bool:
        member = self._all.get(worker)
        return member is not None and member.live

    def _drop(self, member: Member) -> None:
        self.num_live -= 1
        self._at_clock[member.clock] -= 1

    def _move(self, before: int, after: int) -> None:
        self._at_clock[before] -= 1
        self._at_clock[after] = self._at_clock.get(after, 0) + 1
        if before == self.min_clock:
            self._advance()

    def _advance(self) -> None:
        if self.num_live == 0:
            return
        while not self._at_clock.get(self.min_clock, 0):
            self._at_clock.pop(self.min_clock, None)
            self.min_clock += 1

    @staticmethod
    def _fenced(worker: int, incarnation: int, known: Member) -> str:
        return (
            f"worker {worker}: incarnation {incarnation} was replaced; {known.incarnation} is "
            "registered."
        )

    def to_state(self) -> dict[str, Any]:
        """Plain data from which :meth:`from_state` makes the same members."""
        return {
            "min_clock": self.min_clock,
            "members": [
                {
                    "worker": worker,
                    "incarnation": m.incarnation,
                    "clock": m.clock,
                    "ahead": sorted(m.ahead),
                    "refused": sorted(m.refused),
                    "pulled": [(v, p.min_clock, p.leaves) for v, p in m.pulled.items()],
                    "why": m.why,
                }
                for worker, m in self._all.items()
            ],
        }

    @classmethod
    def from_state(cls, state: dict[str, Any], now: float) -> "Members":
        members = cls()
        members.min_clock = state["min_clock"]
        for entry in state["members"]:
            member = Member(
                incarnation=entry["incarnation"],
                clock=entry["clock"],
                last_seen=now,
                ahead=set(entry["ahead"]),
                refused=set(entry["refused"]),
                pulled={v: Pulled(m, leaves) for v, m, leaves in entry["pulled"]},
                why=entry["why"],
            )
            members._all[entry["worker"]] = member
            if member.live:
                members.num_live += 1
                clock = member.clock
                members._at_clock[clock] = members._at_clock.get(clock, 0) + 1
        return members
