"""``.npy`` files: mapped, or read piece by piece with nothing left in memory."""

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt


def map_npy(path: str | os.PathLike[str]) -> np.memmap[Any, np.dtype[Any]]:
    """The array of a ``.npy`` file, read-only, backed by the file.

    Pages come into memory as they are read, and processes that map one file share them.

    Raises:
      OSError: nothing is there, or it cannot be read; carries the path.
      ValueError: no ``.npy`` file, an array of objects, or one without elements.
    """
    file = _existing(path)
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{file} cannot be read as a .npy array: {error}") from error
    if not isinstance(array, np.memmap):
        raise ValueError(f"{file} holds several arrays; expected a .npy file, which holds one.")
    return array


class NpyRows:
    """The rows of a ``.npy`` file, read when asked for and kept by nobody.

    A mapped array's pages count as the process's resident memory once they were touched; what is
    read here is the caller's, and goes when that goes.

    Args:
      path: The file; C order.

    Attributes:
      shape, dtype: Of the whole array.

    Raises:
      OSError: nothing is there, or it cannot be read; carries the path.
      ValueError: no ``.npy`` file, Fortran order, a scalar, or a file cut short.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = _existing(path)
        array = map_npy(self.path)
        self.shape, self.dtype = array.shape, array.dtype
        if array.ndim < 1 or not array.flags.c_contiguous:
            raise ValueError(
                f"{self.path} holds {array.dtype}{list(array.shape)}"
                + (", in Fortran order" if array.ndim else "")
                + "; expected rows in C order: np.save(path, np.ascontiguousarray(array))."
            )
        self._row_bytes = array.itemsize * int(np.prod(array.shape[1:], dtype=np.int64))
        self._start = array.offset

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def row_nbytes(self) -> int:
        """Bytes of a row."""
        return self._row_bytes

    def read(self, start: int, stop: int) -> npt.NDArray[Any]:
        """Rows ``start .. stop - 1``, an array of the caller's own.

        Raises:
          ValueError: no such rows, or the file has become shorter.
        """
        if not 0 <= start <= stop <= len(self):
            raise ValueError(f"{self.path}: rows {start} .. {stop} of {len(self)}.")
        rows = np.empty((stop - start, *self.shape[1:]), self.dtype)
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self._start + start * self._row_bytes)
            # On Python 3.11 NumPy's arrays are not typed as buffers.
            raw: Any = rows.reshape(-1).view(np.uint8)
            view = memoryview(raw)
            while view:
                got = file.readinto(view)
                if not got:
                    raise ValueError(f"{self.path} has become shorter since it was opened.")
                view = view[got:]
        return rows


def _existing(path: str | os.PathLike[str]) -> Path:
    file = Path(path).expanduser()
    if not file.exists():
        raise FileNotFoundError(
            errno.ENOENT, "no such .npy file; give the path of one that exists", str(file)
        )
    return file
