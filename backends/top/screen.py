"""The whole screen as lines: a pure function of the view, of what was chosen and of the size.

From the top: who this is, how it goes, who serves; the tabs; a table, and below it a second one
where there is room; one line of what was said last, or of the keys. At 80 columns and 24 lines
that is all there and readable. Beyond the last line and column nothing is ever drawn.
"""

from __future__ import annotations

from typing import NamedTuple

from backends.top import panels, replicas
from backends.top.ink import (
    BAD,
    BOLD,
    BUSY,
    EMPTY,
    FAINT,
    Inked,
    ascii_of,
    clipped,
    heading_line,
    inked,
    joined,
    marked,
    row_line,
    told,
)
from backends.top.look import Look, settled
from backends.top.table import Table, filtered, fit
from backends.top.words import age, cut, printable, width_of
from proxy.contract.view import View

HEAD_LINES, FOOT_LINES = 4, 1
SECOND_LINES_MIN = 4  # its name, its heading and two rows
MAIN_LINES_MIN = 6
STALE_S = 3.0  # a view comes every second
KEYS = "s sort  / filter  Enter more  d drain  u undrain  e explain  p pause  ? help"


class Heard(NamedTuple):
    """How old what is shown is, and what became of the stream."""

    age_s: float = 0.0
    trouble: str = ""  # why it is lost
    again_s: float = 0.0  # until it is tried again


class Drawn(NamedTuple):
    lines: tuple[Inked, ...]
    look: Look  # with its cursor where it was drawn
    names: tuple[str, ...]  # of the rows under the cursor's table
    page: int  # rows that are in sight


def draw(
    view: View | None, look: Look, heard: Heard, size: tuple[int, int], message: str = ""
) -> Drawn:
    """Return just as many lines as the screen has, none wider than it is."""
    width, height = size
    if view is None:
        return _drawn(_waiting(heard, width), look, (), 0, size)
    body = max(height - HEAD_LINES - FOOT_LINES, 1)
    main, second = _tables(view, look)
    below = _second_lines(second, body, width) if second is not None else []
    rows = max(body - len(below) - 1, 0)
    names = tuple(row.name for row in main.rows)
    place = settled(look.place, names, rows)
    look = look.with_place(place)
    lines = [told(part, width) for part in panels.header(view)]
    lines.append(_third(view, heard, width))
    lines.append(_tabs(look, width))
    lines += _main_lines(main, look, rows, width)
    lines += [EMPTY] * (HEAD_LINES + body - len(below) - len(lines))
    lines += below
    lines.append(_foot(message, place.top, rows, len(names), width))
    return _drawn(lines, look, names, rows, size)


def _drawn(
    lines: list[Inked], look: Look, names: tuple[str, ...], page: int, size: tuple[int, int]
) -> Drawn:
    lines = [clipped(line, size[0]) for line in lines[: size[1]]]
    lines += [EMPTY] * (size[1] - len(lines))
    if look.ascii_only:
        lines = [ascii_of(line) for line in lines]
    return Drawn(tuple(lines), look, names, page)


def _tables(view: View, look: Look) -> tuple[Table, Table | None]:
    """Return the table of the cursor, and the one below it."""
    if look.panel == 0:
        ordered = replicas.arranged(view.replicas, look.order, backwards=look.backwards)
        shown = replicas.replicas_table(ordered, ascii_only=look.ascii_only)
        tables: tuple[Table, ...] = (shown, panels.classes_table(view))
    else:
        tables = panels.panel_tables(view, look.panel)
    first, second = tables[0], tables[1] if len(tables) > 1 else None
    if look.swapped and second is not None:
        first, second = second, first
    return filtered(first, look.words), second


def _main_lines(table: Table, look: Look, rows: int, width: int) -> list[Inked]:
    fitted = fit(table, width)
    lines = [heading_line(table, fitted)]
    if not table.rows:
        return [*lines, inked(cut(table.empty, width), FAINT)][: rows + 1]
    place = look.place
    for row in table.rows[place.top : place.top + rows]:
        line = row_line(table, fitted, row)
        lines.append(marked(line, width) if row.name == place.name else line)
    return lines


def _second_lines(table: Table, body: int, width: int) -> list[Inked]:
    """Return the second table, if the first keeps enough lines beside it; of its rows the first."""
    wanted = 2 + max(len(table.rows), 1)
    room = min(wanted, max(body // 2, SECOND_LINES_MIN))
    if body - room < MAIN_LINES_MIN or room < min(wanted, SECOND_LINES_MIN):
        return []
    fitted = fit(table, width)
    shown = [row_line(table, fitted, row) for row in table.rows[: room - 2]]
    rest = len(table.rows) - len(shown)
    title = table.title + (f", {rest} more: Tab" if rest else "")
    lines = [inked(cut(title, width), FAINT), heading_line(table, fitted)]
    return [*lines, *(shown or [inked(cut(table.empty, width), FAINT)])]


def _third(view: View, heard: Heard, width: int) -> Inked:
    if heard.trouble:
        known = f"{age(heard.age_s)} old; again in {heard.again_s:.0f} s: {heard.trouble}"
        return inked(cut(printable(f"STALE: {known}"), width), BAD)
    if heard.age_s >= STALE_S:
        return inked(cut(f"STALE: {age(heard.age_s)} old, nothing came since", width), BUSY)
    return told(replicas.states_line(view.replicas), width)


def _tabs(look: Look, width: int) -> Inked:
    """Return the names of the panels, as short as what was chosen needs room beside them."""
    words = printable(look.said())
    line = _titles(look.panel, short=False)
    if width_of(line.text) + 1 + width_of(words) > width:
        line = _titles(look.panel, short=True)
    room = width - width_of(line.text) - 1
    words = cut(words, max(room, 0))
    blank = " " * max(room - width_of(words) + 1, 0)
    return joined([line, inked(blank), inked(words, BUSY if look.paused else FAINT)])


def _titles(panel: int, *, short: bool) -> Inked:
    parts = []
    for number, title in enumerate(panels.SHORT_TITLES):
        tab = f"{number + 1} {title}"
        if number == panel:
            parts.append(inked(f"[{tab}]", BOLD))
        else:
            parts.append(inked(f" {number + 1} " if short else f" {tab} ", FAINT))
    return joined(parts)


def _foot(message: str, top: int, rows: int, total: int, width: int) -> Inked:
    at = f"{top + 1}-{min(top + rows, total)} of {total}" if total > rows else ""
    room = width - (len(at) + 2 if at else 0)
    words = cut(printable(message) or KEYS, max(room, 0))
    line = inked(words, BOLD if message else FAINT)
    if not at or room <= 0:
        return line
    blank = " " * (width - width_of(words) - len(at))
    return joined([line, inked(blank), inked(at, FAINT)])


def _waiting(heard: Heard, width: int) -> list[Inked]:
    if not heard.trouble:
        return [inked(cut("doherty top: asking for the view", width))]
    again = f"again in {heard.again_s:.0f} s; q quits"
    return [inked(cut(printable(heard.trouble), width), BAD), inked(cut(again, width), FAINT)]
