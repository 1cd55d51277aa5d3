"""Payloads between processes of one machine: written once, read in place by all who read them.

Ray's object store does this too, but a put of 50 MB takes 13 ms where a copy into pages that are
mapped already takes 8, and nothing where the arrays were written there (Intel Xeon, 2 cores): a
shelf keeps its pages and writes over what nobody reads any longer.

A payload lies in a file of its own in shared memory. Whoever reads it holds a lock on the file
(``flock``, shared) for as long as an array made of it is in use; the writer needs the file for
itself (exclusive). The kernel takes the locks of a process that ended, however it ended. A reader
who comes so late that the file was written anew finds another number in it, and asks again.

Processes share a shelf if they see the same ``/dev/shm``. Where there is none, or no room in it,
:meth:`Shelf.lay` says so and the payload goes through Ray.
"""

import contextlib
import fcntl
import itertools
import mmap
import os
import pickle
import shutil
import tempfile
import threading
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jdml.communicate.pace.rules.arithmetic import copy_all

ROOT = Path("/dev/shm")
_PREFIX = "jdml-shelf-"
_OWNER = "owner"
_ALIGNED = 64  # bytes; the first of them hold the payload's number
_CACHED = 16  # files that a reader keeps mapped


class Ticket(NamedTuple):
    """Where a payload lies.

    Attributes:
      machine: :func:`machine` of who wrote it.
      path: The file.
      number: The payload's, in the file's first bytes.
      nbytes: Of the file.
      frame: The pickled content without its arrays' bytes.
      places: First byte and number of bytes of each array.
    """

    machine: str
    path: str
    number: int
    nbytes: int
    frame: bytes
    places: tuple[tuple[int, int], ...]


class Stale(Exception):
    """The payload has been written over, or its writer has ended."""


class Elsewhere(Exception):
    """The payload lies on another machine."""


