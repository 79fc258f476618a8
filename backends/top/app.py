"""The screen of `doherty top`: keys in, lines out. What they mean is settled in `look`, `screen`.

The terminal's own sixteen colours are used and its own background, by default; NO_COLOR is obeyed.
The mouse is left to the terminal, so that text can be selected. A frame is drawn when a view comes
(no more often than asked for), when a key is pressed, and once a second to tell how old the view
is; of each only what changed is written.
"""

from __future__ import annotations

import codecs
import locale
import os
import signal
import time
from pathlib import Path
from typing import ClassVar

from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.events import Resize
from typing_extensions import override

from backends.top.board import Board
from backends.top.dialogs import Asking, Reading, Writing, width_inside
from backends.top.explaining import explained, path_of, sample_body
from backends.top.feed import Admin, Broken, FeedError
from backends.top.look import Look, moved
from backends.top.manual import HELP
from backends.top.replicas import details, state_of
from backends.top.screen import Drawn, Heard, draw
from proxy.contract.view import ReplicaView, View

BODY_BYTES_MAX = 8 * 1024 * 1024
MESSAGE_S = 8.0
TICK_S = 1.0


def run_app(url: str, key: str | None, interval_s: float, words: str) -> str:
    """Run until the operator quits; return why there was nothing to show, if so."""
    app = Top(url, key, interval_s=interval_s, words=words)
    app.on_terminal = os.isatty(0)
    app.run(mouse=False)
    return app.problem


def knows_utf8() -> bool:
    """Whether the terminal is said to read UTF-8."""
    return codecs.lookup(locale.getpreferredencoding(do_setlocale=False)).name == "utf-8"


