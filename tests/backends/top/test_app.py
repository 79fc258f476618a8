"""The screen by its keys, without a terminal: what each one shows and sends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
from textual.pilot import Pilot

from backends.top.app import Top
from tests.fakes.view_server import ViewServer
from tests.fakes.views import a_view

VIEW = a_view(12)


class Seen:
    """An app, its keys, and the lines that it shows."""

    def __init__(self, app: Top, pilot: Pilot[None]) -> None:
        self.app = app
        self.pilot = pilot

    @property
    def text(self) -> str:
        strips = self.app.screen._compositor.render_strips()
        return "\n".join(strip.text.rstrip() for strip in strips)

    async def press(self, *keys: str) -> str:
        await self.pilot.press(*keys)
        await self.pilot.pause()
        return self.text

    async def until(self, said: Callable[[str], bool]) -> str:
        while not said(text := self.text):
            await asyncio.sleep(0.01)
        return text


@asynccontextmanager
async def _top(server: ViewServer, size: tuple[int, int] = (80, 24)) -> AsyncIterator[Seen]:
    app = Top(server.url, None)
    async with app.run_test(size=size) as pilot:
        seen = Seen(app, pilot)
        await seen.until(lambda text: "REPLICA " in text)
        yield seen


async def test_keys_choose_panels_orders_rows_and_words() -> None:
    async with ViewServer(VIEW) as server, _top(server) as seen:
        assert "[1 replicas]" in seen.text
        assert "OLDEST" in await seen.press("2")
        assert "TOKENS/S" in await seen.press("3")
        assert "scaling decisions" in await seen.press("4")
        assert "[5 routing]" in await seen.press("right")
        assert "LEAST" in (await seen.press("6", "tab")).splitlines()[4], "the second table first"
        assert "by load" in await seen.press("1", "s")
        lines = (await seen.press("S")).splitlines()
        assert "by load, backwards" in lines[3]
        assert seen.app._look.place.name == lines[5].split()[0]
        await seen.press("down", "j", "up")
        assert seen.app._look.place.at == 1
        await seen.press("end")
        assert seen.app._look.place.at == 11
        await seen.press("slash", *"qwen3", "enter")
        assert "deepseek" not in (await seen.press("home"))
        assert "deepseek" in await seen.press("escape")
        assert "other tables have their order" in await seen.press("2", "s")


async def test_draining_asks_first_and_says_what_came_of_it() -> None:
    async with ViewServer(VIEW) as server, _top(server) as seen:
        name = VIEW.replicas[1].replica_id
        assert f"Drain {name}?" in await seen.press("down", "d")
        assert "nothing was done" in await seen.press("enter")
        assert server.wishes == []
        await seen.press("d", "y")
        await seen.until(lambda text: f"{name}: drain was taken" in text)
        server.wish_answer = (503, "the manager does not answer")
        await seen.press("u", "y")
        await seen.until(lambda text: "no undrain: the manager does not answer" in text)
        assert server.wishes == [(name, "drain"), (name, "undrain")]


async def test_where_draining_is_refused_the_reason_is_shown() -> None:
    proxy = msgspec.structs.replace(VIEW.proxy, can_drain="set admin_api_key")
    view = msgspec.structs.replace(VIEW, proxy=proxy)
    async with ViewServer(view) as server, _top(server) as seen:
        assert "no drain: set admin_api_key" in await seen.press("d")
        assert "choose a replica first" in await seen.press("2", "u")


async def test_details_and_the_manual_are_read_and_left() -> None:
    async with ViewServer(VIEW) as server, _top(server) as seen:
        assert "share of the ring" in await seen.press("enter")
        assert "share of the ring" not in await seen.press("escape")
        assert "only rows with these words" in await seen.press("question_mark")
        assert "[1 replicas]" in await seen.press("q"), "q closes the manual, not the program"


async def test_a_request_is_explained_from_a_file_or_made_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    body = tmp_path / "b.js"
    body.write_text('{"prompt": "once", "model": "m"}')
    async with ViewServer(VIEW) as server, _top(server) as seen:
        server.explanation = b'{"decision": {"replica": "m-7", "reason": "prefix"}}'
        await seen.press("e", *body.name, "enter")
        await seen.until(lambda text: "goes to m-7, because: prefix" in text)
        await seen.press("escape", "e", "enter")
        await seen.until(lambda text: "goes to m-7" in text)
        await seen.press("escape", "e", *"no", "enter")
        await seen.until(lambda text: "not explained" in text)
    assert server.explained[0] == ("/v1/completions", body.read_bytes())
    assert server.explained[1][0] == "/v1/chat/completions"


async def test_a_pause_keeps_the_screen_and_ends_with_the_newest() -> None:
    async with ViewServer(VIEW) as server, _top(server) as seen:
        assert "PAUSED" in await seen.press("p")
        await server.show(a_view(5))
        while seen.app._newest is VIEW or len(seen.app._newest.replicas) != 5:  # type: ignore[union-attr]
            await asyncio.sleep(0.01)
        assert "12 replicas" in seen.text
        assert "5 replicas" in await seen.press("p")


async def test_a_stream_that_is_lost_is_told_and_taken_up(monkeypatch: pytest.MonkeyPatch) -> None:
    async with ViewServer(VIEW) as server, _top(server) as seen:
        server.refused = 503
        await server.cut()
        text = await seen.until(lambda text: "STALE" in text)
        assert "again in" in text
        assert VIEW.replicas[0].replica_id in text, "what was known last stays"
        server.refused = 0
        await seen.until(lambda text: "STALE" not in text)


async def test_another_size_is_another_table() -> None:
    async with ViewServer(VIEW) as server, _top(server) as seen:
        assert "PREFILL/S" not in seen.text
        await seen.pilot.resize_terminal(200, 50)
        await seen.until(lambda text: "PREFILL/S" in text)
        await seen.pilot.resize_terminal(40, 10)
        text = await seen.until(lambda text: "PREFILL/S" not in text)
        assert "STATE" in text
        assert max(map(len, text.splitlines())) <= 40


async def test_a_wrong_key_ends_it_with_a_word() -> None:
    async with ViewServer(VIEW, key="k") as server:
        app = Top(server.url, "wrong")
        async with app.run_test() as pilot:
            while not app.problem:
                await pilot.pause()
    assert "the admin key is wrong or missing" in app.problem
