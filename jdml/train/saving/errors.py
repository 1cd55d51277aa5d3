"""Errors of the disk as ``OSError`` with the path, the true cause, and what to do."""

import errno
import os
import re
from pathlib import Path

HINTS = {
    errno.ENOSPC: "free some space, keep fewer checkpoints, or give another folder",
    errno.EDQUOT: "the quota is used up: free some space, or give another folder",
    errno.EACCES: "give a folder that this user may write to",
    errno.EPERM: "give a folder that this user may write to",
    errno.EROFS: "give a folder on another file system",
    errno.ENOTDIR: "a part of this path is a file; give another folder",
    errno.ENOENT: "the folder was removed; give another one",
}


def os_error(error: Exception, what: str, path: Path) -> OSError:
    """``what`` failed on ``path``, with the number of the true cause where it has one."""
    cause = true_cause(error)
    number = _error_number(cause)
    if number is None:
        return OSError(errno.EIO, f"{what}: {brief(cause)}", str(path))
    hint = f"; {HINTS[number]}" if number in HINTS else ""
    return OSError(number, f"{what}: {os.strerror(number)}{hint}", str(path))


def true_cause(error: BaseException) -> BaseException:
    """The first error of the chain that has an OS error number, else the one at its root.

    Orbax raises its own errors over those that explain them.
    """
    chain = [error]
    while (inner := chain[-1].__cause__ or chain[-1].__context__) and inner not in chain:
        chain.append(inner)
    return next((e for e in chain if _error_number(e) is not None), chain[-1])


def brief(error: BaseException) -> str:
    """Type and text on one line of bounded length."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}{'…' if len(text) > 200 else ''}"


def _error_number(error: BaseException) -> int | None:
    if isinstance(error, OSError) and error.errno:
        return error.errno
    # TensorStore, which does the writing, gives the number in its text alone.
    match = re.search(r"os_error_code='(\d+)'", str(error))
    return int(match[1]) if match else None
