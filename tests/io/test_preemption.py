"""Offline work gives way to online work before its first octet, and goes on when that is placed."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from proxy.contract import PoolRecord, ReplicaRecord
from proxy.core import limits
from tests.fakes.plane import Bench, Client, Engine, RealPlane, answer, chat_request, records
from tests.fakes.simulator import simulator
from tests.fakes.talk import ask, on_uvloop

MakeBench = Callable[..., Bench]


def full(places: int, ids: str = "a") -> tuple[ReplicaRecord, ...]:
    """Replicas that may have so many requests each."""
    return tuple(msgspec.structs.replace(each, max_inputs=places) for each in records(ids))


class Stage:
    """Requests by name, on a bench."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.clients: dict[str, Client] = {}

    async def send(self, name: str, tier: str | None = None, **more: Any) -> Client:
        body: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": name}]}
        if tier is not None:
            body["service_tier"] = tier
        client = self.clients[name] = self.bench.client()
        client.send(chat_request(json.dumps(body | more).encode()))
        await self.bench.settle()
        self.bench.clock.advance(0.01)
        return client

    def engines(self, name: str) -> list[Engine]:
        """Return the replica's ends of all connections that it was sent over."""
        mark = b'"content": "%b"' % name.encode()
        return [each for each in self.bench.upstreams.engines if mark in each.received]

    async def answer(self, name: str) -> int:
        self.engines(name)[-1].send(answer())
        await self.bench.settle()
        return self.clients[name].answer().status

    @property
    def counts(self) -> dict[str, float]:
        return {
            dict(sample.labels)["outcome"]: sample.value
            for sample in self.bench.plane.counters()
            if sample.name == "preempted_total"
        }

    @property
    def depths(self) -> list[float]:
        return [s.value for s in self.bench.plane.gauges(0) if s.name == "queue_depth"]


async def test_the_youngest_offline_request_waits_again_for_an_online_one(
    make_bench: MakeBench,
) -> None:
    stage = Stage(make_bench(full(2)))
    await stage.send("old", "flex")
    await stage.send("young", "flex")
    await stage.send("person")
    assert stage.engines("young")[0].cut_off
    assert not stage.engines("old")[0].cut_off
    assert len(stage.engines("person")) == 1
    assert stage.depths == [0, 0, 1]
    assert stage.counts == {"requeued": 1, "refused": 0}
    assert await stage.answer("person") == 200
    assert len(stage.engines("young")) == 2
    assert await stage.answer("young") == 200
    assert await stage.answer("old") == 200


@pytest.mark.parametrize("tier", ["auto", "priority", None])
async def test_what_is_not_offline_work_is_left_alone(
    make_bench: MakeBench, tier: str | None
) -> None:
    stage = Stage(make_bench(full(1)))
    await stage.send("first", tier)
    await stage.send("second")
    assert not stage.engines("first")[0].cut_off
    assert stage.engines("second") == []
    assert await stage.answer("first") == 200
    assert await stage.answer("second") == 200


@pytest.mark.parametrize("work_class", ["online", "semi-online", "offline"])
async def test_the_class_of_a_pool_counts_for_those_who_say_nothing(
    make_bench: MakeBench, work_class: str
) -> None:
    bench = make_bench(full(1))
    pool = PoolRecord(model="m", pool="default", work_class=work_class)
    bench.publish(*full(1), pools=(pool,))
    stage = Stage(bench)
    await stage.send("silent")
    await stage.send("person", "priority")
    assert stage.engines("silent")[0].cut_off is (work_class == "offline")
    for name in ("silent", "person") if work_class != "offline" else ("person", "silent"):
        assert await stage.answer(name) == 200


async def test_semi_online_work_has_nobody_give_way(make_bench: MakeBench) -> None:
    bench = make_bench(full(1))
    pool = PoolRecord(model="m", pool="default", work_class="semi-online")
    bench.publish(*full(1), pools=(pool,))
    stage = Stage(bench)
    await stage.send("line", "flex")
    await stage.send("burst")
    assert not stage.engines("line")[0].cut_off
    assert await stage.answer("line") == 200
    assert await stage.answer("burst") == 200


