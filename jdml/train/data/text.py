"""Text as bytes: one file, a folder, or Python's own standard library. A token is a byte."""

import errno
import os
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]

SUFFIXES = (".txt", ".md", ".rst", ".tex", ".html", ".json", ".csv", ".py", ".c", ".h", ".cc")

# Tests are left out because they hold odd bytes and long tables, the rest because it differs
# between machines that run the same Python.
_NOT_LIBRARY = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib-dynload"}
)
_NOT_LIBRARY_FILES = frozenset({"sitecustomize.py", "usercustomize.py", "_distutils_system_mod.py"})


def read_text(
    path: str | os.PathLike[str],
    suffixes: Sequence[str] = SUFFIXES,
    max_bytes: int | None = None,
) -> Bytes:
    """The bytes of a file, or of every file in a folder, joined by newlines.

    A file is memory-mapped. A folder is read whole, recursively, in the order of the relative paths
    of its files; hidden files and folders are skipped, links to folders are not followed.

    Args:
      path: File (any suffix) or folder.
      suffixes: Which files of a folder count, such as ``(".txt",)``.
      max_bytes: Stop after so many bytes.

    Returns:
      uint8 ``[num_bytes]``.

    Raises:
      OSError: nothing is there or it cannot be read; carries the path.
      ValueError: the file is empty, or the folder holds no text with these suffixes.
    """
    root = Path(path).expanduser()
    if not root.exists():
        raise FileNotFoundError(
            errno.ENOENT, "no such text file or folder; give the path of one that exists", str(root)
        )
    if root.is_file():
        return _map_file(root, max_bytes)
    wanted = tuple(s if s.startswith(".") else f".{s}" for s in suffixes)
    others: Counter[str] = Counter()

    def keep(name: str) -> bool:
        if _hidden(name):
            return False
        suffix = os.path.splitext(name)[1]
        if suffix not in wanted:
            others[suffix or "(no suffix)"] += 1
        return suffix in wanted

    data = _join(_files(root, keep, _hidden), max_bytes)
    if not data.size:
        seen = ", ".join(f"{n} {suffix}" for suffix, n in others.most_common(5)) or "no files"
        raise ValueError(
            f"no text in {root}: looked for non-empty files ending in {' '.join(wanted)} and found "
            f"none (other files there: {seen}). Give a folder of text, or its suffixes."
        )
    return data


def standard_library(max_bytes: int = 16 << 20) -> Bytes:
    """The source of Python's standard library: about 11 MB of text that is on every machine.

    The ``.py`` files under ``sysconfig.get_path("stdlib")`` in the order of their relative paths,
    without tests and without what the build of an interpreter generates: the same bytes for the
    same Python version.

    Args:
      max_bytes: Stop after so many bytes.

    Returns:
      uint8 ``[num_bytes]``.

    Raises:
      ValueError: this Python has no library sources (a frozen or zipped interpreter).
    """
    root = Path(sysconfig.get_path("stdlib"))

    def keep(name: str) -> bool:
        generated = name in _NOT_LIBRARY_FILES or name.startswith("_sysconfigdata")
        return name.endswith(".py") and not generated

    def skip(folder: str) -> bool:
        return folder in _NOT_LIBRARY or folder.startswith("config-")

    data = _join(_files(root, keep, skip), max_bytes)
    if not data.size:
        raise ValueError(
            f"Python's standard library at {root} holds no .py files; give a text file or folder."
        )
    return data


def _hidden(name: str) -> bool:
    return name.startswith(".")


def _files(
    root: Path, keep: Callable[[str], bool], skip_folder: Callable[[str], bool]
) -> list[Path]:
    """The files under ``root`` that are kept by their names, in the order of their paths."""

    def fail(error: OSError) -> None:
        raise OSError(error.errno, f"cannot list this folder: {error.strerror}", error.filename)

    found = []
    for folder, folders, names in os.walk(root, onerror=fail):
        folders[:] = [name for name in folders if not skip_folder(name)]
        found += [Path(folder, name) for name in names if keep(name)]
    # By parts, not as strings: the order must not hang on the path separator.
    return sorted(found, key=lambda path: path.parts)


def _join(paths: Sequence[Path], max_bytes: int | None) -> Bytes:
    def contents() -> Iterator[bytes]:
        left = max_bytes
        for path in paths:
            try:
                data = path.read_bytes()
            except OSError as error:
                raise OSError(
                    error.errno, f"cannot read this text file: {error.strerror}", str(path)
                ) from error
            if not data:
                continue
            data = data if data.endswith(b"\n") else data + b"\n"
            if left is not None:
                data = data[:left]
                left -= len(data)
            yield data
            if left == 0:
                return

    return np.frombuffer(b"".join(contents()), dtype=np.uint8)


def _map_file(path: Path, max_bytes: int | None) -> Bytes:
    try:
        if not path.stat().st_size:
            raise ValueError(f"the text file {path} is empty; give a file that holds text.")
        data = np.memmap(path, dtype=np.uint8, mode="r")
    except OSError as error:
        raise OSError(
            error.errno, f"cannot read this text file: {error.strerror}", str(path)
        ) from error
    return np.asarray(data[:max_bytes])
