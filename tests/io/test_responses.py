"""Answers that one replica keeps: what goes on from them comes to it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from proxy.contract import ReplicaRecord
from proxy.core import limits
from proxy.core.response_id import find_id
from proxy.core.responses import Responses
from proxy.core.session import response_key
from tests.fakes.plane import (
    LAST_CHUNK,
    STREAM_HEAD,
    Bench,
    Client,
    Engine,
    answer,
    chunk,
    records,
)

MakeBench = Callable[..., Bench]
PLAIN = b'{"id":"resp_ab-1","object":"response","previous_response_id":"resp_no","output":[]}'
CREATED = b"event: response.created\ndata: " + (
    b'{"response": {"id": "resp_ab-1", "status": "in_progress"}, "type": "response.created"}\n\n'
)


def turn(previous: str = "", *, text: str = "hello", model: str = "m") -> bytes:
    field = f',"previous_response_id":"{previous}"' if previous else ""
    body = f'{{"model":"{model}","input":"{text}"{field}}}'.encode()
    head = f"POST /v1/responses HTTP/1.1\r\nhost: p\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


def streamed(engine: Engine, octets: bytes = CREATED) -> None:
    engine.send(STREAM_HEAD + chunk(octets))
    engine.send(chunk(b"data: [DONE]\n\n") + LAST_CHUNK)


async def first_turn(bench: Bench) -> tuple[Client, Engine]:
    client, engine = await bench.begun(turn())
    engine.send(answer(PLAIN))
    assert client.answer().status == 200
    return client, engine


@pytest.mark.parametrize("how", ["plain", "stream", "stream in pieces"])
async def test_the_next_turn_comes_to_where_the_answer_is(make_bench: MakeBench, how: str) -> None:
    bench = make_bench(records("abcdefgh"))
    client, engine = await bench.begun(turn())
    if how == "plain":
        engine.send(answer(PLAIN))
    elif how == "stream":
        streamed(engine)
    else:
        octets = STREAM_HEAD + chunk(CREATED)
        for at in range(len(octets)):
            engine.send(octets[at : at + 1])
        engine.send(LAST_CHUNK)
    assert client.answer().status == 200
    for number in range(5):  # whatever the text, and however often
        other, there = await bench.begun(turn("resp_ab-1", text=f"{number}" * 3000))
        assert there.replica_id == engine.replica_id
        there.send(answer(b'{"id":"resp_2"}'))
        assert other.answer().status == 200
    assert bench.plane.telemetry.decisions["response"] == 5


@pytest.mark.parametrize(
    "request_line", [b"GET /v1/responses/resp_ab-1", b"POST /v1/responses/resp_ab-1/cancel"]
)
async def test_a_look_up_asks_there_first_and_then_the_others(
    make_bench: MakeBench, request_line: bytes
) -> None:
    bench = make_bench(records("abcd"))
    _, engine = await first_turn(bench)
    client = bench.client()
    client.send(request_line + b" HTTP/1.1\r\nhost: p\r\n\r\n")
    asked = []
    while not client.received:
        there = await bench.engine()
        asked.append(there.replica_id)
        there.send(answer(b"{}", status=404))
    assert asked[0] == engine.replica_id
    assert sorted(asked) == list("abcd")


async def test_where_the_replica_is_gone_the_prompt_decides(make_bench: MakeBench) -> None:
    bench = make_bench(records("ab"))
    _, engine = await first_turn(bench)
    (other,) = {"a", "b"} - {engine.replica_id}
    bench.publish(*records(other))
    client, there = await bench.begun(turn("resp_ab-1"))
    assert there.replica_id == other
    there.send(answer(b'{"error":{"message":"not found"}}', status=404))
    assert client.answer().status == 404


async def test_it_waits_for_room_there_and_not_for_less_work(make_bench: MakeBench) -> None:
    fleet = [
        ReplicaRecord(replica_id=name, url=f"http://127.0.0.1:{port}", models=("m",), max_inputs=2)
        for port, name in enumerate("ab", 30000)
    ]
    bench = make_bench(fleet)
    _, home = await first_turn(bench)
    long = "x" * 400_000
    _, one = await bench.begun(turn("resp_ab-1", text="1" + long))
    _, two = await bench.begun(turn("resp_ab-1", text="2" + long))
    assert one.replica_id == two.replica_id == home.replica_id
    client = bench.client()
    client.send(turn("resp_ab-1", text="3"))
    await bench.settle()
    assert bench.plane.waiting.count == 1
    one.send(answer())
    two.send(answer())
    there = await bench.engine()
    assert there.replica_id == home.replica_id
    there.send(answer())
    assert client.answer().status == 200


@pytest.mark.parametrize(
    ("octets", "due"),
    [
        (PLAIN, b"resp_ab-1"),
        (CREATED, b"resp_ab-1"),
        (b'{"previous_response_id":"resp_no","object":"response"}', b""),
        (b'{"text":"\\"id\\":\\"resp_no\\""}', b""),
        (b'{"id":"msg_1"}', b""),
        (b'{"id":"resp_' + b"x" * 129 + b'"}', b""),
        (b'{"id":"resp_cut', b""),
    ],
)
def test_only_the_id_of_the_answer_is_its_id(octets: bytes, due: bytes) -> None:
    assert find_id(octets) == due


async def test_the_search_for_an_id_is_bounded(bench: Bench) -> None:
    client = bench.client()
    client.send(turn())
    engine = await bench.engine()
    engine.send(STREAM_HEAD + chunk(b": " + b"x" * limits.RESPONSE_ID_SEARCH_BYTES_MAX + b"\n\n"))
    exchange = client.protocol._exchange
    assert exchange is not None
    assert exchange._beginning is None
    streamed_on = chunk(CREATED) + LAST_CHUNK
    engine.send(streamed_on)
    assert not list(bench.plane.responses.dump())


async def test_other_answers_are_not_searched(bench: Bench) -> None:
    _, engine = await bench.begun()
    engine.send(answer(PLAIN))
    _, engine = await bench.begun(turn())
    engine.send(answer(PLAIN, status=400))
    assert not list(bench.plane.responses.dump())


def test_the_answers_that_are_remembered_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "RESPONSES_MAX", 3)
    responses = Responses()
    for key in (1, 2, 3, 1, 4):  # one that is named again is the youngest again
        responses.stored(key, f"r{key}")
    assert list(responses.dump()) == [(3, "r3"), (1, "r1"), (4, "r4")]
    assert responses.place_of(2) is None


def test_no_id_has_no_key() -> None:
    assert response_key(b"") == 0
    assert response_key(b"resp_1") != response_key(b"resp_2")