async def test_never_after_the_first_octet(make_bench: MakeBench) -> None:
    stage = Stage(make_bench(full(1)))
    await stage.send("line", "flex")
    stage.engines("line")[0].send(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n{")
    await stage.send("person")
    assert not stage.engines("line")[0].cut_off
    stage.engines("line")[0].send(b"} ")
    await stage.bench.settle()
    assert stage.clients["line"].answer().body == b"{} "
    assert await stage.answer("person") == 200
    assert stage.counts == {"requeued": 0, "refused": 0}


async def test_one_that_is_being_connected_gives_way_too(make_bench: MakeBench) -> None:
    bench = make_bench(full(1))
    bench.upstreams.gate = asyncio.Event()
    stage = Stage(bench)
    await stage.send("line", "flex")
    await stage.send("person")
    bench.upstreams.gate.set()
    await bench.settle()
    assert stage.engines("line") == []
    assert await stage.answer("person") == 200
    assert await stage.answer("line") == 200


async def test_without_room_to_wait_it_is_told_to_come_again(make_bench: MakeBench) -> None:
    stage = Stage(make_bench(full(1), queue_size=0))
    await stage.send("line", "flex")
    await stage.send("person")
    got = stage.clients["line"].answer()
    assert (got.status, json.loads(got.body)["error"]["code"]) == (503, "preempted")
    assert (got.fields["retry-after"], got.fields["x-should-retry"]) == ("1", "true")
    assert await stage.answer("person") == 200
    assert stage.counts == {"requeued": 0, "refused": 1}


async def test_what_takes_only_what_is_spare_never_waits_again(make_bench: MakeBench) -> None:
    bench = make_bench(full(1))
    stage = Stage(bench)
    line = bench.client()
    line.send(chat_request(fields=("x-doherty-class: spare",)))
    await bench.settle()
    await stage.send("person")
    got = line.answer()
    assert (got.status, json.loads(got.body)["error"]["code"]) == (503, "preempted")
    assert await stage.answer("person") == 200
    assert stage.counts == {"requeued": 0, "refused": 1}


async def test_nobody_is_sent_back_for_ever(make_bench: MakeBench) -> None:
    stage = Stage(make_bench(full(1)))
    await stage.send("line", "flex")
    for number in range(limits.PREEMPTIONS_MAX):
        await stage.send(f"person{number}")
        assert stage.engines("line")[-1].cut_off
        assert await stage.answer(f"person{number}") == 200
    assert len(stage.engines("line")) == limits.PREEMPTIONS_MAX + 1
    await stage.send("last")
    assert not stage.engines("line")[-1].cut_off
    assert await stage.answer("line") == 200
    assert await stage.answer("last") == 200


async def test_a_client_that_leaves_after_it_gave_way_leaves_nothing(make_bench: MakeBench) -> None:
    stage = Stage(make_bench(full(1)))
    line = await stage.send("line", "flex")
    await stage.send("person")
    line.transport.hang_up()
    await stage.bench.settle()
    assert stage.depths == [0, 0, 0]
    assert await stage.answer("person") == 200


async def test_while_online_work_waits_no_offline_work_goes_anywhere(make_bench: MakeBench) -> None:
    """Also where another replica of the model has room: the one that waits is pinned."""
    bench = make_bench(full(1, "ab"), session_affinity="strict")
    stage = Stage(bench)
    await stage.send("first", prompt_cache_key="s")
    home = stage.engines("first")[0].replica_id
    await stage.send("second", prompt_cache_key="s")
    assert stage.depths == [1, 0, 0]
    await stage.send("line", "flex")
    assert stage.engines("line") == []
    assert stage.depths == [1, 0, 1]
    assert await stage.answer("first") == 200
    assert stage.engines("second")[0].replica_id == home
    assert stage.engines("line")[0].replica_id != home
    assert await stage.answer("line") == 200
    assert await stage.answer("second") == 200


async def test_the_brake_is_off_when_who_waited_has_left(make_bench: MakeBench) -> None:
    stage = Stage(make_bench(full(1, "ab"), session_affinity="strict"))
    await stage.send("first", prompt_cache_key="s")
    gone = await stage.send("second", prompt_cache_key="s")
    await stage.send("line", "flex")
    assert stage.engines("line") == []
    gone.transport.hang_up()
    await stage.bench.settle()
    assert await stage.answer("line") == 200
    assert await stage.answer("first") == 200


async def test_the_brake_lets_go_of_what_has_yielded_long_enough(make_bench: MakeBench) -> None:
    bench = make_bench(full(1, "ab"), session_affinity="strict", queue_timeout_secs=1000)
    stage = Stage(bench)
    await stage.send("first", prompt_cache_key="s")
    await stage.send("second", prompt_cache_key="s")
    await stage.send("line", "flex")
    bench.sweep(limits.OFFLINE_YIELD_S - 1.0)
    await bench.settle()
    assert stage.engines("line") == []
    bench.sweep(2.0)
    await bench.settle()
    assert await stage.answer("line") == 200
    assert await stage.answer("first") == 200
    assert await stage.answer("second") == 200


# --- in the engine's own queue --------------------------------------------------------------------

VLLM = ("x-vllm-priority: 0", "x-vllm-priority: 1000", "x-vllm-priority: 1000000")
SGLANG = ("x-override-priority: 0", "x-override-priority: 1000", "x-override-priority: 1000000")


@pytest.mark.parametrize(
    ("tier", "sent"), [("flex", True), ("auto", False), ("priority", False), (None, False)]
)
async def test_offline_work_is_put_last_and_a_person_goes_as_he_would_alone(
    make_bench: MakeBench, tier: str | None, *, sent: bool
) -> None:
    (record,) = records("a")
    stage = Stage(make_bench((msgspec.structs.replace(record, priority_fields=VLLM),)))
    await stage.send("one", tier)
    (engine,) = stage.engines("one")
    assert (engine.received.count(b"x-vllm-priority: 1000000\r\n") == 1) is sent
    assert (b"x-vllm-priority" in engine.received) is sent
    assert await stage.answer("one") == 200


@pytest.mark.parametrize(
    "odd", ["x-vllm-priority", "x-a: 1\r\nx-b: 2", "content-length: 5", "x-a: one", "x-a: 1\n", ""]
)
async def test_what_is_no_field_is_never_sent(make_bench: MakeBench, odd: str) -> None:
    (record,) = records("a")
    stage = Stage(make_bench((msgspec.structs.replace(record, priority_fields=(*VLLM[:2], odd)),)))
    await stage.send("one", "flex")
    head = stage.engines("one")[0].received.partition(b"\r\n\r\n")[0]
    assert b"x-vllm" not in head
    assert b"x-a" not in head
    assert head.count(b"content-length") == 1
    assert await stage.answer("one") == 200


@pytest.mark.parametrize(
    ("dialect", "by_class"), [("vllm", VLLM), ("sglang", SGLANG), ("vllm", ())]
)
@on_uvloop
async def test_an_engine_computes_online_work_first(
    dialect: str, by_class: tuple[str, ...]
) -> None:
    """What came before it as well; without the field it is first come, first served."""
    slowly = {"sequences_max": 1, "priorities": True, "low_priority_first": True}
    async with simulator(dialect=dialect, header_overrides=True, **slowly) as engine:
        record = ReplicaRecord(
            replica_id="a", url=engine.url, models=("demo",), priority_fields=by_class
        )
        async with RealPlane([record], policy="round_robin") as proxy:
            order: list[str] = []

            async def send(name: str, tier: str, tokens: int) -> None:
                body: dict[str, Any] = {"model": "demo", "service_tier": tier}
                body |= {"messages": [{"role": "user", "content": name}], "max_tokens": tokens}
                fields = ("x-vllm-priority: 2000000", "x-override-priority: 2000000")
                octets = chat_request(json.dumps(body).encode(), fields)
                assert (await ask(proxy.port, octets)).status == 200
                order.append(name)

            async with asyncio.TaskGroup() as group:
                group.create_task(send("running", "auto", 400))
                await engine.until(lambda state: state["running"] == 1)
                for waiting, (name, tier) in enumerate((("line", "flex"), ("person", "auto"))):
                    group.create_task(send(name, tier, 20))
                    await engine.until(lambda state, n=waiting: state["waiting"] == n + 1)
            assert order == ["running", *(("person", "line") if by_class else ("line", "person"))]
