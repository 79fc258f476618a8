"""What a proxy tells its manager of its work: whole, at once when it must be, and exact."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from itertools import pairwise

import aiohttp
import msgspec
import pytest

from proxy.contract import PoolRecord, ReplicaRecord, ReplicaState
from proxy.contract.demand import DEMAND_INTERVAL_S, Demand, ModelDemand, ReplicaDemand
from proxy.core import limits
from proxy.io import tally
from proxy.io import teller as teller_module
from proxy.io.control import Demanded
from proxy.io.tally import Tally, demand_of
from proxy.io.teller import Teller
from tests.fakes.engine import Connection, Received, ScriptedEngine, answer_json, reply
from tests.fakes.plane import Answer, Bench, answer, chat_request, records, until
from tests.fakes.proxy_process import ProxyProcess
from tests.fakes.talk import ask
from tests.fakes.told_manager import ToldManager

MakeBench = Callable[..., Bench]
ZERO = PoolRecord(model="m", pool="m", wakes=True, start_s=2.0)
COMING = msgspec.structs.replace(ZERO, coming=1, ready_in_s=2.0)
UP = msgspec.structs.replace(ZERO, awake=1)


def chat(name: str, model: str = "m") -> bytes:
    messages = [{"role": "user", "content": f"<{name}>"}]
    body = json.dumps({"model": model, "messages": messages}).encode()
    return chat_request(body, ("connection: close",))


def in_pool(record: ReplicaRecord, **fields: object) -> ReplicaRecord:
    return msgspec.structs.replace(record, pool="m", **fields)


def latest(manager: ToldManager) -> Demand:
    return manager.reports[-1] if manager.reports else Demand(proxy_id="", sequence=0)


def of_model(manager: ToldManager) -> ModelDemand:
    return latest(manager).models.get("m", ModelDemand())


# --- one worker -----------------------------------------------------------------------------------


async def test_what_is_bound_to_a_replica_counts_for_it_though_nothing_is_sent_yet(
    make_bench: MakeBench,
) -> None:
    bench = make_bench(records("a"))
    bench.publish(*map(in_pool, records("a")), pools=(UP,))
    bench.upstreams.gate = asyncio.Event()
    client = bench.client()
    client.send(chat_request())
    await bench.settle()
    draining = [in_pool(record, state=ReplicaState.DRAINING) for record in records("a")]
    bench.publish(*draining, pools=(UP,))
    told = demand_of(bench.plane)
    assert (told.epoch, told.version) == ("test", 3)
    assert told.replicas["a"].in_flight == 1
    assert told.models["m"].in_flight == told.models["m"].arrivals_total == 1
    assert told.models["m"].in_flight_tokens == told.replicas["a"].tokens > 0
    bench.upstreams.gate.set()
    (await bench.engine()).send(answer())
    assert client.answer().status == 200
    assert demand_of(bench.plane).replicas == {}


async def test_what_may_have_only_what_is_spare_is_no_demand_but_holds_its_replica(
    make_bench: MakeBench,
) -> None:
    bench = make_bench(records("a"))
    bench.publish(*map(in_pool, records("a")), pools=(UP,))
    spare = bench.client()
    spare.send(chat_request(fields=("x-doherty-class: spare",)))
    await bench.settle()
    told = demand_of(bench.plane)
    assert told.models["m"] == ModelDemand(spare=1)
    assert (told.replicas["a"].in_flight, told.replicas["a"].spare) == (1, 1)
    assert told.replicas["a"].tokens > 0
    (await bench.engine()).send(answer())
    assert spare.answer().status == 200
    assert demand_of(bench.plane).models == {}


async def test_where_nothing_is_awake_the_spare_is_refused_and_wakes_nobody(
    make_bench: MakeBench,
) -> None:
    bench = make_bench(())
    bench.publish(pools=(ZERO,))
    client = bench.client()
    client.send(chat_request(fields=("x-doherty-class: spare",)))
    await bench.settle()
    refused = client.answer()
    assert refused.status == 429
    assert b"no_spare_capacity" in refused.body
    assert refused.fields["retry-after"] == "1"
    assert demand_of(bench.plane).models == {}


async def test_what_waits_is_told_with_its_tokens_and_its_age(make_bench: MakeBench) -> None:
    bench = make_bench(())
    bench.publish(pools=(ZERO, msgspec.structs.replace(ZERO, model="sql")))
    clients = [bench.client() for _ in range(3)]
    for client, model in zip(clients, ("m", "sql", "nobody's"), strict=True):
        client.send(chat("x" * 396, model))
        bench.clock.advance(1.5)
    told = demand_of(bench.plane).models
    assert told.keys() == {"m", "sql"}
    assert (told["m"].queued, told["m"].queued_s, told["sql"].queued_s) == (1, 4.5, 3.0)
    assert 100 <= told["m"].queued_tokens <= 120
    for client in clients:
        client.transport.hang_up()
    await bench.settle()
    assert demand_of(bench.plane).models == {
        "m": ModelDemand(arrivals_total=1),
        "sql": ModelDemand(arrivals_total=1),
    }


async def test_the_name_of_an_adapter_is_counted_as_one_of_its_pool(
    make_bench: MakeBench,
) -> None:
    bench = make_bench(())
    served = [in_pool(record) for record in records("a", ["m", "sql"])]
    bench.publish(*served, pools=(UP,))
    client, engine = await bench.begun(chat("x", "sql"))
    assert demand_of(bench.plane).models.keys() == {"m"}
    engine.send(answer())
    assert client.answer().status == 200


# --- the workers together -------------------------------------------------------------------------


def _teller() -> Teller:
    def nobody() -> None:
        raise AssertionError("nothing is posted here")

    return Teller(nobody)  # type: ignore[arg-type]  # it is never asked for


def _said(version: int, in_flight: int = 1) -> Demanded:
    return Demanded(
        {"m": ModelDemand(in_flight=in_flight, arrivals_total=5)},
        {"a": ReplicaDemand(in_flight, 7)},
        "e",
        version,
    )


def test_the_fleet_is_that_which_every_worker_has_taken() -> None:
    teller = _teller()
    for origin in (1, 2):
        teller.join(origin)
    teller.hear(1, _said(4))
    assert teller.demand().fleet_version == 0  # one may still choose by anything
    teller.hear(2, _said(3))
    told = teller.demand()
    assert (told.fleet_epoch, told.fleet_version, told.sequence) == ("e", 3, 2)
    assert told.replicas == {"a": ReplicaDemand(2, 14)}
    teller.hear(2, msgspec.structs.replace(_said(9), epoch="of another manager"))
    assert (teller.demand().fleet_epoch, teller.demand().fleet_version) == ("", 0)


def test_what_a_dead_worker_had_in_hand_is_gone_and_no_counter_falls() -> None:
    teller = _teller()
    for origin in (1, 2, 3):
        teller.join(origin)
        teller.hear(origin, _said(1))
    teller.leave(1)
    teller.leave(2)
    teller.leave(2)
    teller.hear(2, _said(1))  # too late
    told = teller.demand()
    assert told.models == {"m": ModelDemand(in_flight=1, arrivals_total=15)}
    assert told.replicas == {"a": ReplicaDemand(1, 7)}


# --- at once --------------------------------------------------------------------------------------


class _Straight:
    """A worker's channel to a supervisor in the same process."""

    waiting_bytes = 0

    def __init__(self, teller: Teller) -> None:
        self._teller = teller
        self.sent: list[Demanded] = []

    def send(self, message: Demanded) -> None:
        self.sent.append(message)
        self._teller.hear(1, message)


