"""The desk over HTTP: what is repeated, what is not, and what is said in the end."""

from __future__ import annotations

import asyncio

import msgspec
import pytest
from aiohttp import web

from backends.offline.desk_client import (
    PAUSE_S_MAX,
    DeskLostError,
    DeskRefusedError,
    RemoteDesk,
    pause_s,
)
from backends.offline.work import ASK_PATH, REPORT_PATH, Ask, Chunk, Line, Receipt, Report, Result

ASK = Ask(worker_id="w", models=("m",), urls=("/v1/completions",), lines_max=2)
CHUNK = Chunk(
    chunk_id="c",
    fence=3,
    hold_s=60.0,
    due_in_s=5.0,
    lines=(Line("job", 0, "/v1/completions", msgspec.Raw(b'{"prompt": "a"}')),),
)
REPORT = Report(
    worker_id="w",
    chunk_id="c",
    fence=3,
    results=(Result(job_id="job", number=0, status=200, body=msgspec.Raw(b'{"id": "x"}')),),
)


class _Service:
    """Answers what it was told to, one after another, and keeps what it heard."""

    def __init__(self, *answers: tuple[int, bytes]) -> None:
        self.answers = list(answers)
        self.heard: list[tuple[str, str, bytes]] = []

    async def _answer(self, request: web.Request) -> web.Response:
        key = request.headers.get("authorization", "")
        self.heard.append((request.path, key, await request.read()))
        status, body = self.answers.pop(0)
        return web.Response(status=status, body=body)

    async def url(self, runners: list[web.AppRunner]) -> str:
        app = web.Application(client_max_size=1 << 26)
        app.router.add_post(ASK_PATH, self._answer)
        app.router.add_post(REPORT_PATH, self._answer)
        runner = web.AppRunner(app)
        runners.append(runner)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        return f"http://127.0.0.1:{runner.addresses[0][1]}"


def _talk(service: _Service, calls: str, patience_s: float = 30.0) -> list[object]:
    """Ask or report (letters a, r) and return what came of each."""

    async def run() -> list[object]:
        runners: list[web.AppRunner] = []
        desk = RemoteDesk(await service.url(runners), "secret", patience_s)
        said: list[object] = []
        try:
            for call in calls:
                try:
                    said.append(await (desk.ask(ASK) if call == "a" else desk.report(REPORT)))
                except (DeskLostError, DeskRefusedError) as error:
                    said.append(error)
        finally:
            await desk.close()
            await runners[0].cleanup()
        return said

    return asyncio.run(run())


def test_a_chunk_comes_and_a_report_goes_with_the_key() -> None:
    receipt = Receipt(held=True, accepted=1, hold_s=9.0, dropped=("gone",))
    service = _Service((200, msgspec.json.encode(CHUNK)), (200, msgspec.json.encode(receipt)))
    assert _talk(service, "ar") == [CHUNK, receipt]
    assert [(path, key) for path, key, _ in service.heard] == [
        (ASK_PATH, "Bearer secret"),
        (REPORT_PATH, "Bearer secret"),
    ]
    assert msgspec.json.decode(service.heard[0][2], type=Ask) == ASK
    assert msgspec.json.decode(service.heard[1][2], type=Report) == REPORT


@pytest.mark.parametrize("nothing", [(204, b""), (200, b"null")])
def test_no_lines_are_none(nothing: tuple[int, bytes]) -> None:
    assert _talk(_Service(nothing), "a") == [None]


def test_a_failure_is_asked_again_until_it_is_none() -> None:
    service = _Service((503, b"busy"), (500, b""), (204, b""))
    assert _talk(service, "a") == [None]
    assert len(service.heard) == 3


def test_a_refusal_is_not_asked_again_and_says_the_desks_word() -> None:
    service = _Service((401, b"wrong work key"))
    (said,) = _talk(service, "r")
    assert isinstance(said, DeskRefusedError)
    assert "401 wrong work key" in str(said)
    assert len(service.heard) == 1


def test_patience_ends_with_the_last_problem() -> None:
    (said,) = _talk(_Service((503, b"the store is locked")), "r", patience_s=0.01)
    assert isinstance(said, DeskLostError)
    assert "the store is locked" in str(said)


def test_nobody_there_is_a_lost_desk() -> None:
    async def run() -> None:
        desk = RemoteDesk("http://127.0.0.1:9", patience_s=0.01)
        try:
            with pytest.raises(DeskLostError):
                await desk.ask(ASK)
        finally:
            await desk.close()

    asyncio.run(run())


def test_pauses_grow_and_end_at_a_bound() -> None:
    assert pause_s(0, 0.0) < pause_s(3, 0.0) < pause_s(3, 0.9)
    assert pause_s(10_000, 0.999) <= PAUSE_S_MAX
