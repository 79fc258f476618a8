"""Other regions, as one worker's plane has them: sent to, left, waited for, never out of bounds."""

from __future__ import annotations

import json
from collections.abc import Callable
from hashlib import sha256

import msgspec
import orjson
import pytest

from proxy.config_access import AccessConfig, TenantConfig
from proxy.contract import PoolRecord, ReplicaState
from proxy.contract.keys import KeyRecord, KeySet
from proxy.contract.regions import ModelSummary, RegionSummary, RemoteState
from proxy.core import claim_limits
from proxy.core.policy import Decision, Request
from proxy.io.explain import explain
from proxy.io.tally import demand_of, summary_of
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

MakeBench = Callable[..., Bench]
FREE = ModelSummary(awake=2, free=8, s_per_token=1 / 30_000)
BODY = json.dumps({"model": "m", "messages": [{"role": "user", "content": "x" * 400_000}]}).encode()


def told(bench: Bench, name: str = "us#0", said: ModelSummary = FREE, **fields: object) -> None:
    """Have the plane hear that this remote is linked and says this of model `m`."""
    region = name.partition("#")[0]
    state = RemoteState(
        name=name,
        region=region,
        url="http://127.0.0.1:29001",
        linked=True,
        round_trip_s=0.01,
        at_s=bench.clock.now_s(),
        summary=RegionSummary(region=region, sequence=1, models={"m": said}),
    )
    bench.plane.know_remotes([msgspec.structs.replace(state, **fields)])


@pytest.fixture
def bench(make_bench: MakeBench) -> Bench:
    """One replica here, `a`, and a free region elsewhere."""
    bench = make_bench(region="eu")
    told(bench)
    return bench


async def busy(bench: Bench) -> None:
    """Have the replica here compute a prompt that takes seconds."""
    client, engine = await bench.begun(chat_request(BODY))
    assert engine.replica_id == "a"
    assert not client.received


async def test_a_request_goes_where_it_can_begin_and_comes_back_as_any_other(bench: Bench) -> None:
    await busy(bench)
    client, engine = await bench.begun(chat_request(fields=["x-doherty-explain: 1"]))
    assert engine.replica_id == "us#0"
    assert bench.plane.picture.loads.inflight[bench.plane.picture.slots["us#0/m"]] == 1
    assert demand_of(bench.plane).models["m"].in_flight == 1  # that of the replica here
    assert set(demand_of(bench.plane).replicas) == {"a"}
    gauges = {s.name: s.value for s in bench.plane.gauges(0) if s.name.startswith("remote_")}
    assert gauges == {"remote_inflight": 1, "remote_room": FREE.free - 1}
    engine.send(answer())
    got = client.answer()
    assert got.fields["x-doherty-region"] == "us"
    assert got.fields["x-doherty-decision"] == "region"
    assert "round_trip_ms=260" in got.fields["x-doherty-price-terms"]
    slot = bench.plane.picture.slots["us#0/m"]
    assert bench.plane.picture.loads.inflight[slot] == 0


async def test_a_model_that_only_others_have_is_served_and_listed(make_bench: MakeBench) -> None:
    bench = make_bench((), region="eu")
    assert not bench.plane.ready
    told(bench)
    assert bench.plane.ready
    listed = orjson.loads(bench.plane.local_answer(b"/v1/models"))
    assert [model["id"] for model in listed["data"]] == ["m"]
    client, engine = await bench.begun()
    assert engine.replica_id == "us#0"
    engine.send(answer())
    assert client.answer().status == 200
    assert not summary_of(bench.plane)  # what others have is not told on
    assert not demand_of(bench.plane).models


