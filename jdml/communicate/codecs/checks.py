"""What the factories refuse, in the same words."""

from collections.abc import Iterable
from typing import Any


def check_block(name: str, block: Any, multiple_of: int = 1) -> None:
    """Raises unless ``block`` can be the number of elements that share a scale."""
    if isinstance(block, bool) or not isinstance(block, int) or block < 1:
        raise ValueError(
            f"{name}(block={block!r}): expected a positive int, the number of consecutive elements "
            "that share one scale, such as 256."
        )
    if block % multiple_of:
        raise ValueError(
            f"{name}(block={block}): expected a multiple of {multiple_of}, such as "
            f"{-(-block // multiple_of) * multiple_of}: that many elements share a byte."
        )


def check_choice(name: str, option: str, value: Any, choices: Iterable[str]) -> None:
    """Raises unless ``value`` is one of ``choices``."""
    if value not in tuple(choices):
        raise ValueError(f"{name}({option}={value!r}): expected one of {tuple(choices)}.")
