"""Metrics of a run, one JSON object per line, that survives a crash and a resume."""

import json
import os
from pathlib import Path
from typing import Any, TextIO

Row = dict[str, Any]


class MetricsLog:
    """Appends rows ``{"step": ..., ...}`` to a JSON-lines file.

    Args:
      path: The file; its folder is made. ``None`` keeps rows in memory alone.
      resume_step: Rows of later steps are dropped first: the run that wrote them went on past its
        last checkpoint, and these steps will be taken again.
      write: False on every process but one: reads the file and leaves it as it is.

    Raises:
      ValueError: the file holds something else; it is not touched.
    """

    def __init__(
        self, path: str | os.PathLike[str] | None, resume_step: int = 0, write: bool = True
    ) -> None:
        self.path = None if path is None else Path(path)
        rows = [] if self.path is None else read_metrics(self.path)
        self.rows: list[Row] = [row for row in rows if row["step"] <= resume_step]
        self._file: TextIO | None = None
        if write and self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # A new file takes the old one's place whole: a crash leaves one or the other.
            draft = self.path.with_suffix(".draft")
            draft.write_text("".join(_line(row) for row in self.rows))
            os.replace(draft, self.path)
            self._file = self.path.open("a")

    def append(self, row: Row) -> None:
        """Adds a row and hands it to the operating system."""
        self.rows.append(row)
        if self._file is not None:
            self._file.write(_line(row))
            self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_metrics(path: str | os.PathLike[str]) -> list[Row]:
    """The rows of a metrics file, none if there is no file; a torn last line is left out.

    Raises:
      ValueError: the file holds something else.
    """
    path, rows = Path(path), []
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
    for line in lines:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        if not isinstance(row, dict) or "step" not in row:
            raise ValueError(
                f'{path} is no metrics log: expected lines such as {{"step": 1, ...}}, got '
                f"{line[:60]!r}. Give another folder; nothing was overwritten."
            )
        rows.append(row)
    return rows


def _line(row: Row) -> str:
    return json.dumps(row) + "\n"
