"""Parameters spread over several servers, each with an equal share of the bytes."""

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jdml.communicate.pace.messages import Ack, MemberInfo, Registration, Snapshot, Traffic
from jdml.communicate.pace.payload import Format, Leaves, Parcel, Sender
from jdml.communicate.pace.rules.base import Rule
from jdml.communicate.pace.server import Server

PyTree = Any


class Piece(NamedTuple):
    """Elements ``start`` to ``stop`` of a leaf, in row-major order."""

    leaf: int
    start: int
    stop: int


def equal_shares(leaves: Sequence[np.ndarray], num_shares: int) -> list[list[Piece]]:
    """Cuts the leaves, laid end to end, into runs of as many bytes each, to the element."""
    ends = np.cumsum([0] + [x.nbytes for x in leaves])
    cuts = [int(ends[-1]) * k // num_shares for k in range(num_shares + 1)]
    shares: list[list[Piece]] = []
    for low, high in itertools.pairwise(cuts):
        share = []
        for i, x in enumerate(leaves):
            start, stop = (
                min(max(-(-(cut - int(ends[i])) // x.itemsize), 0), x.size) for cut in (low, high)
            )
            if start < stop:
                share.append(Piece(i, start, stop))
        shares.append(share)
    return shares


class ShardedSnapshot(NamedTuple):
    """A snapshot of each server.

    Attributes:
      version: One for each server: what ``push`` is given as ``base_version``.
      min_clock: The least of theirs.
      shards: Theirs.
      server: Where they are from.
    """

    version: tuple[int, ...]
    min_clock: int
    shards: tuple[Snapshot, ...]
    server: "ShardedServer"

    @property
    def parcel(self) -> Parcel:
        return _joined([s.parcel for s in self.shards])

    @property
    def params(self) -> PyTree:
        return self.server.join([s.leaves for s in self.shards])


class ShardedServer:
    """:class:`Server`'s methods over ``num_servers`` of them.

    Each server has its own version and its own lock, and pushes and pulls go to all: under the
    synchronous pace the parameters are those of one server, bit for bit; under another, a pull may
    find a push in one server that is not yet in the next, which each server's pace bounds by
    itself. A rule sees flat pieces of leaves: it must work element by element, as all do that are
    here (of proximal operators, those without a mask).

    Args:
      params: Pytree of arrays: the initial parameters.
      rule: As for :class:`Server`.
      num_workers: As for :class:`Server`.
      num_servers: At least 1, at most as many as there are elements.
      options: Of each :class:`Server`.

    Raises:
      ValueError: as :class:`Server`; or there are more servers than elements.
    """

    def __init__(
        self, params: PyTree, rule: Rule, num_workers: int, num_servers: int, **options: Any
    ) -> None:
        self.format = Format(params, None)
        leaves = self.format.leaves(params, "params")
        self.shares = equal_shares(leaves, num_servers)
        if not all(self.shares):
            raise ValueError(
                f"ShardedServer(num_servers={num_servers}): the parameters' "
                f"{sum(x.size for x in leaves)} elements leave some of them without any."
            )
        self.servers = [
            self._server(number, tree, rule, num_workers, **options)
            for number, tree in enumerate(self.split(leaves))
        ]
        self.num_workers, self.now = num_workers, self.servers[0].now

    def _server(self, number: int, *args: Any, **options: Any) -> Server:
        """Makes one of them."""
        return Server(*args, **options)

    def _each(self, call: Callable[..., Any], *args: Iterable[Any]) -> list[Any]:
        """``call(server, *its arguments)`` for every server, in order."""
        return [call(*each) for each in zip(self.servers, *args, strict=True)]

    def split(self, leaves: Leaves) -> list[dict[str, np.ndarray]]:
        """Each server's pieces, by name; views."""
        flat = [x.reshape(-1) for x in leaves]
        return [
            {self._name(i, p): flat[p.leaf][p.start : p.stop] for i, p in enumerate(share)}
            for share in self.shares
        ]

    def join(self, shards: Sequence[Leaves]) -> PyTree:
        """The tree of which each server holds those pieces."""
        parts: list[list[np.ndarray]] = [[] for _ in self.format.shapes]
        for share, leaves in zip(self.shares, shards, strict=True):
            for piece, x in zip(share, leaves, strict=True):
                parts[piece.leaf].append(x)
        whole = []
        for pieces, shape, dtype in zip(parts, self.format.shapes, self.format.dtypes, strict=True):
            x = pieces[0] if len(pieces) == 1 else np.concatenate(pieces or [np.zeros(0, dtype)])
            x = x.reshape(shape)
            x.flags.writeable = False
            whole.append(x)
        return self.format.tree(tuple(whole))

    def _name(self, number: int, piece: Piece) -> str:
        # The number first, so that a dict's order is the share's.
        return f"{number:06d} {self.format.paths[piece.leaf]}[{piece.start}:{piece.stop}]"

    # What Server has.

    def register(self, worker: int, incarnation: int = 0) -> Registration:
        """As ``Server.register``, at each; the greatest clock, to which all of them move on.

        A worker that died between two servers has pushed more at the one than at the other.
        """
        answers = self._each(lambda s: s.register(worker, incarnation))
        clock = max(a.clock for a in answers)
        for s, answer in zip(self.servers, answers, strict=True):
            if answer.clock < clock:
                s.skip_to(worker, incarnation, clock)
        return Registration(clock, min(a.version for a in answers))

    def resume(self, worker: int) -> tuple[int, int] | None:
        """As ``Server.resume``; ``None`` where the servers do not agree."""
        standings = {s.resume(worker) for s in self.servers}
        return standings.pop() if len(standings) == 1 else None

    def heartbeat(self, worker: int, incarnation: int) -> None:
        self._each(lambda s: s.heartbeat(worker, incarnation))

    def members(self) -> dict[int, MemberInfo]:
        """Those that are members of every server."""
        first, *others = (s.members() for s in self.servers)
        return {w: m for w, m in first.items() if all(w in other for other in others)}

    def evict(self, worker: int, why: str = "evicted") -> None:
        for s in self.servers:
            s.evict(worker, why)

    def expire(self) -> list[int]:
        """Evicts, everywhere, the members whose lease is over at one of the servers."""
        late = sorted(set().union(*(s.expire() for s in self.servers)))
        for worker in late:
            self.evict(worker, f"silent for longer than the lease of {self.lease:g}")
        return late

    def close(self, why: str = "the run is over") -> None:
        for s in self.servers:
            s.close(why)

    @property
    def lease(self) -> float:
        return self.servers[0].lease

    @property
    def version(self) -> int:
        """The least of the servers' versions."""
        return min(s.version for s in self.servers)

    @property
    def min_clock(self) -> int:
        return min(s.min_clock for s in self.servers)

    @property
    def progress(self) -> int:
        return sum(s.progress for s in self.servers)

    @property
    def params(self) -> PyTree:
        return self.join([tuple(jax.tree.leaves(s.params)) for s in self.servers])

    @property
    def traffic(self) -> Traffic:
        """Bytes of all servers together; a message to all of them counts once."""
        each = [s.traffic for s in self.servers]
        return Traffic(
            max(t.pushes for t in each),
            sum(t.pushed_bytes for t in each),
            max(t.pulls for t in each),
            sum(t.pulled_bytes for t in each),
        )

    def last_incarnation(self, worker: int) -> int:
        return max(s.last_incarnation(worker) for s in self.servers)

    def clock(self, worker: int) -> int:
        return min(s.clock(worker) for s in self.servers)

    def try_pull(self, worker: int, max_staleness: float | None = None, **at: Any) -> Any:
        """As ``Server.try_pull``; ``None`` if any server would let the worker wait."""
        shards = []
        for s in self.servers:
            shard = s.try_pull(worker, max_staleness, **at)
            if shard is None:
                return None
            shards.append(shard)
        return self._together(shards)

    def pull(
        self,
        worker: int,
        max_staleness: float | None = None,
        timeout: float | None = None,
        **at: Any,
    ) -> ShardedSnapshot:
        """As ``Server.pull``; ``timeout`` is each server's."""
        return self._together(self._each(lambda s: s.pull(worker, max_staleness, timeout, **at)))

    def _together(self, shards: Sequence[Snapshot]) -> ShardedSnapshot:
        return ShardedSnapshot(
            tuple(s.version for s in shards), min(s.min_clock for s in shards), tuple(shards), self
        )

    def barrier(self, name: str, worker: int, timeout: float | None = None) -> None:
        self.servers[0].barrier(name, worker, timeout)

    def sender(self, worker: int) -> "ShardedSender":
        return ShardedSender(self, [s.sender(worker) for s in self.servers])

    def push(
        self,
        worker: int,
        incarnation: int,
        seq: int,
        update: PyTree,
        base_version: tuple[int, ...],
    ) -> Ack:
        """As ``Server.push``, at each; accepted if all did. To be called again if one failed:
        those that have the update do not take it twice.
        """
        if not isinstance(update, Parcel):
            parts: Sequence[Any] = self.split(self.format.leaves(update, "push"))
        else:
            parts = update.content
        acks = self._each(
            lambda s, part, version: s.push(worker, incarnation, seq, part, version),
            parts,
            base_version,
        )
        return Ack(
            min(a.version for a in acks),
            all(a.accepted for a in acks),
            all(a.duplicate for a in acks),
        )

    def snapshot(self) -> list[dict[str, Any]]:
        """Of each server, one after the other: let the workers rest if they must agree."""
        return [s.snapshot() for s in self.servers]

    def restore(self, state: Sequence[dict[str, Any]]) -> None:
        num_saved = 1 if isinstance(state, dict) else len(state)
        if num_saved != len(self.servers) or isinstance(state, dict):
            raise ValueError(
                f"restore: saved by {num_saved} server(s), and there are {len(self.servers)}: each "
                "holds a share of its own."
            )
        for s, own in zip(self.servers, state, strict=True):
            s.restore(own)


class ShardedSender:
    """Encodes a worker's updates for each server."""

    def __init__(self, server: ShardedServer, senders: Sequence[Sender]) -> None:
        self._server, self._senders = server, senders

    @property
    def residual(self) -> Leaves | None:
        """What error feedback owes, laid out like the parameters."""
        owed = [send.residual for send in self._senders]
        if all(r is None for r in owed):
            return None
        return tuple(jax.tree.leaves(self._server.join([r for r in owed if r is not None])))

    @residual.setter
    def residual(self, residual: Leaves | None) -> None:
        if residual is None:
            for send in self._senders:
                send.residual = None
            return
        for send, part in zip(self._senders, self._server.split(residual), strict=True):
            send.residual = tuple(jax.tree.leaves(part))

    def __call__(self, update: PyTree, seq: int) -> Parcel:
        parts = self._server.split(self._server.format.leaves(update, "push"))
        return _joined([send(part, seq) for send, part in zip(self._senders, parts, strict=True)])


def _joined(parcels: Sequence[Parcel]) -> Parcel:
    return Parcel(tuple(parcels), sum(p.nbytes for p in parcels))


AnyServer = Server | ShardedServer
