"""The folder of a run's checkpoints: whose it is, what is in it, whether it can be written."""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import jax

from jdml.train.saving.errors import os_error
from jdml.train.saving.record import FORMAT, RECORD_FILE

_MARKER = "jdml-checkpoints.json"
_UNFINISHED = ".orbax-checkpoint-tmp"


def absolute(folder: str | os.PathLike[str]) -> Path:
    """The absolute path, which Orbax needs, and which a later ``chdir`` does not move."""
    if "://" in os.fspath(folder):
        raise ValueError(
            f"{os.fspath(folder)} is no path of a file system; mount the bucket and give the path "
            "where it is mounted."
        )
    return Path(folder).expanduser().absolute()


def refuse_foreign(folder: Path) -> None:
    """Raises ``ValueError`` if the folder holds something that we did not put there."""
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(
            errno.ENOTDIR, "checkpoints need a folder, and this is a file", str(folder)
        )
    if not folder.exists() or (folder / _MARKER).is_file():
        return
    ours = {str(step) for step in complete_steps(folder)}  # copied there without the marker
    names = sorted(e.name for e in folder.iterdir() if not e.name.startswith("."))
    names = [name for name in names if name not in ours]
    if names:
        shown = ", ".join(names[:5]) + (f", … ({len(names)} in all)" if len(names) > 5 else "")
        raise ValueError(
            f"{folder} holds something else than checkpoints of jdml: {shown}. Give a new or empty "
            "folder; nothing was written."
        )


def probe(folder: Path) -> None:
    """Makes the folder, writes and removes a small file: an error now is better than in an hour.

    Raises:
      OSError: it cannot be made or written, or the disk is full; carries the path.
    """
    index = jax.process_index()
    file = folder / f".probe-{index}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write(file, b"\0" * 65536)
        file.unlink()
        if index == 0 and not (folder / _MARKER).is_file():
            _write(file, f'{{"format": "{FORMAT}"}}\n'.encode())
            file.rename(folder / _MARKER)
    except OSError as error:
        with contextlib.suppress(OSError):
            file.unlink()
        raise os_error(error, "cannot write checkpoints", folder) from error


def complete_steps(folder: Path) -> list[int]:
    """Steps whose checkpoint is complete, ascending.

    A step's folder gets its name when everything in it is written; one that has lost its record
    was being removed when the process ended.
    """
    if not folder.is_dir():
        return []
    return sorted(
        int(entry.name)
        for entry in folder.iterdir()
        if entry.name.isdecimal() and record_path(folder, int(entry.name)).is_file()
    )


def record_path(folder: Path, step: int) -> Path:
    """Where the record of a step is."""
    return folder / str(step) / "record" / RECORD_FILE


def arrays_path(folder: Path, step: int) -> Path:
    """Where the arrays of a step are."""
    return folder / str(step) / "state"


def set_aside(folder: Path, steps: Iterable[int]) -> None:
    """Renames damaged steps to ``damaged-<step>``, so that new ones can take their place."""
    for step in steps:
        target = folder / f"damaged-{step}"
        again = 1
        while target.exists():
            again += 1
            target = folder / f"damaged-{step}-{again}"
        (folder / str(step)).rename(target)


def remove_unfinished(folder: Path, step: int) -> None:
    """Removes what a failed save of this step left: on a full disk it is in the way."""
    for leftover in folder.glob(f"{step}{_UNFINISHED}*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())  # some file systems find out only now that the disk is full
