"""A model of which nothing is awake: its requests are held, in order, until something is."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from proxy.contract import PoolRecord, ReplicaRecord, ReplicaState
from proxy.core import limits
from proxy.core.classes import NAMES
from tests.fakes.plane import (
    EVENTS,
    LAST_CHUNK,
    STREAM_HEAD,
    Answer,
    Bench,
    Client,
    answer,
    chat_request,
    chunk,
    records,
)

MakeBench = Callable[..., Bench]
ZERO = PoolRecord(model="m", pool="m", wakes=True, start_s=7.2)
COMING = msgspec.structs.replace(ZERO, coming=1, ready_in_s=4.3)
UP = msgspec.structs.replace(ZERO, awake=1)


def body(name: str, model: str = "m", **more: Any) -> bytes:
    messages = [{"role": "user", "content": f"<{name}>"}]
    return json.dumps({"model": model, "messages": messages, **more}).encode()


def ask(bench: Bench, name: str, model: str = "m", **more: Any) -> Client:
    client = bench.client()
    client.send(chat_request(body(name, model, **more)))
    return client


def code(got: Answer) -> tuple[int, str]:
    return got.status, json.loads(got.body)["error"]["code"]


def up(ids: str = "a", **fields: Any) -> tuple[ReplicaRecord, ...]:
    return tuple(msgspec.structs.replace(one, pool="m", **fields) for one in records(ids))


@pytest.fixture
def zero(make_bench: MakeBench) -> Bench:
    """A bench whose only model has nothing awake, and is brought up by demand."""
    bench = make_bench(())
    bench.pushes = []  # type: ignore[attr-defined]
    bench.plane.waiting.on_hold = lambda: bench.pushes.append(1)  # type: ignore[attr-defined]
    bench.publish(pools=(ZERO,))
    return bench


def pushes(bench: Bench) -> int:
    return len(bench.pushes)  # type: ignore[attr-defined]


async def served(bench: Bench) -> list[str]:
    """Answer whatever comes to replicas until nothing more does; return the names in order."""
    names: list[str] = []
    answered: dict[int, int] = {}
    while True:
        await bench.settle()
        engines = bench.upstreams.engines
        busy = [e for e in engines if len(e.received) > answered.get(id(e), 0)]
        if not busy:
            return names
        for engine in sorted(busy, key=lambda each: each.transport.written_at):
            fresh = engine.received[answered.get(id(engine), 0) :]
            names += [part.split(b">")[0].decode() for part in fresh.split(b'"<')[1:]]
            answered[id(engine)] = len(engine.received)
            engine.send(answer())


async def test_requests_wait_for_a_model_at_zero_and_go_in_the_order_they_came(
    zero: Bench,
) -> None:
    clients = [ask(zero, f"{n}", long="x" * (9 - n) * 4_000) for n in range(9)]
    await zero.settle()
    assert pushes(zero) == 1  # however many come
    zero.publish(pools=(COMING,))
    zero.sweep(3.0)
    assert all(client.received == b"" for client in clients)
    zero.publish(*up(max_inputs=1), pools=(UP,))
    late = ask(zero, "late")
    assert await served(zero) == [*map(str, range(9)), "late"]
    assert {client.answer().status for client in (*clients, late)} == {200}
    waits = [s for s in zero.plane.counters() if s.name == "queue_wait_seconds"]
    assert waits[0].buckets[0] >= 1  # of `late`


@pytest.mark.parametrize("policy", ["round_robin", "random", "session", "least_load"])
async def test_every_rule_has_requests_wait_for_a_model_at_zero(
    make_bench: MakeBench, policy: str
) -> None:
    bench = make_bench((), policy=policy)
    bench.publish(pools=(ZERO,))
    clients = [ask(bench, f"{n}") for n in range(5)]
    bench.sweep(1.0)
    await bench.settle()
    assert bench.plane.waiting.count == 5
    bench.publish(*up(max_inputs=2), pools=(UP,))
    assert await served(bench) == [*map(str, range(5))]
    assert {client.answer().status for client in clients} == {200}


async def test_what_comes_to_a_replica_that_is_just_up_goes_behind_those_that_are_held(
    zero: Bench,
) -> None:
    """Within one turn of the loop, and over the turns in which the held ones leave."""
    clients = [ask(zero, f"{n}") for n in range(3 * limits.HELD_TAKEN_MAX)]
    await zero.settle()
    zero.publish(*up(), pools=(UP,))
    newcomer = ask(zero, "newcomer")
    order = await served(zero)
    assert order.index("newcomer") == len(clients)
    assert newcomer.answer().status == 200


async def test_a_worker_takes_its_part_of_a_replica_that_others_see_come_up_as_well(
    make_bench: MakeBench,
) -> None:
    bench = make_bench((), workers=2)
    bench.publish(pools=(ZERO,))
    clients = [ask(bench, f"{n}") for n in range(9)]
    bench.publish(*up(max_inputs=7), pools=(UP,))
    await bench.settle()
    assert len(bench.upstreams.engines) == 3
    newcomer = ask(bench, "newcomer")
    await bench.settle()
    assert len(bench.upstreams.engines) == 3
    bench.sweep(3 * limits.OPENED_SHARED_S)  # the other one has told what it took: nothing
    await bench.settle()
    assert len(bench.upstreams.engines) == 7
    await served(bench)
    assert {client.answer().status for client in (*clients, newcomer)} == {200}


async def test_the_urgent_go_first_when_a_model_comes_up(zero: Bench) -> None:
    zero.publish(pools=(msgspec.structs.replace(ZERO, work_class="semi-online"),))
    clients = [
        ask(zero, "flex", service_tier="flex"),
        ask(zero, "pools"),
        ask(zero, "priority", service_tier="priority"),
    ]
    depth = {
        dict(sample.labels)["class"]: sample.value
        for sample in zero.plane.gauges(0)
        if sample.name == "queue_depth"
    }
    assert depth == dict.fromkeys(NAMES, 1)
    zero.publish(*up(max_inputs=1), pools=(UP,))
    assert await served(zero) == ["priority", "pools", "flex"]
    assert {client.answer().status for client in clients} == {200}


async def test_only_a_model_that_no_pool_has_is_unknown(zero: Bench) -> None:
    assert code(ask(zero, "x", model="nope").answer()) == (404, "model_not_found")
    client = zero.client()
    client.send(b"GET /v1/models HTTP/1.1\r\nhost: p\r\n\r\n")
    assert [m["id"] for m in json.loads(client.answer("GET").body)["data"]] == ["m"]
    assert zero.plane.waiting.count == 0
    assert zero.plane.arrivals == {"m": 0}
    assert zero.plane.ready


async def test_a_request_that_names_no_model_waits_for_the_only_one(zero: Bench) -> None:
    form = (
        b'--XX\r\ncontent-disposition: form-data; name="file"; filename="a"\r\n\r\n\0\r\n--XX--\r\n'
    )
    head = (
        b"POST /v1/audio/transcriptions HTTP/1.1\r\nhost: p\r\n"
        b"content-type: multipart/form-data; boundary=XX\r\ncontent-length: %d\r\n\r\n" % len(form)
    )
    client = zero.client()
    client.send(head + form)
    await zero.settle()
    assert (zero.plane.waiting.count, zero.plane.arrivals) == (1, {"m": 1})
    zero.publish(*up(), pools=(UP,))
    await served(zero)
    assert client.answer().status == 200
    zero.publish(pools=(ZERO, msgspec.structs.replace(ZERO, model="n", pool="n")))
    other = zero.client()
    other.send(head + form)
    assert code(other.answer()) == (400, "missing_model")


async def test_a_pool_at_zero_that_nobody_wakes_is_told_of_at_once(zero: Bench) -> None:
    zero.publish(pools=(msgspec.structs.replace(ZERO, wakes=False),))
    assert code(ask(zero, "x").answer()) == (503, "no_replica")


@pytest.mark.parametrize(
    "rest", [{"asleep": True}, {"state": ReplicaState.STARTING}, {"state": ReplicaState.BACKOFF}]
)
async def test_replicas_that_rest_are_sent_nothing_and_waited_for_if_demand_wakes_them(
    zero: Bench, rest: dict[str, Any]
) -> None:
    resting = up(**rest)
    zero.publish(*resting, pools=(ZERO,))
    client = ask(zero, "x")
    zero.sweep(1.0)
    await zero.settle()
    assert (client.received, zero.upstreams.dialled) == (b"", [])
    assert pushes(zero) == 1
    zero.publish(*up(), pools=(UP,))
    assert await served(zero) == ["x"]
    zero.publish(*resting, pools=())
    assert code(ask(zero, "y").answer()) == (503, "no_replica")


async def test_a_replica_that_is_to_rest_keeps_no_idle_connection_and_ends_what_it_has(
    make_bench: MakeBench,
) -> None:
    bench = make_bench(up())
    done = ask(bench, "done")
    idle = await bench.engine()
    busy = ask(bench, "busy")
    engine = await bench.engine()
    assert engine is not idle
    idle.send(answer())
    assert done.answer().status == 200
    assert bench.upstreams.idle_count == 1
    bench.publish(*up(state=ReplicaState.DRAINING))
    assert idle.cut_off
    assert not engine.cut_off
    engine.send(answer())
    assert busy.answer().status == 200
    bench.publish(*up(asleep=True))
    assert bench.upstreams.idle_count == 0


async def test_a_client_that_goes_while_it_is_held_leaves_nothing(zero: Bench) -> None:
    client = ask(zero, "x", pad="x" * 100_000)
    await zero.settle()
    assert zero.plane.bodies_bytes > 100_000
    client.transport.hang_up()
    await zero.settle()
    assert (zero.plane.waiting.count, zero.plane.bodies_bytes) == (0, 0)
    ask(zero, "y")
    await zero.settle()
    assert pushes(zero) == 2  # somebody waits again


async def test_the_wait_for_a_start_has_an_end_of_its_own(make_bench: MakeBench) -> None:
    bench = make_bench((), hold_timeout_secs=30, queue_timeout_secs=5)
    bench.publish(pools=(COMING,))
    client = ask(bench, "x")
    bench.sweep(29.9)
    assert client.received == b""
    bench.sweep(0.2)
    got = client.answer()
    assert code(got) == (503, "not_awake")
    assert (got.fields["x-should-retry"], got.fields["retry-after"]) == ("true", "5")


async def test_a_start_that_failed_is_told_unless_another_begins_at_once(zero: Bench) -> None:
    zero.publish(pools=(COMING,))
    client = ask(zero, "x")
    zero.publish(pools=(ZERO,))
    zero.sweep(limits.START_FAILED_S * 0.9)
    zero.publish(pools=(COMING,))  # another
    zero.sweep(limits.START_FAILED_S * 2)
    assert client.received == b""
    zero.publish(pools=(ZERO,))
    zero.sweep(limits.START_FAILED_S * 1.1)
    got = client.answer()
    assert code(got) == (503, "not_awake")
    assert got.fields["retry-after"] == "8"
    later = ask(zero, "y")  # it asks for another start, and has its own time
    zero.sweep(limits.START_FAILED_S * 0.9)
    assert later.received == b""
    assert pushes(zero) == 2


async def test_time_in_the_queue_begins_when_there_is_a_replica_to_wait_for(
    make_bench: MakeBench,
) -> None:
    bench = make_bench((), queue_timeout_secs=5)
    bench.publish(pools=(ZERO,))
    first, second = ask(bench, "1"), ask(bench, "2")
    bench.sweep(60.0)
    bench.publish(*up(max_inputs=1), pools=(UP,))
    await bench.settle()
    bench.sweep(4.9)
    assert second.received == b""
    bench.sweep(0.2)
    assert code(second.answer()) == (408, "queue_timeout")
    await served(bench)
    assert first.answer().status == 200


async def test_the_less_urgent_wait_longer(make_bench: MakeBench) -> None:
    bench = make_bench(up(max_inputs=1), queue_timeout_secs=5)
    ask(bench, "busy")
    online = ask(bench, "online")
    flex = ask(bench, "flex", service_tier="flex")
    bench.sweep(5.1)
    assert code(online.answer()) == (408, "queue_timeout")
    bench.sweep(5.0 * limits.OFFLINE_PATIENCE_WEIGHT - 5.2)
    assert flex.received == b""
    bench.sweep(0.2)
    assert code(flex.answer()) == (408, "queue_timeout")


async def test_a_model_that_dies_is_held_again_and_its_manager_told(zero: Bench) -> None:
    zero.publish(*up(max_inputs=1), pools=(UP,))
    running, waiting = ask(zero, "running"), ask(zero, "waiting")
    await zero.settle()
    assert pushes(zero) == 0
    zero.plane.suspect("a", "for a test")
    assert pushes(zero) == 1
    zero.publish(pools=(ZERO,))
    zero.sweep(70.0)
    assert waiting.received == b""
    zero.publish(*up("b"), pools=(UP,))
    assert await served(zero) == ["running", "waiting"]
    assert {running.answer().status, waiting.answer().status} == {200}


async def test_those_held_for_a_start_leave_half_of_the_room_to_the_others(
    make_bench: MakeBench,
) -> None:
    other = tuple(
        msgspec.structs.replace(one, pool="n", max_inputs=1) for one in records("b", ["n"])
    )
    bench = make_bench(other, queue_size=8)
    bench.publish(*other, pools=(ZERO,))
    held = [ask(bench, f"{n}") for n in range(4)]
    await bench.settle()
    got = ask(bench, "more").answer()
    assert (code(got), got.fields["retry-after"]) == ((429, "queue_full"), "8")
    busy = [ask(bench, f"n{n}", model="n") for n in range(5)]
    assert [client.received for client in (*held, *busy)] == [b""] * 9
    assert code(ask(bench, "n5", model="n").answer()) == (429, "queue_full")


async def test_offline_work_makes_room_for_online_requests(make_bench: MakeBench) -> None:
    bench = make_bench(up(max_inputs=1), queue_size=4)
    ask(bench, "busy")
    flex = ask(bench, "flex", service_tier="flex")
    assert code(ask(bench, "flex2", service_tier="flex").answer()) == (429, "queue_full")
    online = [ask(bench, f"{n}") for n in range(4)]
    got = flex.answer()
    assert (code(got), got.fields["x-should-retry"]) == ((429, "queue_full"), "true")
    assert [client.received for client in online] == [b""] * 4
    assert code(ask(bench, "4").answer()) == (429, "queue_full")
    refused = {
        dict(sample.labels)["class"]: sample.value
        for sample in bench.plane.counters()
        if sample.name == "queue_refused_total"
    }
    assert refused == {"online": 1, "semi-online": 0, "offline": 2}


async def test_bodies_that_wait_are_bounded(make_bench: MakeBench) -> None:
    bench = make_bench(up(max_inputs=1), queue_bytes=100_000)
    ask(bench, "busy")
    ask(bench, "1", pad="x" * 60_000)
    assert code(ask(bench, "2", pad="x" * 60_000).answer()) == (429, "queue_full")
    assert ask(bench, "3").received == b""


async def test_where_nobody_may_wait_one_is_told_when_to_come_again(
    make_bench: MakeBench,
) -> None:
    bench = make_bench((), queue_size=0)
    told: list[int] = []
    bench.plane.waiting.on_hold = lambda: told.append(1)
    bench.publish(pools=(ZERO,))
    got = ask(bench, "x").answer()
    assert (code(got), got.fields["retry-after"]) == ((503, "not_awake"), "8")
    assert told  # and the manager that somebody came
    assert bench.plane.waiting.queues["m"].refused_total == 1


async def test_streams_go_on_to_a_replica_that_comes_up(zero: Bench) -> None:
    client = ask(zero, "x", stream=True)
    zero.publish(*up(), pools=(UP,))
    engine = await zero.engine()
    engine.send(STREAM_HEAD + chunk(EVENTS[0]) + chunk(EVENTS[-1]) + LAST_CHUNK)
    got = client.answer()
    assert (got.status, got.body) == (200, EVENTS[0] + EVENTS[-1])
