"""The tier on the wire: its client's library reads it, and nothing else of an answer is another."""

from __future__ import annotations

import json
from collections.abc import Callable

import openai
import pytest

from proxy.contract import PoolRecord, ReplicaRecord
from tests.fakes.plane import (
    CHAT_BODY,
    LAST_CHUNK,
    STREAM_HEAD,
    Bench,
    RealPlane,
    answer,
    chat_request,
    chunk,
    records,
)
from tests.fakes.simulator import simulator

MakeBench = Callable[..., Bench]
_FLEX = CHAT_BODY[:-1] + b',"service_tier":"flex","stream":true}'
_WHOLE = (
    b'{"object":"chat.completion","choices":[],"service_tier":null,"usage":{"prompt_tokens":3}}'
)
_EVENT = b'data: {"object":"chat.completion.chunk","choices":[]}\n\n'
_TOLD = b'data: {"object":"chat.completion.chunk","choices":[],"service_tier":"flex"}\n\n'


@pytest.mark.parametrize("dialect", ["vllm", "sglang"])
async def test_the_official_client_reads_the_tier_that_was_used(dialect: str) -> None:
    async with simulator(dialect=dialect) as engine:
        record = ReplicaRecord(replica_id="a", url=engine.url, models=("demo",))
        async with RealPlane([record]) as proxy:
            client = openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{proxy.port}/v1", api_key="k")
            ask = [{"role": "user", "content": "hello"}]
            for wanted, due in (("flex", "flex"), ("priority", "priority"), ("auto", "default")):
                whole = await client.chat.completions.create(
                    model="demo", messages=ask, max_tokens=4, service_tier=wanted
                )  # type: ignore[call-overload]
                assert (whole.service_tier, whole.usage.completion_tokens) == (due, 4)
                stream = await client.chat.completions.create(
                    model="demo", messages=ask, max_tokens=4, service_tier=wanted, stream=True
                )  # type: ignore[call-overload]
                assert {piece.service_tier async for piece in stream} == {due}
                answered = await client.responses.create(
                    model="demo", input="hello", max_output_tokens=4, service_tier=wanted
                )
                assert answered.service_tier == due
                events = await client.responses.create(
                    model="demo", input="hello", service_tier=wanted, stream=True
                )
                told = [e.response.service_tier async for e in events if hasattr(e, "response")]
                assert len(told) > 1
                assert set(told) == {due}
            unasked = await client.chat.completions.create(model="demo", messages=ask, max_tokens=4)  # type: ignore[call-overload]
            assert unasked.service_tier is None
            await client.close()


async def test_a_whole_answer_has_the_length_that_it_has_then(bench: Bench) -> None:
    client, engine = await bench.begun(chat_request(_FLEX))
    sent = answer(_WHOLE)
    engine.send(sent[:-40])
    assert client.received == b""  # its length is not known yet
    engine.send(sent[-40:])
    got = client.answer()
    assert json.loads(got.body) == json.loads(_WHOLE) | {"service_tier": "flex"}
    assert int(got.fields["content-length"]) == len(got.body)
    assert bench.upstreams.idle_count == 1


async def test_an_engine_that_dies_within_a_held_answer_is_told_as_lost(bench: Bench) -> None:
    client, engine = await bench.begun(chat_request(_FLEX))
    engine.send(answer(_WHOLE)[:-40])
    engine.transport.hang_up()
    await bench.settle()
    assert client.answer().status == 502
    assert bench.outcomes() == {("502", "replica_lost"): 1}


async def test_events_go_on_one_by_one_and_end_as_they_did(bench: Bench) -> None:
    client, engine = await bench.begun(chat_request(_FLEX))
    engine.send(STREAM_HEAD)
    seen = client.received
    assert seen.endswith(b"\r\n\r\n")
    engine.send(chunk(_EVENT[:20]))
    assert client.received == seen
    engine.send(chunk(_EVENT[20:]) + chunk(_EVENT))
    engine.send(chunk(b"data: [DONE]\n\n") + LAST_CHUNK)
    assert client.answer().body == _TOLD * 2 + b"data: [DONE]\n\n"


async def test_a_client_of_http_1_0_gets_it_without_chunks(bench: Bench) -> None:
    client, engine = await bench.begun(chat_request(_FLEX, minor=0))
    engine.send(STREAM_HEAD + chunk(_EVENT) + LAST_CHUNK)
    assert client.received.endswith(b"\r\n\r\n" + _TOLD)
    other, engine = await bench.begun(chat_request(_FLEX, minor=0))
    head = (
        b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"
    )
    engine.send(head + chunk(_WHOLE) + LAST_CHUNK)
    body = other.received.partition(b"\r\n\r\n")[2]
    assert json.loads(body)["service_tier"] == "flex"


async def test_a_stream_that_is_cut_says_so_between_two_events(bench: Bench) -> None:
    client, engine = await bench.begun(chat_request(_FLEX))
    engine.send(STREAM_HEAD + chunk(_EVENT) + chunk(_EVENT[:30]))
    engine.transport.hang_up()
    await bench.settle()
    (got,) = client.answers()
    assert not got.complete
    first, second = got.body.split(b"\n\n")[:2]
    assert first + b"\n\n" == _TOLD
    assert json.loads(second.removeprefix(b"data: "))["error"]["code"] == "replica_lost"


async def test_errors_of_an_engine_and_other_routes_stay_as_they_are(bench: Bench) -> None:
    client, engine = await bench.begun(chat_request(_FLEX))
    engine.send(answer(b'{"object":"chat.completion","error":{"message":"no"}}', status=400))
    assert b"service_tier" not in client.answer().body
    request = chat_request(_FLEX).replace(b"/v1/chat/completions", b"/v1/messages")
    client, engine = await bench.begun(request)
    body = b'{"type":"message","usage":{"input_tokens":1,"service_tier":"standard"}}'
    engine.send(answer(body))
    assert client.answer().body == body


async def test_a_pool_of_offline_work_is_told_as_flex(make_bench: MakeBench) -> None:
    bench = make_bench(())
    pool = PoolRecord(model="m", pool="p", work_class="offline", awake=1)
    bench.publish(*records("a"), pools=(pool,))
    client, engine = await bench.begun(chat_request(_FLEX.replace(b'"flex"', b'"auto"')))
    engine.send(STREAM_HEAD + chunk(_EVENT) + LAST_CHUNK)
    assert client.answer().body == _TOLD