class Top(App[None]):
    """One board, and dialogs over it."""

    ENABLE_COMMAND_PALETTE = False
    on_terminal = False  # which may hang up
    TITLE = "doherty top"
    CSS = "Screen { background: ansi_default; color: ansi_default; }"
    BINDINGS: ClassVar[list[BindingType]] = [
        *(Binding(str(number + 1), f"panel({number})", show=False) for number in range(6)),
        Binding("left", "turn(-1)", show=False),
        Binding("right", "turn(1)", show=False),
        Binding("down,j", "move(1)", show=False),
        Binding("up,k", "move(-1)", show=False),
        Binding("pagedown,space", "page(1)", show=False),
        Binding("pageup", "page(-1)", show=False),
        Binding("home,g", "end(-1)", show=False),
        Binding("end,G", "end(1)", show=False),
        Binding("s", "order", show=False),
        Binding("S", "backwards", show=False),
        Binding("slash", "filter", show=False),
        Binding("escape", "clear", show=False),
        Binding("enter", "details", show=False),
        Binding("d", "wish('drain')", show=False),
        Binding("u", "wish('undrain')", show=False),
        Binding("e", "explain", show=False),
        Binding("p", "pause", show=False),
        Binding("question_mark,h", "manual", show=False),
        Binding("ctrl+l", "redraw", show=False),
        Binding("ctrl+z", "suspend_process", show=False),
        Binding("q,ctrl+c", "quit", show=False),
    ]

    def __init__(self, url: str, key: str | None, interval_s: float = 1.0, words: str = "") -> None:
        super().__init__(ansi_color=True)
        self.theme = "ansi-dark"
        self.problem = ""
        self._admin = Admin(url, key)
        self._interval_s = interval_s
        self._look = Look(words=words, ascii_only=not knows_utf8())
        self._board = Board()
        self._drawn = Drawn((), self._look, (), 0)
        self._view: View | None = None
        self._newest: View | None = None  # that came while paused, or too soon after another
        self._came_s = self._drew_s = 0.0
        self._broken: tuple[Broken, float] | None = None
        self._message = ("", 0.0)

    @override
    def compose(self) -> ComposeResult:
        yield self._board

    def on_mount(self) -> None:
        self._board.focus()
        # After Ctrl-Z and `fg` the terminal's screen is empty, and of the same size as before.
        self.app_resume_signal.subscribe(self, lambda _: self.action_redraw())
        self.run_worker(self._follow(), exit_on_error=False)
        self.set_interval(TICK_S, self._tick)

    def on_resize(self, _: Resize) -> None:
        self._draw()

    async def _follow(self) -> None:
        async with self._admin as admin:
            try:
                await admin.follow(self._on_view, self._on_break)
            except FeedError as error:
                self.problem = str(error)
                self.exit()

    def _on_view(self, view: View) -> None:
        now_s = time.monotonic()
        self._newest, self._came_s, self._broken = view, now_s, None
        if self._view is None or (
            not self._look.paused and now_s - self._drew_s >= self._interval_s - TICK_S / 2
        ):
            self._view, self._drew_s = view, now_s
            self._draw()

    def _on_break(self, broken: Broken) -> None:
        self._broken = (broken, time.monotonic())
        self._draw()

    def _tick(self) -> None:
        if self.on_terminal and not os.isatty(0):
            # It hung up, and that is ignored here (nohup), or the shell that should tell us waits:
            # reading would find the end of the input for ever. There is no screen to give back.
            os._exit(128 + signal.SIGHUP)
        if self._message[0] and time.monotonic() - self._message[1] > MESSAGE_S:
            self._message = ("", 0.0)
        self._draw()

    def _draw(self) -> None:
        size = (self.size.width, self.size.height)
        self._drawn = draw(self._view, self._look, self._heard(), size, self._message[0])
        self._look = self._drawn.look
        self._board.put(self._drawn.lines)

    def _heard(self) -> Heard:
        now_s = time.monotonic()
        age_s = now_s - self._came_s
        if self._broken is None:
            return Heard(age_s)
        broken, at_s = self._broken
        return Heard(age_s, broken.words, max(at_s + broken.pause_s - now_s, 0.0))

    def _say(self, message: str) -> None:
        self._message = (message, time.monotonic())
        self._draw()

    def _choose(self, look: Look) -> None:
        self._look = look
        self._draw()

    def _at_cursor(self) -> ReplicaView | None:
        """Return the replica under the cursor; None where the panel shows none."""
        if self._view is None or self._look.panel or self._look.swapped:
            return None
        name = self._look.place.name
        return next((one for one in self._view.replicas if one.replica_id == name), None)

    # What keys do.

    def action_panel(self, number: int) -> None:
        self._choose(self._look.at_panel(number))

    def action_turn(self, by: int) -> None:
        self._choose(self._look.at_panel(self._look.panel + by))

    def action_swap(self) -> None:
        self._choose(self._look._replace(swapped=not self._look.swapped))

    def action_move(self, by: int) -> None:
        self._choose(self._look.with_place(moved(self._look.place, self._drawn.names, by)))

    def action_page(self, by: int) -> None:
        self.action_move(by * max(self._drawn.page - 1, 1))

    def action_end(self, direction: int) -> None:
        self.action_move(direction * len(self._drawn.names))

    def action_order(self) -> None:
        if self._look.panel:
            self._say("the replicas (1) can be sorted; the other tables have their order")
        else:
            self._choose(self._look.next_order())

    def action_backwards(self) -> None:
        self._choose(self._look.turned())

    def action_filter(self) -> None:
        def chosen(words: str | None) -> None:
            if words is not None:
                self._choose(self._look._replace(words=words))

        _ = self.push_screen(
            Writing("Only rows with these words (empty: all):", self._look.words), chosen
        )

    def action_clear(self) -> None:
        self._choose(self._look._replace(words=""))

    def action_pause(self) -> None:
        paused = not self._look.paused
        if not paused and self._newest is not None:
            self._view, self._drew_s = self._newest, time.monotonic()
        self._choose(self._look._replace(paused=paused))

    def action_redraw(self) -> None:
        for screen in self.screen_stack:
            for widget in (screen, *screen.walk_children()):
                widget.refresh()

    def action_manual(self) -> None:
        _ = self.push_screen(Reading("doherty top", HELP))

    def action_details(self) -> None:
        replica = self._at_cursor()
        if replica is None or self._view is None:
            self._say("Enter tells more of a replica (1)")
            return
        pairs = details(replica, self._view.proxy)
        text = "\n".join(f"{name:<22}{said}" for name, said in pairs)
        _ = self.push_screen(Reading(replica.replica_id, text))

    def action_wish(self, wish: str) -> None:
        replica = self._at_cursor()
        if replica is None or self._view is None:
            self._say(f"choose a replica first (1), then {wish[0]}")
        elif refusal := self._view.proxy.can_drain:
            self._say(f"no {wish}: {refusal}")
        else:
            _ = self.push_screen(
                Asking(_question(replica, wish)), lambda yes: self._wish(replica, wish, yes)
            )

    def _wish(self, replica: ReplicaView, wish: str, yes: bool | None) -> None:
        if yes:
            self.run_worker(self._send_wish(replica.replica_id, wish), exit_on_error=False)
        else:
            self._say("nothing was done")

    async def _send_wish(self, replica_id: str, wish: str) -> None:
        self._say(f"{replica_id}: {wish} asked for")
        try:
            self._say(await self._admin.wish(replica_id, wish))
        except FeedError as error:
            self._say(f"no {wish}: {error}")

    def action_explain(self) -> None:
        if self._view is None:
            return
        models = [one.model for one in self._view.models]
        models += [name for one in self._view.replicas for name in one.models]
        question = "File with a request's JSON body; it is not sent to a replica.\n" + (
            f"Empty: a short chat with {models[0]}." if models else ""
        )

        def chosen(path: str | None) -> None:
            if path is not None:
                self.run_worker(self._explain(path, models), exit_on_error=False)

        _ = self.push_screen(Writing(question), chosen)

    async def _explain(self, path: str, models: list[str]) -> None:
        try:
            body = _body(path) if path else sample_body(models[0] if models else "")
            answer = await self._admin.explain(body, path_of(body))
        except (OSError, ValueError, TypeError, FeedError) as error:
            self._say(f"not explained: {error}")
        else:
            _ = self.push_screen(
                Reading("where it would go", explained(answer, width_inside(self.size.width)))
            )


def _body(path: str) -> bytes:
    """Return a file's octets. Raises `OSError` and `ValueError`."""
    with Path(path).expanduser().open("rb") as file:
        body = file.read(BODY_BYTES_MAX + 1)
    if len(body) > BODY_BYTES_MAX:
        raise ValueError(f"{path} has more than {BODY_BYTES_MAX} octets")
    return body


def _question(replica: ReplicaView, wish: str) -> str:
    if wish == "undrain":
        return f"Have {replica.replica_id} take requests again? It is {state_of(replica)}."
    return (
        f"Drain {replica.replica_id}? It gets no further request; "
        f"the {replica.inflight} it has go on to their end."
    )