async def test_one_that_cannot_be_reached_is_left_and_the_request_served_here(bench: Bench) -> None:
    await busy(bench)
    bench.upstreams.refusing.add("us#0")
    await bench.begun()
    assert bench.upstreams.dialled.count("us#0") == 1
    assert bench.plane.waiting.count == 1  # as one that has just come
    assert not bench.suspects  # the supervisor probes replicas, and not other regions
    dialled = len(bench.upstreams.dialled)
    told(bench)
    await bench.begun()
    assert "us#0" not in bench.upstreams.dialled[dialled:]
    bench.upstreams.refusing.clear()
    bench.clock.advance(claim_limits.REGION_PAUSE_S + 0.1)
    told(bench)
    client, engine = await bench.begun()
    assert engine.replica_id == "us#0"
    engine.send(answer())
    assert client.answer().status == 200


async def test_who_waits_here_leaves_when_another_region_has_room(make_bench: MakeBench) -> None:
    bench = make_bench(region="eu")
    told(bench, said=ModelSummary(awake=2, free=0))
    await busy(bench)
    client = bench.client()
    client.send(chat_request(CHAT_BODY))
    await bench.settle()
    assert bench.plane.waiting.count == 1
    told(bench)
    engine = await bench.engine()
    assert engine.replica_id == "us#0"
    engine.send(answer())
    assert client.answer().status == 200


async def test_where_nothing_is_awake_those_who_wait_leave(make_bench: MakeBench) -> None:
    bench = make_bench((), region="eu")
    bench.publish(pools=(PoolRecord(model="m", pool="m", wakes=True, start_s=20.0),))
    client = bench.client()
    client.send(chat_request())
    await bench.settle()
    assert bench.plane.waiting.count == 1
    told(bench)
    engine = await bench.engine()
    engine.send(answer())
    assert client.answer().status == 200


async def test_what_may_not_leave_waits_for_nobody_abroad(make_bench: MakeBench) -> None:
    bench = make_bench((), region="eu")
    told(bench)
    client = bench.client()
    client.send(chat_request(fields=["x-doherty-class: spare"]))
    await bench.settle()
    assert client.answer().status == 429
    read = bench.plane.read

    def from_another_region(*args: object) -> object:
        asked = read(*args)  # type: ignore[arg-type]
        asked.request.abroad = False
        return asked

    bench.plane.read = from_another_region  # type: ignore[method-assign,assignment]
    client = bench.client()
    client.send(chat_request())
    await bench.settle()
    assert client.answer().status == 503
    assert not bench.upstreams.dialled


async def test_a_region_that_goes_takes_its_place_in_the_picture_with_it(bench: Bench) -> None:
    await busy(bench)
    client, engine = await bench.begun()
    engine.send(STREAM_HEAD + chunk(EVENTS[0]))
    fleet = bench.plane.fleet
    told(bench, linked=False)
    assert bench.plane.fleet is fleet
    bench.plane.know_remotes([])
    assert "us#0/m" not in bench.plane.picture.slots
    engine.send(chunk(EVENTS[1]) + LAST_CHUNK)  # under way, it is answered
    assert client.answer().status == 200


# --- stored answers -----------------------------------------------------------------------------


def _turn(previous: str = "") -> bytes:
    field = f',"previous_response_id":"{previous}"' if previous else ""
    body = f'{{"model":"m","input":"hello"{field}}}'.encode()
    return b"POST /v1/responses HTTP/1.1\r\nhost: p\r\ncontent-length: %d\r\n\r\n%b" % (
        len(body), body,
    )  # fmt: skip