@asynccontextmanager
async def told_only_at_once(
    bench: Bench, manager: ToldManager, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[list[Demanded]]:
    """Have a worker and its supervisor tell a manager, but never because time has passed."""
    for module in (tally, teller_module):
        monkeypatch.setattr(module, "DEMAND_INTERVAL_S", 1e6)
    async with aiohttp.ClientSession() as session:
        teller = Teller(lambda: session)
        teller.tell(manager.url)
        teller.join(1)
        channel = _Straight(teller)
        bench.tasks.start("tally", Tally(bench.plane, channel).run())  # type: ignore[arg-type]
        bench.tasks.start("teller", teller.run())
        await asyncio.sleep(0)
        yield channel.sent
        await bench.tasks.close()


async def test_the_first_who_waits_for_nothing_is_told_of_at_once(
    make_bench: MakeBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = make_bench((), manager_url="http://manager")
    async with ToldManager() as manager, told_only_at_once(bench, manager, monkeypatch) as sent:
        bench.publish(pools=(ZERO, msgspec.structs.replace(ZERO, model="n", pool="n")))
        clients = [bench.client() for _ in range(100)]
        for client in clients:
            client.send(chat("x"))
        await until(lambda: of_model(manager).queued == 100)
        assert len(sent) == len(manager.reports) == 1  # for all of them
        for client in clients[1:]:
            client.transport.hang_up()
        other = bench.client()
        other.send(chat("y", "n"))
        await until(lambda: len(manager.reports) == 2)
        assert {name: one.queued for name, one in latest(manager).models.items()} == {
            "m": 1,
            "n": 1,
        }


async def test_a_worker_without_a_manager_tells_nothing(
    make_bench: MakeBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = make_bench(())
    async with ToldManager() as manager, told_only_at_once(bench, manager, monkeypatch) as sent:
        bench.publish(pools=(ZERO,))
        bench.client().send(chat("x"))
        await asyncio.sleep(3 * limits.DEMAND_PUSH_S)
        assert (bench.plane.waiting.count, sent, manager.reports) == (1, [], [])


# --- the whole proxy ------------------------------------------------------------------------------


async def ask_all(port: int, names: list[str]) -> list[Answer]:
    return list(await asyncio.gather(*(ask(port, chat(name)) for name in names)))


async def test_five_hundred_wait_for_one_start_and_are_served_in_order() -> None:
    """Waves, since of those that come in one moment nobody knows which was first."""
    waves = [[f"{wave}-{n}" for n in range(100)] for wave in range(5)]
    async with (
        ToldManager() as manager,
        ScriptedEngine() as engine,
        ProxyProcess("--manager-url", manager.url, "--workers", "1") as proxy,
    ):
        await manager.publish(pools=(ZERO,))
        await until(lambda: latest(manager).fleet_version == manager.version)
        loop = asyncio.get_running_loop()
        asked = []
        for number, wave in enumerate(waves):
            asked.append(loop.create_task(ask_all(proxy.port, wave)))
            due = sum(map(len, waves[: number + 1]))
            await until(lambda due=due: of_model(manager).queued == due)
        await manager.publish(pools=(COMING,))
        await asyncio.sleep(2 * DEMAND_INTERVAL_S)
        assert engine.requests == []
        await manager.publish(in_pool(engine.record("a"), max_inputs=16), pools=(UP,))
        answers = [one for group in asked for one in await group]
        assert {one.status for one in answers} == {200}
        order = [int(request.body.split(b'"<')[1].split(b"-")[0]) for request in engine.requests]
        # Sixteen are on their way over as many connections, and may arrive in any order.
        assert all(later - earlier >= -1 for earlier, later in pairwise(order))
        moved = sum(1 for place, wave in enumerate(order) if place // 100 != wave)
        assert (len(order), moved <= 4 * 2 * 16) == (500, True)
        await until(lambda: of_model(manager).queued == of_model(manager).in_flight == 0)
        assert of_model(manager).arrivals_total == 500
        assert await proxy.metric("doherty_queue_depth") == 0


async def test_a_manager_that_takes_no_reports_is_told_of_once() -> None:
    async with (
        ToldManager() as manager,
        ScriptedEngine() as engine,
        ProxyProcess("--manager-url", manager.url) as proxy,
    ):
        manager.status = 404
        await manager.publish(in_pool(engine.record("a")), pools=(UP,))
        await proxy.until_said("takes no reports of demand: it answers 404")
        assert (await ask(proxy.port, chat("x"))).status == 200
        await asyncio.sleep(3 * DEMAND_INTERVAL_S)
        manager.status = 204
        await proxy.until_said("takes reports of demand again")
        await until(lambda: of_model(manager).arrivals_total == 1)
        assert len([line for line in proxy.lines if "takes no reports" in line]) == 1
        failed = await proxy.metric("doherty_demand_reports_total", outcome="failed")
        assert failed >= 3
        assert await proxy.metric("doherty_demand_reports_total", outcome="sent") >= 1


async def test_the_last_thing_a_proxy_says_is_that_it_has_ended() -> None:
    """Whoever drains a replica would else wait until it has been silent for seconds."""
    async with (
        ToldManager() as manager,
        ScriptedEngine(reply) as engine,
        ProxyProcess("--manager-url", manager.url, "--workers", "2") as proxy,
    ):
        await manager.publish(in_pool(engine.record("a")), pools=(UP,))
        await until(lambda: latest(manager).fleet_version == manager.version)
        assert {one.status for one in await ask_all(proxy.port, ["1", "2"])} == {200}
        proxy.signal(signal.SIGTERM)
        assert await proxy.ended() == 0
        assert [report.last for report in manager.reports].count(True) == 1
        assert (latest(manager).last, latest(manager).replicas) == (True, {})


async def test_a_drain_is_over_by_the_proxys_count_when_the_last_answer_is() -> None:
    release = asyncio.Event()

    async def late(connection: Connection, request: Received) -> None:
        await release.wait()
        await answer_json(connection, b"{}")

    async with (
        ToldManager() as manager,
        ScriptedEngine(late) as engine,
        ScriptedEngine(reply) as other,
        ProxyProcess("--manager-url", manager.url, "--workers", "2") as proxy,
    ):
        first = in_pool(engine.record("a"))
        await manager.publish(first, pools=(UP,))
        await until(lambda: latest(manager).fleet_version == manager.version)
        asked = asyncio.get_running_loop().create_task(ask_all(proxy.port, ["1", "2", "3"]))
        await until(lambda: len(engine.requests) == 3)
        draining = msgspec.structs.replace(first, state=ReplicaState.DRAINING)
        await manager.publish(draining, in_pool(other.record("b")), pools=(UP,))
        await until(lambda: latest(manager).fleet_version == manager.version)
        assert latest(manager).replicas["a"].in_flight == 3
        assert {one.status for one in await ask_all(proxy.port, ["4", "5"])} == {200}
        release.set()
        await until(lambda: "a" not in latest(manager).replicas)
        assert latest(manager).fleet_version == manager.version
        assert {one.status for one in await asked} == {200}
        assert len(engine.requests) == 3
