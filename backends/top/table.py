"""A table as a value: columns, rows of cells, and how it fits a width.

Whoever makes a table says which columns matter most; whoever shows it has only so many columns of
a terminal. Of those that do not fit the least important goes first, so that at 80 columns there is
a smaller table and never a cut one.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from typing import NamedTuple

from backends.top.words import cut, printable, width_of

GAP = 2  # between columns


class Tone(enum.Enum):
    """What a cell means, beyond its text: the text alone says the same where there is no colour."""

    PLAIN = "plain"
    GOOD = "good"
    BUSY = "busy"
    BAD = "bad"
    FAINT = "faint"


class Cell(NamedTuple):
    text: str
    tone: Tone = Tone.PLAIN


class Column(NamedTuple):
    title: str
    rank: int = 0  # 0 stays always; of the others the highest goes first
    right: bool = False
    width_min: int = 0  # so that it stands still while its values move
    width_max: int = 60


class Row(NamedTuple):
    name: str  # the same row has the same name in the next table
    cells: tuple[Cell, ...]


class Table(NamedTuple):
    title: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    empty: str = "none"  # what to say when there are no rows


class Fit(NamedTuple):
    """Which columns are shown, and how wide each is."""

    indexes: tuple[int, ...]
    widths: tuple[int, ...]

    def starts(self) -> list[int]:
        """Return where each column begins."""
        starts, at = [], 0
        for width in self.widths:
            starts.append(at)
            at += width + GAP
        return starts


def cell(text: str, tone: Tone = Tone.PLAIN) -> Cell:
    """Return a cell with a text that came from elsewhere."""
    return Cell(printable(text), tone)


def fit(table: Table, width: int) -> Fit:
    """Return the most important columns that fit into `width`, in their order.

    The last column shown may be cut to what is left; it is the one that has words in it.
    """
    widths = [_width(table, index) for index in range(len(table.columns))]
    shown = list(range(len(table.columns)))
    while _total(widths, shown) > width:
        dropped = max(shown, key=lambda index: (table.columns[index].rank, index))
        if table.columns[dropped].rank == 0:
            break
        last = dropped == shown[-1]
        room = width - (_total(widths, shown) - widths[dropped])
        if last and room >= max(len(table.columns[dropped].title), 12):
            widths[dropped] = room
            break
        shown.remove(dropped)
    return Fit(tuple(shown), _narrowed([widths[index] for index in shown], width))


def heading(table: Table, fitted: Fit) -> str:
    return _line(table, fitted, [column.title for column in table.columns])


def line(table: Table, fitted: Fit, row: Row) -> str:
    return _line(table, fitted, [one.text for one in row.cells])


def padded(text: str, width: int, *, right: bool) -> str:
    """Return a cell's text in just `width` columns."""
    text = cut(text, width)
    blank = " " * (width - width_of(text))
    return blank + text if right else text + blank


def filtered(table: Table, words: str) -> Table:
    """Return the rows in which each of the words is found, in any cell, whatever its case."""
    wanted = words.lower().split()
    if not wanted:
        return table
    kept = tuple(row for row in table.rows if _has(row, wanted))
    return table._replace(rows=kept, empty=f"nothing with '{printable(words)}' in it")


def arranged(rows: Sequence[Row], key: Callable[[Row], object]) -> tuple[Row, ...]:
    return tuple(sorted(rows, key=key))  # type: ignore[arg-type]  # keys of one table are of one kind


def _has(row: Row, words: list[str]) -> bool:
    text = "\n".join((row.name, *(one.text for one in row.cells))).lower()
    return all(word in text for word in words)


def _width(table: Table, index: int) -> int:
    column = table.columns[index]
    widest = max((width_of(row.cells[index].text) for row in table.rows), default=0)
    return min(max(widest, len(column.title), column.width_min), column.width_max)


def _total(widths: list[int], shown: list[int]) -> int:
    return sum(widths[index] for index in shown) + GAP * max(len(shown) - 1, 0)


def _narrowed(widths: list[int], width: int) -> tuple[int, ...]:
    """Take what is too much from the widest column, which is a name."""
    while widths and sum(widths) + GAP * (len(widths) - 1) > width and max(widths) > 1:
        widths[widths.index(max(widths))] -= 1
    return tuple(widths)


def _line(table: Table, fitted: Fit, texts: list[str]) -> str:
    parts = [
        padded(texts[index], width, right=table.columns[index].right)
        for index, width in zip(fitted.indexes, fitted.widths, strict=True)
    ]
    return (" " * GAP).join(parts).rstrip()
