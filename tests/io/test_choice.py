"""Which replica a request comes to, through the whole plane."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable

import msgspec
import pytest

from proxy.contract import ReplicaRecord, ReplicaState
from tests.fakes.plane import (
    CHAT_BODY,
    Bench,
    answer,
    chat_request,
    records,
)

MakeBench = Callable[..., Bench]


# --- which replica --------------------------------------------------------------------------------


async def test_a_model_goes_to_a_replica_that_serves_it(make_bench: MakeBench) -> None:
    bench = make_bench((*records("a", ["m", "shared"]), *records("b", ["n", "shared"])))
    for model, due in ((b"m", "a"), (b"n", "b")):
        client, engine = await bench.begun(chat_request(CHAT_BODY.replace(b'"m"', b'"%b"' % model)))
        assert engine.replica_id == due
        engine.send(answer())
        assert client.answer().status == 200
    client = bench.client()
    client.send(chat_request(CHAT_BODY.replace(b'"m"', b'"nope"')))
    got = client.answer()
    assert got.status == 404
    assert b"served: m, n, shared" in got.body
    client.send(chat_request(b'{"messages":[]}'))
    assert client.answers("POST", "POST")[1].status == 400


@pytest.mark.parametrize("state", [s for s in ReplicaState if s is not ReplicaState.READY])
async def test_only_ready_replicas_get_requests(make_bench: MakeBench, state: ReplicaState) -> None:

    (record,) = records("a")
    bench = make_bench((msgspec.structs.replace(record, state=state),))
    client = bench.client()
    client.send(chat_request())
    got = client.answer()
    assert got.status == 503
    assert not bench.upstreams.dialled


async def test_an_empty_fleet_says_so(make_bench: MakeBench) -> None:
    bench = make_bench(())
    client = bench.client()
    client.send(chat_request())
    assert b"the replica list is empty" in client.answer().body


@pytest.mark.parametrize(
    ("request_line", "known_by", "status"),
    [
        (b"GET /v1/responses/resp_1", "c", 200),
        (b"GET /v1/responses/resp_1", "", 404),
        (b"POST /v1/responses/resp_1/cancel", "b", 200),
        (b"GET /v1/chat/completions/chatcmpl-1?x=1", "b", 200),
        (b"DELETE /v1/chat/completions/chatcmpl-1", "c", 200),
        (b"DELETE /v1/chat/completions/chatcmpl-1", "", 404),
        (b"GET /v1/chat/completions/chatcmpl-1/messages", "a", 200),
        (b"GET /v1/chat/completions?limit=1", "a", 200),
    ],
)
async def test_a_stored_response_is_asked_of_each_replica(
    make_bench: MakeBench, request_line: bytes, known_by: str, status: int
) -> None:
    bench = make_bench(records("abc"))
    client = bench.client()
    client.send(request_line + b" HTTP/1.1\r\nhost: p\r\n\r\n")
    asked = []
    while not client.received:
        engine = await bench.engine()
        asked.append(engine.replica_id)
        assert len(bench.plane.leases) == 1
        found = engine.replica_id == known_by
        engine.send(answer(b'{"id":"resp_1"}' if found else b"{}", status=200 if found else 404))
    got = client.answer(request_line.split()[0].decode())
    assert got.status == status
    assert len(asked) == len(set(asked)) == (3 if not known_by else asked.index(known_by) + 1)


def ranked(ids: str, dp_size: int) -> tuple[ReplicaRecord, ...]:
    return tuple(msgspec.structs.replace(one, dp_size=dp_size) for one in records(ids))


async def test_a_server_is_asked_once_for_a_stored_response_however_many_ranks_it_has(
    make_bench: MakeBench,
) -> None:
    bench = make_bench(ranked("ab", 3))
    client = bench.client()
    client.send(b"GET /v1/responses/resp_1 HTTP/1.1\r\nhost: p\r\n\r\n")
    for _ in range(2):
        (await bench.engine()).send(answer(b"{}", status=404))
    assert client.answer("GET").status == 404
    assert sorted(bench.upstreams.dialled) == ["a", "b"]


async def test_no_rank_is_tried_of_a_server_that_refuses(make_bench: MakeBench) -> None:
    bench = make_bench(ranked("ab", 4))
    bench.upstreams.refusing = {"a"}
    for _ in range(8):
        client, engine = await bench.begun()
        assert engine.replica_id == "b"
        engine.send(answer())
        assert client.answer().status == 200
    assert bench.upstreams.dialled.count("a") <= 1
    assert [replica_id for replica_id, _ in bench.suspects] == ["a"][: len(bench.suspects)]


@pytest.mark.parametrize("policy", ["prefix", "session", "least_load", "round_robin"])
async def test_every_policy_chooses_among_ranks(make_bench: MakeBench, policy: str) -> None:
    bench = make_bench(ranked("a", 3), policy=policy)
    ranks = set()
    for number in range(30):
        body = CHAT_BODY.replace(b"hello", b"hello %d" % number)
        client, engine = await bench.begun(chat_request(body))
        head = engine.received[: engine.received.index(b"\r\n\r\n")]
        (line,) = [line for line in head.split(b"\r\n") if line.startswith(b"x-data-parallel")]
        ranks.add(line)
        engine.send(answer())
        assert client.answer().status == 200
        engine.transport.written.clear()
    assert ranks == {b"x-data-parallel-rank: %d" % rank for rank in range(3)}
    (inflight,) = [s.value for s in bench.plane.gauges(0) if s.name == "replica_inflight"]
    assert inflight == 0


async def test_who_sleeps_gets_no_requests_and_it_is_said(make_bench: MakeBench) -> None:
    (record,) = records("a")
    bench = make_bench((msgspec.structs.replace(record, asleep=True),))
    client = bench.client()
    client.send(chat_request())
    got = client.answer()
    assert (got.status, b"1 asleep" in got.body) == (503, True)


async def test_a_multipart_form_names_its_model(make_bench: MakeBench) -> None:
    bench = make_bench((*records("a", ["m"]), *records("b", ["whisper"])))
    form = (
        b'--XX\r\ncontent-disposition: form-data; name="file"; filename="model"\r\n\r\n\0\1"\r\n'
        b'--XX\r\ncontent-disposition: form-data; name="model"\r\n\r\nwhisper\r\n--XX--\r\n'
    )
    head = (
        b"POST /v1/audio/transcriptions HTTP/1.1\r\nhost: p\r\n"
        b"content-type: multipart/form-data; boundary=XX\r\ncontent-length: %d\r\n\r\n" % len(form)
    )
    client, engine = await bench.begun(head + form)
    assert engine.replica_id == "b"
    assert engine.received.endswith(form)
    assert b"content-type: multipart/form-data; boundary=XX\r\n" in engine.received
    engine.send(answer())
    assert client.answer().status == 200


async def test_the_models_are_the_fleets(make_bench: MakeBench) -> None:
    bench = make_bench((*records("a", ["org/m"]), *records("b", ["n"])))
    client = bench.client()
    paths = (b"/v1/models", b"/v1/models/org/m", b"/v1/models/org%2Fm", b"/v1/models/zz")
    client.send(b"".join(b"GET %b HTTP/1.1\r\nhost: p\r\n\r\n" % path for path in paths))
    await bench.settle()
    listed, raw, encoded, unknown = client.answers("GET", "GET", "GET", "GET")
    assert [m["id"] for m in json.loads(listed.body)["data"]] == ["n", "org/m"]
    assert json.loads(raw.body)["id"] == json.loads(encoded.body)["id"] == "org/m"
    assert unknown.status == 404


async def test_a_replica_that_moved_is_not_reached_at_its_old_address(bench: Bench) -> None:

    _client, engine = await bench.begun()
    engine.send(answer())
    (record,) = records("a")
    bench.publish(msgspec.structs.replace(record, url="http://127.0.0.1:29999"))
    assert engine.cut_off
    _, moved = await bench.begun()
    assert moved is not engine
    assert b"host: 127.0.0.1:29999\r\n" in moved.received


async def test_a_replica_that_moved_in_flight_is_not_reached_at_its_old_address(
    bench: Bench,
) -> None:
    client, engine = await bench.begun()
    (record,) = records("a")
    bench.publish(msgspec.structs.replace(record, url="http://127.0.0.1:29999"))
    engine.send(answer())
    assert client.answer().status == 200
    assert engine.cut_off  # it is of no further use
    _, moved = await bench.begun()
    assert moved is not engine
    assert b"host: 127.0.0.1:29999\r\n" in moved.received


async def test_a_replica_that_moved_while_it_was_dialled_is_not_spoken_to(bench: Bench) -> None:
    bench.upstreams.gate = asyncio.Event()
    client = bench.client()
    client.send(chat_request())
    await bench.settle()
    (record,) = records("a")
    bench.publish(msgspec.structs.replace(record, url="http://127.0.0.1:29999"))
    bench.upstreams.gate.set()
    await bench.settle()
    assert [engine.received for engine in bench.upstreams.engines] == [b""]
    assert client.answer().status == 502


async def test_a_replica_that_left_finishes_what_it_has(bench: Bench) -> None:
    client, engine = await bench.begun()
    bench.publish(*records("b"))
    engine.send(answer())
    assert client.answer().status == 200
    bench.publish(*records("b"))
    assert bench.upstreams.idle_count == 0


async def test_an_adapter_named_as_the_model_goes_where_it_is_in_use(make_bench: MakeBench) -> None:
    fleet = [
        ReplicaRecord(
            replica_id=name, url=f"http://127.0.0.1:{port}", models=("m", "sql"), adapters=loaded
        )
        for name, port, loaded in (("a", 1, ()), ("b", 2, ()), ("c", 3, ("sql",)))
    ]
    bench = make_bench(fleet, expose_routing=True)
    for turn in range(3):
        body = b'{"model":"sql","prompt":"%d of its own"}' % turn
        head = b"POST /v1/completions HTTP/1.1\r\nhost: p\r\ncontent-length: %d\r\n\r\n" % len(body)
        client, engine = await bench.begun(head + body)
        engine.send(answer())
        assert client.answer().fields["x-doherty-replica"] == "c"
        await bench.settle()


@pytest.mark.parametrize("apart", [True, False])
async def test_keys_share_a_prefix_unless_they_are_tenants(
    make_bench: MakeBench, apart: bool
) -> None:
    bench = make_bench(records("ab"), tenant_isolation=apart, expose_routing=True)
    body = CHAT_BODY.replace(b"hello", b"hello " * 5000)
    reasons = []
    for key in ("one", "one", "two"):
        sent = chat_request(body, (f"authorization: Bearer {key}",))
        client, engine = await bench.begun(sent)
        engine.send(answer())
        reasons.append(client.answer().fields["x-doherty-decision"])
        await bench.settle()
        bench.clock.advance(10)
    assert reasons == ["new", "prefix", "new" if apart else "prefix"]
