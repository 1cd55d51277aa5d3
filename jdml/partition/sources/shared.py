"""Arrays that the processes of one machine share: in the memory of the host once, however many.

Threads share every array anyway. Processes share what they map: each opens the same pages, so that
the sum of their proportional sizes (PSS) grows by the arrays' bytes once, not once per process.
"""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from jdml.partition.sources.npy import map_npy


class SharedArrays(Mapping[str, npt.NDArray[Any]]):
    """Named arrays in a folder of ``.npy`` files, mapped read-only as they are first asked for.

    Pickles as the folder's name: given to another process (``multiprocessing``, Ray on the same
    host), it maps the same pages there. Give a CSR matrix as its ``data``, ``indices`` and
    ``indptr``.

    Args:
      folder: Where ``share`` wrote them.

    Raises:
      OSError: there is no such folder.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise FileNotFoundError(f"{self.folder}: no such folder of shared arrays")
        self._names = sorted(file.stem for file in self.folder.glob("*.npy"))
        self._mapped: dict[str, npt.NDArray[Any]] = {}

    def __getitem__(self, name: str) -> npt.NDArray[Any]:
        if name not in self._mapped:
            if name not in self._names:
                raise KeyError(name)
            self._mapped[name] = map_npy(self.folder / f"{name}.npy")
        return self._mapped[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __reduce__(self) -> tuple[Any, ...]:
        return SharedArrays, (str(self.folder),)


@contextlib.contextmanager
def share(
    arrays: Mapping[str, npt.ArrayLike], folder: str | os.PathLike[str] | None = None
) -> Iterator[SharedArrays]:
    """Puts arrays where other processes can map them; takes them away at the end.

    They are copied once; let go of your own, and there is one copy on the host. What has been
    mapped by then stays readable after the end. Data that are in ``.npy`` files already need none
    of this: map those.

    Args:
      arrays: By name.
      folder: A folder in which a new one is made; by default ``/dev/shm``, which is memory, or
        where there is none the temporary files, which the system caches.

    Raises:
      ValueError: no arrays, or a name that no file can have.
    """
    if not arrays or any(not name or "/" in name or name.startswith(".") for name in arrays):
        raise ValueError(
            f"share: expected arrays by name, the names fit for files, got {sorted(arrays)}."
        )
    memory = Path("/dev/shm")
    if folder is None and memory.is_dir() and os.access(memory, os.W_OK):
        folder = memory
    own = tempfile.mkdtemp(prefix="jdml-shared-", dir=folder)
    try:
        for name, array in arrays.items():
            np.save(Path(own) / f"{name}.npy", np.asarray(array), allow_pickle=False)
        yield SharedArrays(own)
    finally:
        shutil.rmtree(own, ignore_errors=True)
