"""What several command lines understand alike. Imports nothing that takes time."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable

_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
REPLICAS_MAX = 4096  # of one pool, as the configuration has it; that module takes its time


def port_number(text: str) -> int:
    """Return the port in `text`, 0 for any that is free; an argparse type."""
    if not (text.isascii() and text.isdigit() and len(text) <= 5 and int(text) <= 65_535):
        raise argparse.ArgumentTypeError(f"'{text}' is not a port; use 0 to 65535")
    return int(text)


def replica_count(text: str) -> int:
    """Return the number of replicas in `text`; an argparse type."""
    if not (text.isascii() and text.isdigit() and len(text) <= 9 and int(text) <= REPLICAS_MAX):
        raise argparse.ArgumentTypeError(
            f"'{text}' is no number of replicas; use 0 to {REPLICAS_MAX}"
        )
    return int(text)


def mebibytes(text: str) -> int:
    """Return the MiB in `text`; an argparse type."""
    if not (text.isascii() and text.isdigit() and len(text) <= 12):
        raise argparse.ArgumentTypeError(f"'{text[:80]}' is no number of MiB; use 0 or more")
    return int(text)


def seconds(text: str) -> float:
    """Return the seconds in a time such as 90d, 24h, 30m or 0s; an argparse type."""
    count, unit = text[:-1], text[-1:]
    if unit not in _UNITS_S or not (count.isascii() and count.isdigit() and len(count) <= 6):
        raise argparse.ArgumentTypeError(f"'{text[:80]}' is no time; use one such as 90d or 24h")
    return float(count) * _UNITS_S[unit]


def names(text: str) -> tuple[str, ...]:
    """Return the names in a list with commas; an argparse type."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def at_least(minimum: int) -> Callable[[str], int]:
    """Return an argparse type: a whole number not below `minimum`."""

    def parse(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,12}", text) or int(text) < minimum:
            raise argparse.ArgumentTypeError(f"'{text}' is not a whole number from {minimum} on")
        return int(text)

    return parse