async def test_what_goes_on_from_an_answer_goes_where_that_is(bench: Bench) -> None:
    await busy(bench)
    client, engine = await bench.begun(_turn())
    assert engine.replica_id == "us#0"
    engine.send(answer(b'{"id":"resp_1","object":"response"}'))
    assert client.answer().status == 200
    told(bench, said=ModelSummary(awake=2, free=0, queued=5))
    for request in (_turn("resp_1"), b"GET /v1/responses/resp_1 HTTP/1.1\r\nhost: p\r\n\r\n"):
        client, engine = await bench.begun(request)
        assert engine.replica_id == "us#0"
        engine.send(answer(b'{"id":"resp_2","object":"response"}'))
        assert client.answer("POST" if request.startswith(b"POST") else "GET").status == 200
    told(bench, linked=False)  # nobody else has it, and this one is not waited for
    seen = engine.received
    await bench.begun(_turn("resp_1"))
    assert bench.plane.waiting.count == 1
    assert engine.received == seen
    told(bench)
    assert (await bench.engine()).replica_id == "us#0"  # it is there again
    unknown = b"GET /v1/responses/resp_9 HTTP/1.1\r\nhost: p\r\n\r\n"
    client, engine = await bench.begun(unknown)
    assert engine.replica_id == "a"
    engine.send(answer(b"{}", status=404))
    assert client.answer("GET").status == 404  # of nobody abroad


# --- residency ----------------------------------------------------------------------------------


def bound(bench: Bench, *regions: str) -> None:
    """Bind whatever is read from now on to these regions, as keys and models do."""
    read = bench.plane.read

    def read_bound(*args: object) -> object:
        asked = read(*args)  # type: ignore[arg-type]
        asked.request.regions = frozenset(regions)
        return asked

    bench.plane.read = read_bound  # type: ignore[method-assign]


async def test_what_may_not_be_computed_here_goes_where_it_may(bench: Bench) -> None:
    bound(bench, "us")
    client, engine = await bench.begun()
    assert engine.replica_id == "us#0"
    engine.send(answer())
    assert client.answer().status == 200


async def test_what_may_not_be_computed_here_waits_for_room_where_it_may(bench: Bench) -> None:
    bound(bench, "us")
    told(bench, said=ModelSummary(awake=2, free=0, queued=3), linked=False)
    client = bench.client()
    client.send(chat_request())
    await bench.settle()
    got = client.answer()
    assert got.status == 503
    assert "us: not linked" in json.loads(got.body)["error"]["message"]
    told(bench, said=ModelSummary(awake=0, wakes=True, start_s=9.0))
    client, engine = await bench.begun()
    assert engine.replica_id == "us#0"  # where it wakes somebody, and waits for him
    engine.send(answer())
    assert client.answer().status == 200


async def test_where_it_may_not_be_computed_at_all_it_is_told_where_it_may(bench: Bench) -> None:
    bound(bench, "ap", "sa")
    client = bench.client()
    client.send(chat_request())
    await bench.settle()
    got = client.answer()
    error = json.loads(got.body)["error"]
    assert (got.status, error["code"]) == (403, "region_not_allowed")
    assert "ap or sa" in error["message"]
    assert "eu" in error["message"]


async def test_what_is_bound_to_us_though_only_others_serve_it_is_told_so(bench: Bench) -> None:
    bound(bench, "eu")
    summary = RegionSummary(region="us", sequence=2, models={"m": FREE, "theirs": FREE})
    told(bench, summary=summary)
    wanted = chat_request(CHAT_BODY.replace(b'"m"', b'"theirs"'))
    client = bench.client()
    client.send(wanted)
    await bench.settle()
    got = client.answer()
    assert (got.status, json.loads(got.body)["error"]["code"]) == (403, "region_not_allowed")
    (coming,) = records("b", ())
    coming = msgspec.structs.replace(coming, state=ReplicaState.STARTING)
    bench.publish(*records("a"), coming)  # nobody knows yet what it will serve
    client = bench.client()
    client.send(wanted)
    await bench.settle()
    assert client.answer().status == 503


async def test_where_only_others_serve_it_and_may_not_it_is_told_so(make_bench: MakeBench) -> None:
    bench = make_bench([], region="eu")
    told(bench)  # the model is served in `us` alone
    bound(bench, "eu")
    client = bench.client()
    client.send(chat_request())
    await bench.settle()
    assert client.answer().status == 403
    assert not bench.plane.leases


