"""Lines on a terminal: only what changed since the last time is written."""

from __future__ import annotations

from typing import ClassVar

from rich.segment import Segment
from rich.style import Style
from textual.binding import Binding, BindingType
from textual.geometry import Region
from textual.strip import Strip
from textual.widget import Widget
from typing_extensions import override

from backends.top import ink
from backends.top.ink import Inked

# Names of the sixteen colours that each terminal has its own of, on whatever background.
STYLES = {
    ink.PLAIN: Style(),
    ink.BOLD: Style(bold=True),
    ink.FAINT: Style(dim=True),
    ink.GOOD: Style(color="green"),
    ink.BUSY: Style(color="yellow"),
    ink.BAD: Style(color="red", bold=True),
}
STYLES |= {
    letter.translate(ink.MARKED): style + Style(reverse=True) for letter, style in STYLES.items()
}


class Board(Widget, can_focus=True):
    """Shows lines that somebody else has drawn to its size."""

    # Here and not with the other keys: a screen would take it to go from one widget to the next.
    BINDINGS: ClassVar[list[BindingType]] = [Binding("tab", "app.swap", show=False)]
    DEFAULT_CSS = "Board { width: 1fr; height: 1fr; }"

    def __init__(self) -> None:
        super().__init__()
        self.lines: tuple[Inked, ...] = ()

    def put(self, lines: tuple[Inked, ...]) -> int:
        """Show these lines in place of those before; return how many columns are written anew."""
        before, self.lines = self.lines, lines
        regions = []
        for y in range(max(len(before), len(lines))):
            old = before[y] if y < len(before) else ink.EMPTY
            new = lines[y] if y < len(lines) else ink.EMPTY
            if (columns := ink.changed(old, new)) is not None:
                regions.append(Region(columns[0], y, columns[1] - columns[0], 1))
        if regions:
            self.refresh(*regions)
        return sum(region.width for region in regions)

    @override
    def render_line(self, y: int) -> Strip:
        line = self.lines[y] if y < len(self.lines) else ink.EMPTY
        strip = Strip([Segment(text, STYLES[letter]) for letter, text in line.runs()])
        return strip.adjust_cell_length(self.size.width, Style())
