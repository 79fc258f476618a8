"""The admin listener, asked: streams that break, keys, refusals, silence."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from backends.failure import StartError
from backends.top import feed
from backends.top.feed import Admin, Broken, FeedError, check_url
from proxy.contract.view import View
from tests.fakes.view_server import ViewServer
from tests.fakes.views import a_view

VIEW = a_view(3)


class Follower:
    """What a stream has told."""

    def __init__(self) -> None:
        self.views: list[View] = []
        self.breaks: list[Broken] = []
        self._told = asyncio.Event()

    async def follow(self, admin: Admin) -> None:
        await admin.follow(self._view, self._break, pause_s_min=0.01)

    def _view(self, view: View) -> None:
        self.views.append(view)
        self._told.set()

    def _break(self, broken: Broken) -> None:
        self.breaks.append(broken)
        self._told.set()

    async def until(self, views: int, breaks: int) -> None:
        while len(self.views) < views or len(self.breaks) < breaks:
            self._told.clear()
            await self._told.wait()


@asynccontextmanager
async def _following() -> AsyncIterator[tuple[ViewServer, Follower]]:
    follower = Follower()
    async with (
        ViewServer(VIEW) as server,
        Admin(server.url, None) as admin,
        asyncio.TaskGroup() as group,
    ):
        following = group.create_task(follower.follow(admin))
        yield server, follower
        following.cancel()


@pytest.mark.parametrize("url", ["", "h:1", "ftp://h", "http://"])
def test_what_is_no_address_is_told(url: str) -> None:
    with pytest.raises(StartError, match="such as http://"):
        check_url(url)


async def test_views_come_as_they_are_shown_and_a_cut_stream_is_taken_up() -> None:
    async with _following() as (server, follower):
        await follower.until(1, 0)
        await server.show(a_view(4))
        await follower.until(2, 0)
        await server.cut()
        await follower.until(3, 1)
    assert [len(view.replicas) for view in follower.views] == [3, 4, 4]
    assert follower.breaks[0].words == "the stream ended"


async def test_the_pause_doubles_while_nobody_answers_and_starts_anew_after_a_view() -> None:
    async with _following() as (server, follower):
        await follower.until(1, 0)
        server.refused = 503
        await server.cut()
        await follower.until(1, 4)
        server.refused = 0
        await follower.until(2, 4)
        server.refused = 503
        await server.cut()
        await follower.until(2, 6)
    pauses = [round(broken.pause_s, 3) for broken in follower.breaks]
    assert pauses[:4] == [0.01, 0.02, 0.04, 0.08]
    assert 0.01 in pauses[4:], "a view came between"
    assert follower.breaks[1].words == "watched enough"


async def test_nobody_there_is_told_with_the_address() -> None:
    async with ViewServer(VIEW) as server:
        url = server.url
    async with Admin(url, None) as admin:
        with pytest.raises(FeedError, match=f"{url} does not answer: ") as caught:
            await admin.fetch()
    assert not caught.value.final


async def test_silence_is_a_lost_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed, "SILENCE_S_MAX", 0.05)
    async with _following() as (_, follower):
        await follower.until(1, 1)
    assert follower.breaks[0].words.endswith("is silent")


FINAL = [
    (401, "the admin key is wrong or missing"),
    (403, "watched enough"),
    (404, "watched enough"),
]


@pytest.mark.parametrize(("status", "words"), FINAL, ids=[str(case[0]) for case in FINAL])
async def test_what_will_not_change_is_not_tried_again(status: int, words: str) -> None:
    async with ViewServer(VIEW) as server, Admin(server.url, None) as admin:
        server.refused = status
        with pytest.raises(FeedError, match=words) as caught:
            await Follower().follow(admin)
    assert caught.value.final


async def test_once_views_have_come_a_refusal_is_tried_again() -> None:
    async with _following() as (server, follower):
        await follower.until(1, 0)
        server.refused = 404
        await server.cut()
        await follower.until(1, 3)
        server.refused = 0
        await follower.until(2, 3)


async def test_the_key_opens() -> None:
    async with ViewServer(VIEW, key="open-sesame") as server:
        async with Admin(server.url, "open-sesame") as admin:
            assert await admin.fetch() == VIEW
        async with Admin(server.url, None) as admin:
            with pytest.raises(FeedError, match="DOHERTY_ADMIN_API_KEY"):
                await admin.fetch()


async def test_wishes_and_dry_runs_are_sent_as_they_are() -> None:
    async with ViewServer(VIEW) as server, Admin(server.url, None) as admin:
        assert await admin.wish("pool/a-0", "drain") == "pool/a-0: drain was taken"
        server.wish_answer = (404, "no replica 'b'; there are: a")
        with pytest.raises(FeedError, match="no replica 'b'; there are: a"):
            await admin.wish("b", "undrain")
        server.explanation = b'{"decision": null}'
        assert await admin.explain(b'{"prompt": ""}', "/v1/completions") == b'{"decision": null}'
    assert server.wishes == [("pool/a-0", "drain"), ("b", "undrain")]
    assert server.explained == [("/v1/completions", b'{"prompt": ""}')]


async def test_a_view_of_a_large_fleet_comes_in_many_pieces(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What has come when the first piece is there is no view yet."""
    view = a_view(2000)
    async with ViewServer(view) as server, Admin(server.url, None) as admin:
        assert await admin.fetch() == view
        server.explanation = b" " * 2_000_000 + b"{}"
        assert await admin.explain(b"{}", "/v1/chat/completions") == server.explanation
        monkeypatch.setattr(feed, "ANSWER_BYTES_MAX", 1_000_000)
        with pytest.raises(FeedError, match="longer than 1000000 bytes"):
            await admin.explain(b"{}", "/v1/chat/completions")


async def test_something_else_than_a_view_is_told() -> None:
    async with ViewServer(VIEW) as server, Admin(f"{server.url}/elsewhere", None) as admin:
        with pytest.raises(FeedError, match="is that a proxy's admin listener"):
            await admin.fetch()