async def test_where_it_was_computed_is_told_beside_its_tenants_limits(
    make_bench: MakeBench,
) -> None:
    tenant = TenantConfig(name="acme", requests_per_min=5)
    bench = make_bench([], region="eu", access=AccessConfig(tenants=(tenant,)))
    told(bench)
    key = KeyRecord(key_id="k", tenant="acme", digest=sha256(b"key").hexdigest())
    bench.plane.know_keys(KeySet(salt="s" * 16, keys=(key,)))
    client, engine = await bench.begun(chat_request(fields=["authorization: Bearer key"]))
    engine.send(answer())
    fields = client.answer().fields
    assert fields["x-doherty-region"] == "us"
    assert fields["x-ratelimit-remaining-requests"] == "4"


async def test_a_pool_at_zero_is_woken_by_what_is_bound_to_its_region(
    make_bench: MakeBench,
) -> None:
    bench = make_bench([], region="eu")
    bench.publish(pools=(PoolRecord(pool="m", model="m", wakes=True),))
    bound(bench, "eu")
    client = bench.client()
    client.send(chat_request())
    await bench.settle()
    assert bench.plane.waiting.count == 1
    assert not client.received


async def test_who_waits_is_bound_as_well(make_bench: MakeBench) -> None:
    bench = make_bench(region="eu")
    bound(bench, "eu")
    await busy(bench)
    client = bench.client()
    client.send(chat_request())
    await bench.settle()
    told(bench)
    await bench.settle()
    assert bench.plane.waiting.count == 1
    assert "us#0" not in bench.upstreams.dialled


async def test_a_retry_does_not_leave_either(bench: Bench) -> None:
    bound(bench, "eu")
    bench.upstreams.refusing.add("a")
    client = bench.client()
    client.send(chat_request())
    await bench.settle()
    assert client.answer().status == 502
    assert bench.upstreams.dialled == ["a"]


async def test_what_got_past_the_gate_is_never_sent(bench: Bench) -> None:
    bound(bench, "eu")
    await busy(bench)
    remote = bench.plane.fleet.remotes["us#0/m"]
    slot = bench.plane.picture.slots[remote.name]

    def astray(request: Request, *_: object, **__: object) -> tuple[Decision, bool]:
        assert request.regions == {"eu"}
        return Decision(remote, slot, "region"), False

    bench.plane.decide = astray  # type: ignore[method-assign]
    client = bench.client()
    client.send(chat_request())
    await bench.settle()
    got = client.answer()
    assert (got.status, json.loads(got.body)["error"]["code"]) == (500, "internal_error")
    assert "us#0" not in bench.upstreams.dialled
    assert bench.plane.telemetry.internal_errors_total == 1
    bench.plane.telemetry.internal_errors_total = 0  # it was meant


# --- the explanation ----------------------------------------------------------------------------


def shown(bench: Bench) -> dict:
    status, text = explain(bench.plane, b"/v1/chat/completions", [], CHAT_BODY)
    assert status == 200, text
    return orjson.loads(text)


async def test_the_explanation_has_other_regions_with_every_term(bench: Bench) -> None:
    at_home = shown(bench)
    assert at_home["decision"]["replica"] == "a"
    away = at_home["candidates"][1]
    assert away["replica"] == "us#0/m"
    assert away["may_take"]
    terms = ("wait_s", "prefill_s", "recompute_s", "extra_s", "round_trip_s")
    assert away["price_s"] == pytest.approx(sum(away[term] for term in terms), abs=1e-5)
    assert away["round_trip_s"] == pytest.approx(0.01 + claim_limits.REGION_SLACK_S)
    await busy(bench)
    decision = shown(bench)["decision"]
    assert (decision["replica"], decision["reason"]) == ("us#0/m", "region")
    told(bench, said=ModelSummary(awake=2, free=0))
    away = shown(bench)["candidates"][1]
    assert not away["may_take"]
    assert away["reason"] == "it would not begin one at once"
