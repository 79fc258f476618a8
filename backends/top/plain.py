"""A view as plain text, for a pipe, a log or a note in a ticket: every table, one after another.

Without a width nothing is cut and no column is left out; with one, tables fit it as on a screen.
"""

from __future__ import annotations

from backends.top import panels, replicas
from backends.top.table import Cell, Table, filtered, fit, heading, line
from proxy.contract.view import View

ALL_COLUMNS = 1_000_000


def as_text(view: View, width: int | None = None, words: str = "") -> str:
    """Return all tables that have something to say; `words` choose among the replicas."""
    room = width or ALL_COLUMNS
    lines = [said(part) for part in panels.header(view)]
    lines.append(said(replicas.states_line(view.replicas)))
    ordered = replicas.arranged(view.replicas, 0)
    main = replicas.replicas_table(ordered, ascii_only=True)
    tables = [filtered(main, words), panels.classes_table(view)]
    for panel in range(2, len(panels.SHORT_TITLES)):
        tables += panels.panel_tables(view, panel)
    tables.append(panels.codes_table(view))
    for number, table in enumerate(tables):
        if number < 2 or table.rows:
            lines += ["", table.title.upper(), *_lines(table, room)]
    return "\n".join(lines)


def said(cells: list[Cell]) -> str:
    return "  ".join(one.text for one in cells)


def _lines(table: Table, room: int) -> list[str]:
    if not table.rows:
        return [table.empty]
    fitted = fit(table, room)
    return [heading(table, fitted), *(line(table, fitted, row) for row in table.rows)]
