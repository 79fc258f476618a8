"""Numbers as an operator reads them: three digits, a unit, and `-` where nobody knows.

Zero and unknown are never the same text. Each function keeps its result short and of nearly the
same width whatever the value, so that columns stand still while values move.
"""

from __future__ import annotations

import unicodedata

UNKNOWN = "-"
BAR_FULL, BAR_EMPTY = "█", "░"
ASCII_FULL, ASCII_EMPTY = "#", "."


def seconds(value: float | None) -> str:
    """Return a time in the unit that shows it in three digits."""
    if value is None:
        return UNKNOWN
    if value < 0.00005:
        return "0 ms"
    if value < 0.00995:
        return f"{value * 1000:.1f} ms"
    if value < 0.9995:
        return f"{value * 1000:.0f} ms"
    if value < 9.995:
        return f"{value:.2f} s"
    if value < 99.95:
        return f"{value:.1f} s"
    if value < 600:
        return f"{value:.0f} s"
    return age(value)


def age(value: float | None) -> str:
    """Return a longer time, to two units at most."""
    if value is None:
        return UNKNOWN
    whole = round(value)
    if whole < 600:
        return f"{whole} s"
    if whole < 36_000:
        return f"{whole // 60} min"
    if whole < 864_000:
        return f"{whole // 3600} h"
    return f"{whole // 86_400} d"


def count(value: float | None) -> str:
    """Return a number of things: exact below ten thousand, then in thousands and so on."""
    if value is None:
        return UNKNOWN
    if abs(value) < 9_999.5:
        return f"{value:.0f}"
    return _scaled(value, 1000, ("k", "M", "G", "T"))


def rate(value: float | None) -> str:
    """Return a rate a second; what is above zero is never shown as zero."""
    if value is None:
        return UNKNOWN
    if value == 0:
        return "0"
    if value < 0.01:
        return "<.01"
    if value < 9.995:
        return f"{value:.2f}"
    if value < 99.95:
        return f"{value:.1f}"
    return count(value)


def octets(value: float | None) -> str:
    if value is None:
        return UNKNOWN
    if value < 1024:
        return f"{value:.0f} B"
    return _scaled(value, 1024, (" KiB", " MiB", " GiB", " TiB"))


def ratio(value: float | None) -> str:
    """Return a share of 1 in percent."""
    if value is None:
        return UNKNOWN
    return f"{value:.0%}"


def share(value: float) -> str:
    """Return a share in percent with a digit behind the point: those of a ring are small."""
    return f"{value:.1%}"


def bar(value: float | None, width: int, *, ascii_only: bool = False) -> str:
    """Return a bar of `width` columns; what is above zero shows at least one."""
    if value is None:
        return " " * width
    full, empty = (ASCII_FULL, ASCII_EMPTY) if ascii_only else (BAR_FULL, BAR_EMPTY)
    cut = min(max(value, 0.0), 1.0)
    filled = round(cut * width)
    if cut > 0 and filled == 0:
        filled = 1
    if cut < 1 and filled == width:
        filled = width - 1
    return full * filled + empty * (width - filled)


def clock(at_s: float) -> str:
    """Return the time of day, UTC."""
    day_s = int(at_s) % 86_400
    return f"{day_s // 3600:02d}:{day_s // 60 % 60:02d}:{day_s % 60:02d}"


def printable(text: str) -> str:
    """Return `text` with what would move a terminal's cursor made visible.

    Names come from configurations, engines and clients' requests; an escape sequence in one would
    be carried out by the operator's terminal.
    """
    if text.isprintable():
        return text
    return "".join(
        letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text
    )


def width_of(text: str) -> int:
    """Return how many columns of a terminal a printable text takes (Unicode's UAX 11)."""
    if text.isascii():
        return len(text)
    return sum(_width_of(letter) for letter in text)


def cut(text: str, width: int) -> str:
    """Return the beginning of `text` in at most `width` columns; an ellipsis tells of a rest."""
    if width_of(text) <= width:
        return text
    kept, left = "", width - 1
    for letter in text:
        left -= _width_of(letter)
        if left < 0:
            break
        kept += letter
    return kept + "…"[:width]


def _width_of(letter: str) -> int:
    if unicodedata.combining(letter):
        return 0
    return 2 if unicodedata.east_asian_width(letter) in {"W", "F"} else 1


def _scaled(value: float, base: int, units: tuple[str, ...]) -> str:
    for unit in units:
        value /= base
        if abs(value) < 999.5 or unit == units[-1]:
            break
    digits = 0 if abs(value) >= 99.95 else 1
    return f"{value:.{digits}f}{unit}"
