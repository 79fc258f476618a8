"""A replica that learns late of a client that has left is told which request to end."""

from __future__ import annotations

import asyncio
import json

import msgspec
import pytest

from proxy.contract import ReplicaRecord
from proxy.core import limits
from tests.fakes.engine import Connection, Received, ScriptedEngine, answer_json
from tests.fakes.plane import RealPlane, chat_request, until
from tests.fakes.simulator import simulator
from tests.fakes.talk import Talk, on_uvloop

ABORT = "/abort_request"
NAMED = ("x-request-id: theirs", "x-override-rid: another's", "x-override-priority: 0")


async def late(connection: Connection, request: Received) -> None:
    """Be silent to whoever wants an answer."""
    if request.target != ABORT:
        await asyncio.Event().wait()
    await answer_json(connection, b"")


def takes_ids(engine: ScriptedEngine, replica_id: str = "a") -> ReplicaRecord:
    return msgspec.structs.replace(engine.record(replica_id), rid_header=True)


def aborted(engine: ScriptedEngine) -> list[str]:
    found = [r for r in engine.requests if r.target == ABORT]
    return [json.loads(request.body)["rid"] for request in found]


@on_uvloop
async def test_a_client_that_leaves_before_the_answer_has_its_request_ended() -> None:
    async with ScriptedEngine(late) as engine, RealPlane([takes_ids(engine)]) as proxy:
        async with Talk(proxy.port) as one, Talk(proxy.port) as other:
            for talk in (one, other):
                await talk.send(chat_request(fields=NAMED))
            await until(lambda: len(engine.requests) == 2)
        await until(lambda: len(aborted(engine)) == 2)
        await until(lambda: not len(proxy.plane.aborts))
        sent = [r for r in engine.requests if r.target != ABORT]
        assert sorted(aborted(engine)) == sorted(r.fields["x-override-rid"] for r in sent)
        assert len(set(aborted(engine))) == 2  # though the client had one name for both
        assert {r.fields["x-request-id"] for r in sent} == {"theirs"}
        assert not any("x-override-priority" in r.fields for r in sent)
        assert proxy.plane.aborts.sent_total == 2


@on_uvloop
async def test_whoever_is_answered_or_has_no_such_replica_ends_nothing() -> None:
    async def begin(connection: Connection, _: Received) -> None:
        await connection.send(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nok")
        await asyncio.Event().wait()

    async with (
        ScriptedEngine(begin) as engine,
        ScriptedEngine(late) as unlike,
        RealPlane([takes_ids(engine)]) as proxy,
        RealPlane([unlike.record("b")]) as other,
    ):
        async with Talk(proxy.port) as talk:
            await talk.send(chat_request())
            await talk.read()  # the answer has begun
        async with Talk(other.port) as talk:
            await talk.send(chat_request(fields=NAMED))
            await until(lambda: unlike.requests)
        await until(lambda: not proxy.plane.exchanges_open and not other.plane.exchanges_open)
        await until(lambda: not proxy.plane.upstreams.open_count + other.plane.upstreams.open_count)
        await asyncio.sleep(0.05)  # what is not sent cannot be awaited
        assert "x-override-rid" not in unlike.requests[0].fields
        assert aborted(engine) == aborted(unlike) == []


@on_uvloop
async def test_only_so_many_are_told_at_once_and_none_waits_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(limits, "ABORTS_MAX", 1)
    monkeypatch.setattr(limits, "ABORT_TIMEOUT_S", 0.2)

    async def mute(_: Connection, __: Received) -> None:
        await asyncio.Event().wait()

    async with ScriptedEngine(mute) as engine, RealPlane([takes_ids(engine)]) as proxy:
        async with Talk(proxy.port) as one, Talk(proxy.port) as other:
            for talk in (one, other):
                await talk.send(chat_request())
            await until(lambda: len(engine.requests) == 2)
        await until(lambda: not proxy.plane.exchanges_open)
        aborts = proxy.plane.aborts
        assert (aborts.sent_total, aborts.dropped_total, len(aborts)) == (1, 1, 1)
        await until(lambda: not len(aborts))
        await until(lambda: not proxy.plane.upstreams.open_count)
        assert proxy.suspects == []


@on_uvloop
async def test_a_simulated_sglang_stops_at_once() -> None:
    """It would see only after an hour that nobody is there, and compute for 40 s."""
    ask = {"model": "demo", "messages": [{"role": "user", "content": "x"}], "max_tokens": 2000}
    slowly = {"dialect": "sglang", "notice_s": 3600.0, "time_scale": 0.05}
    async with simulator(**slowly, header_overrides=True) as engine:
        record = ReplicaRecord(replica_id="a", url=engine.url, models=("demo",), rid_header=True)
        async with RealPlane([record]) as proxy:
            async with Talk(proxy.port) as talk:
                await talk.send(chat_request(json.dumps(ask).encode()))
                await engine.until(lambda state: state["running"] == 1)
            await engine.until(lambda state: not state["running"])
            await until(lambda: not len(proxy.plane.aborts))
