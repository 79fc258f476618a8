"""The line of a request: what happened to it, who it was for, what it used; and no more."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import orjson
import pytest

from proxy.core import head_memory
from proxy.core.cost import Terms
from proxy.io.access_record import AccessRecord
from tests.fakes.plane import (
    CHAT_BODY,
    EVENTS,
    LAST_CHUNK,
    STREAM_HEAD,
    Bench,
    answer,
    chat_request,
    chunk,
    records,
)
from tests.fakes.traces import PARENT, SPAN, TRACE, traced

MakeBench = Callable[..., Bench]
GUIDE = Path(__file__).parents[2] / "deploy" / "guides" / "logs.md"
STREAMED = CHAT_BODY[:-1] + b',"stream":true}'
USAGE = (
    b'data: {"choices":[],"usage":{"prompt_tokens":9,"completion_tokens":6,'
    b'"prompt_tokens_details":{"cached_tokens":4}}}\n\n'
)


class Lines:
    """In the place of the access log."""

    enabled = True
    dropped_total = 0

    def __init__(self) -> None:
        self.records: list[AccessRecord] = []

    def write(self, record: AccessRecord) -> None:
        self.records.append(record)

    def only(self) -> dict[str, Any]:
        (record,) = self.records
        self.records.clear()
        told: dict[str, Any] = msgspec.to_builtins(record, enc_hook=lambda terms: terms.as_dict())
        return told


def logged(bench: Bench) -> Lines:
    bench.plane.access_log = lines = Lines()  # type: ignore[assignment]
    return lines


async def test_a_whole_stream(bench: Bench) -> None:
    lines = logged(bench)
    fields = ["x-stainless-retry-count: 2", "x-request-id: mine"]
    client, engine = await bench.begun(chat_request(STREAMED, fields))
    assert b"x-stainless-retry-count: 2" in engine.received
    bench.clock.advance(0.25)
    first, rest = chunk(EVENTS[0]), chunk(USAGE) + chunk(EVENTS[-1]) + LAST_CHUNK
    engine.send(STREAM_HEAD + first)
    bench.clock.advance(0.5)
    engine.send(rest)
    assert client.answer().status == 200
    line = lines.only()
    assert line["price"]["price_s"] > 0
    due = {
        "request_id": "mine", "status": 200, "upstream_status": 200, "outcome": "ok",
        "termination": "--", "class": "online", "replica": "a", "region": "local", "origin": None,
        "client_retries": 2, "prompt_tokens": 9, "cached_tokens": 4, "completion_tokens": 6,
        "first_octet_ms": 250.0, "tpot_ms": 100.0, "duration_ms": 750.0, "queue_reason": None,
        "trace_id": None, "span_id": None, "attempts": 1, "stream": True, "method": "POST",
        "path": "/v1/chat/completions", "model": "m", "tenant": "", "key_id": "", "preempted": 0,
        "received_bytes": len(first + rest), "cached_tokens_believed": 0, "queue_ms": 0.0,
        "overhead_us": 0,
    }  # fmt: skip
    assert {name: line[name] for name in due} == due
    others = {"at", "client", "price", "decision", "prompt_tokens_estimated"}
    assert set(line) == due.keys() | others
    assert (line["client"], line["decision"]) == ("192.0.2.1", "new")


async def test_a_trace_that_is_recorded_is_named(bench: Bench) -> None:
    lines, kept = logged(bench), traced(bench)
    client, engine = await bench.begun(chat_request(fields=[PARENT]))
    engine.send(answer())
    assert client.answer().status == 200
    line = lines.only()
    assert (line["trace_id"], int(line["span_id"], 16)) == (TRACE, kept[0].span_id)
    client, engine = await bench.begun(chat_request(fields=[f"traceparent: 00-{TRACE}-{SPAN}-00"]))
    engine.send(answer())
    assert client.answer().status == 200
    assert lines.only()["trace_id"] is None


async def test_how_it_ended(make_bench: MakeBench) -> None:
    bench = make_bench(records("ab"), retry_max_retries=0)
    lines = logged(bench)
    client, engine = await bench.begun(chat_request(STREAMED))
    engine.send(STREAM_HEAD + chunk(EVENTS[0]))
    client.transport.hang_up()
    line = lines.only()
    assert (line["status"], line["upstream_status"], line["termination"]) == (499, 200, "CD")
    client, engine = await bench.begun()
    engine.send(answer(b'{"error":{}}', status=503))
    assert client.answer().status == 503
    line = lines.only()
    assert (line["outcome"], line["upstream_status"], line["termination"]) == ("ok", 503, "--")
    client, engine = await bench.begun()
    engine.transport.hang_up()
    await bench.settle()
    line = lines.only()
    assert (line["status"], line["upstream_status"], line["termination"]) == (502, None, "SH")
    client = bench.client()
    client.send(b"GET /health HTTP/1.1\r\nhost: p\r\n\r\n")
    assert lines.only()["termination"] == "L-"
    client.send(chat_request(b"{"))
    assert lines.only()["termination"] == "PR"


async def test_what_is_no_request_has_a_line_too(bench: Bench) -> None:
    lines = logged(bench)
    client = bench.client()
    client.send(b"GET /secret HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n")
    line = lines.only()
    assert (line["status"], line["outcome"]) == (400, "bad_request_head")
    assert (line["termination"], line["method"], line["path"]) == ("PR", "", "")
    assert line["request_id"] in client.received.decode()
    assert bench.outcomes() == {("400", "bad_request_head"): 1}


@pytest.mark.parametrize(("share", "kept"), [(1.0, 1), (0.6, 1), (0.5, 0), (0.0, 0)])
async def test_a_share_of_what_went_well_is_kept(
    make_bench: MakeBench, share: float, kept: int
) -> None:
    bench = make_bench(access_log_ratio=share)  # the test's clock draws 0.5
    lines = logged(bench)
    client, engine = await bench.begun()
    engine.send(answer())
    assert client.answer().status == 200
    assert len(lines.records) == kept
    lines.records.clear()
    for cut in (False, True):  # all that went otherwise
        client, engine = await bench.begun(chat_request(STREAMED))
        engine.send(STREAM_HEAD + chunk(EVENTS[0]) if cut else answer(status=404))
        if cut:
            engine.transport.hang_up()
        await bench.settle()
        lines.only()


def test_the_guide_explains_every_field_and_no_other() -> None:
    text = GUIDE.read_text()
    table = text[text.index("### Fields") : text.index("### Termination")]
    named = [
        name
        for cell in re.findall(r"^\| (`[^|]+) \|", table, re.MULTILINE)
        for name in re.findall(r"`(\w+)`", cell)
    ]
    assert named == list(AccessRecord.__struct_encode_fields__)
    price = re.search(r"^\| `price` \|.*$", table, re.MULTILINE)
    assert price is not None
    assert set(re.findall(r"`(\w+_(?:s|tokens))`", price[0])) == set(Terms.__slots__)


def test_heads_with_a_trace_do_not_push_others_out_of_the_memory() -> None:
    memory = head_memory.HeadMemory(_Head)
    for number in range(50):
        memory.read(b"POST / HTTP/1.1\r\ntraceparent: 00-%032x-1-01\r\ncontent-length: 1" % number)
    assert len(memory) == 0
    memory.read(b"POST / HTTP/1.1\r\ncontent-length: 1")
    assert len(memory) == 1


class _Head:
    counted = True
    content_length = 1

    def __init__(self, block: bytes) -> None:
        self.block = block


def test_a_line_is_one_object() -> None:
    record = AccessRecord(1.0, "i", "c", "", "", 400, None, "o", "PR")
    line = msgspec.json.encode(record)
    assert b"\n" not in line
    assert orjson.loads(line)["class"] == ""
