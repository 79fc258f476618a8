"""Flags of the real engines that have no meaning for a simulator: understood, and left out.

So a simulator can be started with the very line that an engine would be, parallelism, quantisation
and all, and a line that the engine would refuse is refused here too, in the same words.
"""

from __future__ import annotations

from collections.abc import Sequence

from backends.engines.base import FlagError
from backends.engines.flags import check_flags, flag_table, starts_flag
from backends.engines.release import parse_release


def problem_of(dialect: str, version: str, rest: Sequence[str]) -> str:
    """Say what is wrong with the arguments that the simulator itself does not know; or nothing."""
    try:
        doubts = check_flags(flag_table(dialect), rest, parse_release(version))
    except FlagError as error:
        return str(error)
    if doubts:
        return doubts[0]
    stray = [word for before, word in zip(("", *rest), rest, strict=False) if _stray(before, word)]
    return f"unrecognized arguments: {' '.join(stray)}" if stray else ""


def _stray(before: str, word: str) -> bool:
    """Say whether a word follows nothing that it could be a value of."""
    return not before and not starts_flag(word)
