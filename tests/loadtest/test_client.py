"""The client on real sockets: what becomes of a request, whatever the server does."""

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

import pytest

from loadtest.client import Client, RequestError, Target, parse_url
from loadtest.prompts import PromptWriter, Style
from loadtest.replay import Pacing, Replay, WallClock
from loadtest.traces import Arrival, Trace
from tests.fakes.sse_engine import SseEngine

ONE = Arrival(input_tokens=40, output_tokens=3, runs=((1, 1),))
TWO = Trace(source="t", kind="mooncake", arrivals=(ONE, ONE))


@asynccontextmanager
async def client_of(url: str, **options: float) -> AsyncIterator[Client]:
    client = Client(parse_url(url), WallClock().now_s, api_key="k", **options)
    try:
        yield client
    finally:
        client.close()
        await asyncio.sleep(0)


async def replay(url: str, trace: Trace = TWO, timeout_s: float = 30.0) -> Replay:
    clock = WallClock()
    async with client_of(url) as client:
        client._clock = clock.now_s
        made = Replay(
            client.post, PromptWriter(Style(model="demo")), Pacing(timeout_s=timeout_s), clock
        )
        await made.run(trace)
    return made


async def test_a_good_answer_is_measured() -> None:
    async with SseEngine() as engine:
        made = await replay(engine.url)
        assert engine.request_headers[0]["authorization"] == "Bearer k"
    assert [o.error for o in made.outcomes] == ["", ""]
    outcome = made.outcomes[1]
    assert (outcome.prompt_tokens, outcome.cached_tokens, outcome.output_tokens) == (40, 40, 3)
    assert outcome.replica == "demo-0"
    assert outcome.sent_s < outcome.first_content_s <= outcome.last_content_s <= outcome.ended_s


ERRORS = {
    "cut": "cut",
    "no_done": "cut",
    "error_event": "stream_error",
    "http_500": "http_500",
    "not_a_stream": "not_a_stream",
    "garbage": "protocol",
    "stall": "timeout",
}


@pytest.mark.parametrize("mode", ERRORS)
async def test_failures_are_told_apart(mode: str) -> None:
    async with SseEngine() as engine:
        engine.mode = mode
        made = await replay(engine.url, timeout_s=0.2 if mode == "stall" else 30.0)
    assert [o.error for o in made.outcomes] == [ERRORS[mode]] * 2
    assert all(o.detail for o in made.outcomes)


async def test_a_refused_connection_is_its_own_failure() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        made = await replay(f"http://127.0.0.1:{free.getsockname()[1]}")
    assert [o.error for o in made.outcomes] == ["connect", "connect"]


async def test_a_stalled_server_gets_the_next_requests_all_the_same() -> None:
    arrivals = tuple(
        Arrival(at_s=i / 100, input_tokens=4, output_tokens=1, runs=((i, 1),)) for i in range(9)
    )
    async with SseEngine() as engine:
        engine.mode = "stall"
        clock = WallClock()
        async with client_of(engine.url) as client:
            made = Replay(client.post, PromptWriter(Style(model="demo")), Pacing(), clock)
            task = asyncio.get_running_loop().create_task(
                made.run(Trace(source="t", kind="mooncake", arrivals=arrivals))
            )
            await engine.until_arrived(9)
            assert made.outcomes == []  # all nine are open
            engine.release.set()
            await task
    assert [o.error for o in made.outcomes] == [""] * 9


Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def raw_server(handler: Handler) -> AsyncIterator[str]:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await handler(reader, writer)
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"


@pytest.mark.parametrize(
    ("idle_s_max", "answer", "connections"),
    [
        (60.0, OK, 1),
        (-1.0, OK, 3),
        (60.0, b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\nok", 3),
    ],
    ids=["kept", "too long idle", "the server closes"],
)
async def test_connections_are_reused_while_that_is_safe(
    idle_s_max: float, answer: bytes, connections: int
) -> None:
    opened = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal opened
        opened += 1
        while (await reader.readline()).startswith(b"GET"):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(answer)

    async with raw_server(serve) as url, client_of(url, idle_s_max=idle_s_max) as client:
        for _ in range(3):
            assert (await client.get("/x")).body == b"ok"
    assert opened == connections


@pytest.mark.parametrize(
    ("reply", "kind"),
    [
        (b"", "closed"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nok", "cut"),
        (b"220 mail.example ESMTP\r\n\r\n", "protocol"),
    ],
    ids=["no answer", "half an answer", "another protocol"],
)
async def test_what_a_server_breaks_is_named(reply: bytes, kind: str) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(reply)

    async with raw_server(serve) as url, client_of(url) as client:
        with pytest.raises(RequestError) as caught:
            await client.get("/x")
    assert caught.value.kind == kind


async def test_giving_up_closes_the_connection() -> None:
    gone = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        with suppress(ConnectionError):
            await reader.read()
        gone.set()

    async with raw_server(serve) as url, client_of(url) as client:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await client.get("/x")
        await asyncio.wait_for(gone.wait(), 30)


URLS = {
    "http://127.0.0.1:8000": ("127.0.0.1", 8000, "", "127.0.0.1:8000"),
    "http://host/v1/": ("host", 80, "", "host"),
    "https://u:p%40@host/llm/v1": ("host", 443, "/llm", "host"),
    "http://[::1]:99": ("::1", 99, "", "[::1]:99"),
}


@pytest.mark.parametrize("url", URLS)
def test_urls_are_understood(url: str) -> None:
    target = parse_url(url)
    assert (target.host, target.port, target.path_prefix, target.authority) == URLS[url]
    assert target.credentials == ("u:p@" if "@" in url else None)


@pytest.mark.parametrize(
    "url", ["127.0.0.1:8000", "ftp://x", "http://", "http://x:y", "http://x/a b", "http://ü"]
)
def test_other_urls_are_errors(url: str) -> None:
    with pytest.raises(ValueError, match="such as http://"):
        parse_url(url)


def test_the_port_belongs_to_the_authority_unless_it_is_the_usual_one() -> None:
    assert Target(host="h", port=443, tls=False, path_prefix="").authority == "h:443"
