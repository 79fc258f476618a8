"""What comes over the screen: text to read, a question to answer, a line to write.

Names in them are whatever others chose, so nothing is markup and nothing moves the cursor.
"""

from __future__ import annotations

from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical, VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Input, Static
from typing_extensions import override

from backends.printing import plain
from backends.top.words import printable

WIDTH_MAX = 110
_CSS = """
{name} {{ align: center middle; background: transparent; }}
{name} > .box {{
    width: 100%; max-width: {widest}; height: auto; max-height: 100%;
    border: ascii; padding: 0 1; background: ansi_default; color: ansi_default;
}}
{name} Static {{ width: 100%; height: auto; background: ansi_default; color: ansi_default; }}
{name} Input {{
    width: 100%; height: 1; border: none; padding: 0;
    background: ansi_default; color: ansi_default;
}}
"""


def _css(name: str) -> str:
    return _CSS.format(name=name, widest=WIDTH_MAX)


def width_inside(width: int) -> int:
    """Return how many columns a text has on a screen of so many: there are edges, and a bar."""
    return max(min(width, WIDTH_MAX) - 6, 1)


class Reading(ModalScreen[None]):
    """A text that may be longer than the screen."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,q,enter", "leave", "close"),
        Binding("down,j", "scroll(1)", "down", show=False),
        Binding("up,k", "scroll(-1)", "up", show=False),
        Binding("pagedown,space", "scroll(10)", "down", show=False),
        Binding("pageup", "scroll(-10)", "up", show=False),
    ]
    CSS = _css("Reading")

    def __init__(self, title: str, text: str) -> None:
        super().__init__()
        self._title = title
        self._text = text

    @override
    def compose(self) -> ComposeResult:
        with VerticalScroll(classes="box") as box:
            box.border_title = printable(self._title).replace("[", r"\[")
            box.border_subtitle = "Esc closes"
            yield Static(plain(self._text), markup=False)

    def action_leave(self) -> None:
        _ = self.dismiss(None)

    def action_scroll(self, by: int) -> None:
        self.query_one(VerticalScroll).scroll_relative(y=by, animate=False)


class Asking(ModalScreen[bool]):
    """A question that only `y` answers yes: what moves work is not done by a key too many."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("y", "answer(True)", "yes"),
        Binding("n,escape,q,enter", "answer(False)", "no"),
    ]
    CSS = _css("Asking")

    def __init__(self, question: str) -> None:
        super().__init__()
        self._question = question

    @override
    def compose(self) -> ComposeResult:
        with Vertical(classes="box"):
            yield Static(f"{plain(self._question)}\n\ny: yes    n: no", markup=False)

    def action_answer(self, answer: bool) -> None:
        _ = self.dismiss(answer)


class Writing(ModalScreen[str | None]):
    """A line to write; Escape leaves all as it was."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape", "leave", "close")]
    CSS = _css("Writing")

    def __init__(self, question: str, begun: str = "") -> None:
        super().__init__()
        self._question = question
        self._begun = begun

    @override
    def compose(self) -> ComposeResult:
        with Vertical(classes="box"):
            yield Static(plain(self._question), markup=False)
            yield Input(value=self._begun, compact=True)

    def on_mount(self) -> None:
        self.query_one(Input).focus()

    def on_input_submitted(self, event: Input.Submitted) -> None:
        _ = self.dismiss(event.value.strip())

    def action_leave(self) -> None:
        _ = self.dismiss(None)
