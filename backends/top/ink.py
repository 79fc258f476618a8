"""Lines with ink: a text, and one letter for each of its characters that says how it looks.

Both are strings, so that what changed from one second to the next is found by comparing them, and
only that travels to a terminal at the end of a slow line.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

from backends.top.table import GAP, Cell, Fit, Row, Table, Tone, heading, padded
from backends.top.words import cut, width_of

PLAIN, BOLD, FAINT, GOOD, BUSY, BAD = " ", "b", "f", "g", "y", "r"
INKS = {
    Tone.PLAIN: PLAIN,
    Tone.GOOD: GOOD,
    Tone.BUSY: BUSY,
    Tone.BAD: BAD,
    Tone.FAINT: FAINT,
}
MARKED = str.maketrans("".join(INKS.values()) + BOLD, "PGYRFB")  # the same in reverse


class Inked(NamedTuple):
    text: str
    ink: str

    def runs(self) -> Iterator[tuple[str, str]]:
        """Return the ink and text of each piece that looks the same."""
        for ink, group in groupby(zip(self.text, self.ink, strict=True), key=lambda pair: pair[1]):
            yield ink, "".join(letter for letter, _ in group)


EMPTY = Inked("", "")


def inked(text: str, ink: str = PLAIN) -> Inked:
    return Inked(text, ink * len(text))


def joined(parts: Iterable[Inked], between: str = "") -> Inked:
    """Put pieces into one line."""
    listed = list(parts)
    text = between.join(part.text for part in listed)
    return Inked(text, (PLAIN * len(between)).join(part.ink for part in listed))


def told(cells: Sequence[Cell], width: int) -> Inked:
    """Return cells in a line, as many as there is room for; none is cut but the first."""
    kept: list[Inked] = []
    left = width
    for one in cells:
        text = cut(one.text, width) if not kept else one.text
        left -= width_of(text) + (GAP if kept else 0)
        if left < 0:
            break
        kept.append(inked(text, INKS[one.tone]))
    return joined(kept, " " * GAP)


def heading_line(table: Table, fitted: Fit) -> Inked:
    return inked(heading(table, fitted), BOLD)


def row_line(table: Table, fitted: Fit, row: Row) -> Inked:
    """Return a row, each cell in its ink."""
    parts = []
    for index, width in zip(fitted.indexes, fitted.widths, strict=True):
        one = row.cells[index]
        text = padded(one.text, width, right=table.columns[index].right)
        parts.append(inked(text, INKS[one.tone]))
    return joined(parts, " " * GAP)


def marked(line: Inked, width: int) -> Inked:
    """Return the line of the cursor: in reverse, over the whole width."""
    blank = " " * max(width - width_of(line.text), 0)
    return Inked(line.text + blank, (line.ink + PLAIN * len(blank)).translate(MARKED))


def clipped(line: Inked, width: int) -> Inked:
    """Return what fits of a line; where a screen is so narrow, its end is left out unsaid."""
    text, ink = line
    while width_of(text) > width:
        text = text[: max(width - width_of(text), -len(text))]
    return Inked(text, ink[: len(text)])


def ascii_of(line: Inked) -> Inked:
    """Return the line for a terminal that knows no other characters."""
    text = line.text.replace("…", "~").encode("ascii", "replace").decode()
    return Inked(text, line.ink)


def changed(before: Inked, after: Inked) -> tuple[int, int] | None:
    """Return the first column that differs and the one behind the last; None where none does."""
    if before == after:
        return None
    if not (before.text.isascii() and after.text.isascii()):
        longest = max(width_of(before.text), width_of(after.text))
        narrow = longest == max(len(before.text), len(after.text))
        if not narrow:  # characters are no columns there
            return 0, longest
    size = max(len(before.text), len(after.text))
    old = list(zip(before.text.ljust(size), before.ink.ljust(size), strict=True))
    new = list(zip(after.text.ljust(size), after.ink.ljust(size), strict=True))
    different = [at for at in range(size) if old[at] != new[at]]
    return (different[0], different[-1] + 1) if different else None
