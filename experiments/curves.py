"""What is read off a loss curve; for several experiments."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any


def reached(rows: Sequence[Mapping[str, Any]], target: float, column: str) -> float:
    """Value of ``column`` at which the loss first is the target; NaN if never.

    Between two rows both are taken to lie on a line.
    """
    if rows and rows[0]["loss"] <= target:
        return float(rows[0][column])
    for before, after in itertools.pairwise(rows):
        if after["loss"] <= target:
            part = (before["loss"] - target) / (before["loss"] - after["loss"])
            return before[column] + part * (after[column] - before[column])
    return float("nan")