def machine(node: str = "") -> str:
    """The same for processes that share ``/dev/shm`` (and ``node``); empty where there is none."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.stat(ROOT).st_dev} {node}"
    except OSError:
        return ""


class Shelf:
    """What one process lays out for others.

    Its files go when it is closed or collected; those of a process that was killed go when the next
    shelf is made.

    Args:
      here: This process's :func:`machine`.
    """

    def __init__(self, here: str) -> None:
        self._here = here
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._files: list[_File] = []
        self._folder: Path | None = None

    def room(self, like: Sequence[np.ndarray]) -> tuple[np.ndarray, ...]:
        """Arrays of these shapes and dtypes, of any content, that :meth:`lay` need not copy.

        Once they are laid, they must not be written. Where there is no room, ordinary ones.
        """
        places, end = _places([x.nbytes for x in like])
        with self._lock:
            file = self._free(end)
            if file is None:
                return tuple(np.empty_like(x) for x in like)
            whole = np.asarray(file.opened(0))
        return tuple(
            whole[i : i + n].view(x.dtype).reshape(x.shape)
            for (i, n), x in zip(places, like, strict=True)
        )

    def lay(self, content: Any) -> tuple[Ticket, Any] | None:
        """Where others find a pytree of arrays, and what keeps it there while it is in use.

        A copy, unless the arrays were made by :meth:`room`, one call for all of them. ``None``:
        there is no room, or no shared memory.
        """
        if not self._here:
            return None
        found: list[pickle.PickleBuffer] = []
        frame = pickle.dumps(content, protocol=5, buffer_callback=found.append)
        arrays = [np.frombuffer(x.raw(), np.uint8) for x in found]
        with self._lock:
            for file in self._files:
                if (places := file.places(arrays)) is not None:
                    file.number = file.number or next(self._numbers)
                    hold: Any = content
                    break
            else:
                places, end = _places([x.nbytes for x in arrays])
                if (free := self._free(end)) is None:
                    return None
                file, hold = free, free.opened(0)
                whole = np.asarray(hold)
                copy_all(arrays, [whole[i : i + n] for i, n in places])
                file.number = next(self._numbers)
        return Ticket(self._here, file.path, file.number, file.nbytes, frame, tuple(places)), hold

    def close(self) -> None:
        """Removes the files; what is being read stays until it is let go."""
        with self._lock:
            self._files = []
            if self._folder is not None:
                shutil.rmtree(self._folder, ignore_errors=True)
                self._folder = None

    def _free(self, nbytes: int) -> "_File | None":
        """A file that nobody reads, locked: of these the one that was written longest ago."""
        if not self._here:
            return None
        for at, file in enumerate(self._files):
            if file.nbytes >= nbytes and file.lock():
                self._files.append(self._files.pop(at))
                return file
        try:
            if self._folder is None:
                sweep()
                self._folder, owner = _folder()
                weakref.finalize(self, _removed, self._folder, owner, os.getpid())
            file = _File(str(self._folder / str(len(self._files))), nbytes)
        except OSError:
            return None
        self._files.append(file)
        locked = file.lock()
        assert locked
        return file


class _File:
    """A file of a shelf, mapped by its writer."""

    def __init__(self, path: str, nbytes: int) -> None:
        self.path, self.nbytes = path, nbytes
        self._fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        weakref.finalize(self, os.close, self._fd)
        try:
            os.posix_fallocate(self._fd, 0, nbytes)  # where memory is short: here, not when written
        except OSError:
            os.unlink(path)
            raise
        self._memory = np.frombuffer(mmap.mmap(self._fd, nbytes), np.uint8)

    def lock(self) -> bool:
        """Takes it for writing, if nobody reads it."""
        return _locked(self._fd, fcntl.LOCK_EX)

    def opened(self, number: int) -> "_Hold":
        """Memory to write to; nobody else writes as long as it is in use.

        For readers it has that number: with 0, none of them takes it.
        """
        self.number = number
        fd = os.open(self.path, os.O_RDONLY)
        fcntl.flock(self._fd, fcntl.LOCK_UN)
        fcntl.flock(fd, fcntl.LOCK_SH)
        return _Hold(fd, self._memory, read_only=False)

    @property
    def number(self) -> int:
        return int(self._memory[:8].view(np.int64)[0])

    @number.setter
    def number(self, number: int) -> None:
        self._memory[:8].view(np.int64)[0] = number

    def places(self, arrays: Sequence[np.ndarray]) -> list[tuple[int, int]] | None:
        """First byte and number of bytes of each, if all lie in here."""
        first = self._memory.ctypes.data
        found = [(x.ctypes.data - first, x.nbytes) for x in arrays]
        inside = all(i >= _ALIGNED and i + n <= self.nbytes for i, n in found if n)
        return [(i if n else 0, n) for i, n in found] if found and inside else None


class _Hold:
    """Memory of a file that is not written anew as long as this, or an array made of it, is used.

    Args:
      fd: Where the file is locked; closed at the end, which gives up the lock.
      memory: All of it.
    """

    def __init__(self, fd: int, memory: np.ndarray, *, read_only: bool) -> None:
        self._memory, self._read_only = memory, read_only
        weakref.finalize(self, os.close, fd)

    @property
    def __array_interface__(self) -> dict[str, Any]:
        described = dict(self._memory.__array_interface__)
        return described | {"data": (described["data"][0], self._read_only)}


class Reader:
    """Takes payloads from the shelves of this machine; keeps their files mapped."""

    def __init__(self, here: str) -> None:
        self._here = here
        self._lock = threading.Lock()
        self._mapped: OrderedDict[str, tuple[int, np.ndarray]] = OrderedDict()

    def take(self, ticket: Ticket) -> Any:
        """The content, with read-only arrays that are not copied.

        Raises:
          Elsewhere: it lies on another machine.
          Stale: it is gone.
        """
        if not self._here or ticket.machine != self._here:
            raise Elsewhere(ticket.machine)
        try:
            fd = os.open(ticket.path, os.O_RDONLY)
        except FileNotFoundError as error:
            raise Stale(ticket.path) from error
        memory = self._memory(ticket, fd)
        # The lock first, and then the number: from then on it stays.
        hold = _Hold(fd, memory, read_only=True)
        if not _locked(fd, fcntl.LOCK_SH) or memory[:8].view(np.int64)[0] != ticket.number:
            raise Stale(ticket.path)
        whole = np.asarray(hold)
        return pickle.loads(ticket.frame, buffers=[whole[i : i + n] for i, n in ticket.places])

    def _memory(self, ticket: Ticket, fd: int) -> np.ndarray:
        inode = os.fstat(fd).st_ino
        with self._lock:
            known = self._mapped.get(ticket.path)
            if known is None or known[0] != inode:
                # Through a descriptor of its own, for a mapping keeps it, and any lock with it.
                own = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
                try:
                    memory = mmap.mmap(own, ticket.nbytes, prot=mmap.PROT_READ)
                finally:
                    os.close(own)
                known = (inode, np.frombuffer(memory, np.uint8))
                self._mapped[ticket.path] = known
            self._mapped.move_to_end(ticket.path)
            while len(self._mapped) > _CACHED:
                self._mapped.popitem(last=False)
            return known[1]


def _places(sizes: Sequence[int]) -> tuple[list[tuple[int, int]], int]:
    """First byte and number of bytes of each, one after the other, and where they end."""
    places, end = [], _ALIGNED
    for size in sizes:
        places.append((end, size))
        end += -(-size // _ALIGNED) * _ALIGNED
    return places, end


def _locked(fd: int, how: int) -> bool:
    try:
        fcntl.flock(fd, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _folder() -> tuple[Path, int]:
    """A new one, and the file in it that is locked for as long as its process lives."""
    making = Path(tempfile.mkdtemp(dir=ROOT))
    owner = os.open(making / _OWNER, os.O_CREAT | os.O_RDWR, 0o600)
    fcntl.flock(owner, fcntl.LOCK_EX)
    # By its name it can be swept: only now.
    return making.rename(ROOT / f"{_PREFIX}{os.getpid()}-{making.name}"), owner


def _removed(folder: Path, owner: int, pid: int) -> None:
    if os.getpid() == pid:  # and not a fork of it that ends
        shutil.rmtree(folder, ignore_errors=True)
        os.close(owner)


def sweep() -> None:
    """Removes the shelves of processes that are no more."""
    for folder in ROOT.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            fd = os.open(folder / _OWNER, os.O_RDWR)
            try:
                if _locked(fd, fcntl.LOCK_EX):
                    shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(fd)
