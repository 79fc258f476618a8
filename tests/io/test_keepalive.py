"""Streams that wait are kept alive by comments, if an operator wants that; all else goes on."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable

import msgspec
import openai
import pytest
from anthropic import Anthropic
from openai import OpenAI

from proxy.contract import PoolRecord
from tests.fakes.engine import ScriptedEngine, streaming
from tests.fakes.plane import (
    EVENTS,
    LAST_CHUNK,
    STREAM_HEAD,
    Bench,
    Client,
    answer,
    chat_request,
    chunk,
    records,
    until,
)
from tests.fakes.proxy_process import ProxyProcess
from tests.fakes.told_manager import ToldManager

MakeBench = Callable[..., Bench]
ZERO = PoolRecord(model="m", pool="m", wakes=True, start_s=2.0)
UP = msgspec.structs.replace(ZERO, awake=1)
COMMENT = b": waiting\n\n"
STREAMED = b'{"model":"m","stream":true,"messages":[{"role":"user","content":"hello"}]}'


@pytest.fixture
def zero(make_bench: MakeBench) -> Bench:
    bench = make_bench((), keepalive_comment_secs=2)
    bench.publish(pools=(ZERO,))
    return bench


def waiting(bench: Bench, body: bytes = STREAMED, minor: int = 1) -> Client:
    client = bench.client()
    client.send(chat_request(body, minor=minor))
    return client


def up(bench: Bench) -> None:
    bench.publish(*(msgspec.structs.replace(one, pool="m") for one in records("a")), pools=(UP,))


def body_of(client: Client) -> bytes:
    (got,) = client.answers()
    return got.body


async def test_a_stream_begins_with_comments_and_goes_on_with_its_answer(zero: Bench) -> None:
    client = waiting(zero)
    zero.sweep(1.9)
    assert client.received == b""
    zero.sweep(0.2)
    zero.sweep(1.0)
    zero.sweep(1.1)
    assert body_of(client) == 2 * COMMENT
    up(zero)
    engine = await zero.engine()
    zero.sweep(2.1)  # its prompt is being computed
    assert body_of(client) == 3 * COMMENT
    engine.send(STREAM_HEAD + chunk(EVENTS[0]))
    zero.sweep(2.1)  # the stream is the engine's now
    engine.send(chunk(EVENTS[-1]) + LAST_CHUNK)
    got = client.answer()
    assert (got.status, got.body) == (200, 3 * COMMENT + EVENTS[0] + EVENTS[-1])
    assert got.fields["content-type"].startswith("text/event-stream")
    assert zero.plane.telemetry.keepalive_comments_total == 3
    client.send(chat_request())  # the connection lives on
    (await zero.engine()).send(answer())
    assert client.answers("POST", "POST")[1].status == 200


@pytest.mark.parametrize(
    ("body", "minor"), [(STREAMED.replace(b"true", b"false"), 1), (STREAMED, 0)]
)
async def test_what_is_no_stream_or_knows_no_chunks_gets_no_comments(
    zero: Bench, body: bytes, minor: int
) -> None:
    client = waiting(zero, body, minor)
    zero.sweep(10.0)
    assert client.received == b""
    client.transport.hang_up()


async def test_nobody_gets_comments_unless_an_operator_wants_them(make_bench: MakeBench) -> None:
    bench = make_bench(())
    bench.publish(pools=(ZERO,))
    client = waiting(bench)
    bench.sweep(100.0)
    assert client.received == b""
    client.transport.hang_up()


async def test_a_wait_that_ends_in_vain_ends_the_stream_by_an_error_event(
    make_bench: MakeBench,
) -> None:
    bench = make_bench((), keepalive_comment_secs=2, hold_timeout_secs=3)
    bench.publish(pools=(ZERO,))
    client = waiting(bench)
    bench.sweep(2.1)
    bench.sweep(1.0)
    (got,) = client.answers()
    assert not got.complete  # and so nobody takes it for a whole one
    assert client.transport.closed
    events = got.body.removeprefix(COMMENT)
    assert events.startswith(b"data: ")
    assert events.endswith(b"\n\n")
    assert json.loads(events[6:])["error"]["code"] == "not_awake"
    assert bench.outcomes() == {("503", "not_awake"): 1}


async def test_an_engines_error_is_told_as_an_event(zero: Bench) -> None:
    client = waiting(zero)
    zero.sweep(2.1)
    up(zero)
    engine = await zero.engine()
    engine.send(answer(b'{\n "error": {"message": "too long", "code": 400}\n}', status=400))
    (got,) = client.answers()
    assert not got.complete
    lines = got.body.removeprefix(COMMENT).removesuffix(b"\n\n").split(b"\n")
    assert all(line.startswith(b"data: ") for line in lines)
    assert json.loads(b"\n".join(line[6:] for line in lines))["error"]["message"] == "too long"
    assert zero.outcomes() == {("400", "ok"): 1}


@pytest.mark.parametrize(
    "said",
    [
        answer(),  # no stream
        answer(fields=["content-encoding: gzip"]),
        STREAM_HEAD.replace(b"200 OK", b"503 No"),
        STREAM_HEAD.replace(b"transfer-encoding: chunked\r\n", b"connection: close\r\n"),
    ],
    ids=["whole", "packed", "an error without end", "ends by a close"],
)
async def test_an_answer_that_cannot_go_on_there_ends_the_stream(zero: Bench, said: bytes) -> None:
    client = waiting(zero)
    zero.sweep(2.1)
    up(zero)
    (await zero.engine()).send(said + b"octets that nobody waits for")
    (got,) = client.answers()
    assert not got.complete
    error = json.loads(got.body.removeprefix(COMMENT)[6:])["error"]
    assert error["code"] == "bad_replica_answer"


async def test_a_replica_that_dies_after_the_comments_is_told_of(zero: Bench) -> None:
    client = waiting(zero)
    zero.sweep(2.1)
    up(zero)
    engine = await zero.engine()
    engine.send(STREAM_HEAD + chunk(EVENTS[0]))
    engine.transport.hang_up()
    await zero.settle()
    (got,) = client.answers()
    assert not got.complete
    assert got.body.startswith(COMMENT + EVENTS[0] + b"data: ")
    assert b"replica_lost" in got.body


async def test_a_client_that_goes_after_the_comments_leaves_nothing(zero: Bench) -> None:
    client = waiting(zero)
    zero.sweep(2.1)
    client.transport.hang_up()
    await zero.settle()
    assert zero.plane.waiting.count == 0


# --- as the official clients read it --------------------------------------------------------------

_CHAT = (
    b'data: {"id":"c","object":"chat.completion.chunk","created":1,"model":"m","choices":'
    b'[{"index":0,"delta":{"content":"Hello"},"finish_reason":null}]}\n\n',
    b"data: [DONE]\n\n",
)
_MESSAGES = (
    b'event: message_start\ndata: {"type":"message_start","message":{"id":"x","type":"message",'
    b'"role":"assistant","model":"m","content":[],"stop_reason":null,"stop_sequence":null,'
    b'"usage":{"input_tokens":1,"output_tokens":0}}}\n\n',
    b'event: content_block_start\ndata: {"type":"content_block_start","index":0,'
    b'"content_block":{"type":"text","text":""}}\n\n',
    b'event: content_block_delta\ndata: {"type":"content_block_delta","index":0,'
    b'"delta":{"type":"text_delta","text":"Hello"}}\n\n',
    b'event: message_stop\ndata: {"type":"message_stop"}\n\n',
)


def _chat(base_url: str) -> str:
    with OpenAI(base_url=base_url + "/v1", api_key="k", max_retries=0) as client:
        stream = client.chat.completions.create(
            model="m", messages=[{"role": "user", "content": "x"}], stream=True
        )
        return "".join(piece.choices[0].delta.content or "" for piece in stream)


def _messages(base_url: str) -> str:
    with (
        Anthropic(base_url=base_url, api_key="k", max_retries=0) as client,
        client.messages.stream(
            model="m", max_tokens=9, messages=[{"role": "user", "content": "x"}]
        ) as stream,
    ):
        return "".join(stream.text_stream)


class _Asked:
    """What a client of the blocking kind got, on a thread of its own."""

    def __init__(self, ask: Callable[[str], str], base_url: str) -> None:
        self.text = ""
        self.error: Exception | None = None
        self._thread = threading.Thread(target=self._run, args=(ask, base_url), daemon=True)
        self._thread.start()

    def _run(self, ask: Callable[[str], str], base_url: str) -> None:
        try:
            self.text = ask(base_url)
        except Exception as error:  # noqa: BLE001 - the test looks at it
            self.error = error

    async def end(self) -> None:
        await asyncio.to_thread(self._thread.join, 30.0)


async def test_the_official_clients_read_past_the_comments_and_raise_the_error() -> None:
    async with (
        ToldManager() as manager,
        ScriptedEngine() as engine,
        ProxyProcess(
            *("--manager-url", manager.url),
            *("--keepalive-comment-secs", "0.1", "--hold-timeout-secs", "20"),
        ) as proxy,
    ):
        record = msgspec.structs.replace(engine.record("a"), pool="m")
        base_url = f"http://127.0.0.1:{proxy.port}"
        for ask, events in ((_chat, _CHAT), (_messages, _MESSAGES)):
            engine.script = streaming(*events)
            await manager.publish(pools=(ZERO,))
            await until(lambda: manager.reports[-1:] and manager.reports[-1].fleet_version)
            await until(lambda: manager.reports[-1].fleet_version == manager.version)
            before = await proxy.metric("doherty_keepalive_comments_total")
            asked = _Asked(ask, base_url)
            while await proxy.metric("doherty_keepalive_comments_total") < before + 2:
                await asyncio.sleep(0.02)
            await manager.publish(record, pools=(UP,))
            await asked.end()
            assert (asked.text, asked.error) == ("Hello", None)
        await manager.publish(pools=(ZERO,))
        await until(lambda: manager.reports[-1].fleet_version == manager.version)
        before = await proxy.metric("doherty_keepalive_comments_total")
        asked = _Asked(_chat, base_url)
        while await proxy.metric("doherty_keepalive_comments_total") < before + 1:
            await asyncio.sleep(0.02)
        await manager.publish(pools=(msgspec.structs.replace(ZERO, wakes=False),))
        await asked.end()
        assert isinstance(asked.error, openai.APIError)
        assert asked.error.code == "no_replica"
