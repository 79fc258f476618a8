"""Offline work of one worker gives way to the online work of another of the same proxy."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable

import msgspec

from proxy.core import limits, note_wire, notes
from proxy.core.note_ring import Said
from proxy.core.notes import OpenLease
from proxy.core.prefix import PrefixChain
from proxy.io import control
from tests.fakes.engine import Connection, Received, ScriptedEngine, answer_json
from tests.fakes.hub import FakeChannel, FakeRing
from tests.fakes.plane import Bench, chat_request, records, until
from tests.fakes.proxy_process import ProxyProcess
from tests.fakes.talk import Talk
from tests.fakes.told_manager import ToldManager
from tests.io.test_preemption import Stage, full
from tests.io.test_sharing import until_metric

MakeBench = Callable[..., Bench]
OTHER, PEER = 3, 4  # origins


class Told:
    """A bench, and what its worker hears of others and asks of them."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.stage = Stage(bench)
        self.channel = FakeChannel()
        self.ring, self.others = FakeRing(), FakeRing()
        bench.plane.noting.connect(self.channel, self.ring.writer)
        bench.plane.sharing.connect(self.channel, [self.others.reader])

    def hear(self, *batch: bytes, origin: int = OTHER) -> None:
        said = Said(origin, self.bench.clock.now_s(), b"".join(batch), ours=origin == OTHER)
        self.bench.plane.sharing.hear(said, said.at_s)
        self.bench.plane.work_done()

    def gone(self) -> None:
        """The other worker ends."""
        self.bench.plane.sharing.obey(self.channel, control.Gone(OTHER))

    def asked(self) -> list[control.GiveWay]:
        return self.channel.heard(control.GiveWay)

    def order(self, *lease_ids: int) -> None:
        """Another worker asks this one."""
        self.bench.plane.sharing.obey(self.channel, control.GiveWay(1, "a", list(lease_ids)))

    def count(self, name: str) -> float:
        return sum(each.value for each in self.bench.plane.counters() if each.name == name)


def sent(lease_id: int, *, yields: bool = True) -> bytes:
    key = notes.replica_key("a")
    lease = OpenLease(lease_id, key, 10, 0, 40, stream=False, weight=1.0, yields=yields)
    return note_wire.write_dispatched(lease, PrefixChain(0, (lease_id,), (40,), 40))


async def test_the_youngest_of_another_worker_is_asked_once_and_waited_for(
    make_bench: MakeBench,
) -> None:
    told = Told(make_bench(full(2)))
    told.hear(sent(5))
    told.bench.clock.advance(0.01)
    told.hear(sent(6))
    await told.stage.send("person")
    assert told.asked() == [control.GiveWay(OTHER, "a", [6])]
    assert told.stage.depths == [1, 0, 0]
    await told.stage.send("second")
    assert told.asked() == [control.GiveWay(OTHER, "a", [5])]
    await told.stage.send("third")
    assert told.asked() == []  # nothing is left to ask for
    assert told.count("preemption_asked_total") == 2
    told.hear(note_wire.write_released(6, None))
    await until(lambda: told.stage.engines("person"))
    told.hear(note_wire.write_released(5, None))
    await until(lambda: told.stage.engines("second"))
    assert await told.stage.answer("person") == 200
    await until(lambda: told.stage.engines("third"))
    assert await told.stage.answer("second") == 200
    assert await told.stage.answer("third") == 200


async def test_nobody_is_asked_in_vain(make_bench: MakeBench) -> None:
    """Not for what is online, answered or over, and no worker of a peer, which nobody reaches."""
    told = Told(make_bench(full(1)))
    told.hear(sent(5), origin=PEER)
    await told.stage.send("first")
    told.hear(note_wire.write_released(5, None), origin=PEER)
    told.hear(sent(6, yields=False))
    await told.stage.send("second")
    told.hear(note_wire.write_released(6, None), sent(7), note_wire.write_prefill_ended(7))
    await told.stage.send("third")
    told.hear(note_wire.write_released(7, None))
    told.hear(sent(8))
    told.gone()
    await told.stage.send("fourth")
    assert told.asked() == []
    assert not told.bench.plane.sharing.hearsay.yielding


async def test_offline_work_and_what_cannot_wait_ask_nobody(make_bench: MakeBench) -> None:
    told = Told(make_bench(full(1)))
    told.hear(sent(5))
    await told.stage.send("line", "flex")
    assert told.asked() == []
    told.gone()
    impatient = Told(make_bench(full(1), queue_size=0))
    impatient.hear(sent(5))
    await impatient.stage.send("person")
    assert impatient.asked() == []
    impatient.gone()


async def test_our_own_goes_first_since_that_is_at_once(make_bench: MakeBench) -> None:
    told = Told(make_bench(full(2)))
    await told.stage.send("line", "flex")
    told.hear(sent(5))
    await told.stage.send("person")
    assert told.stage.engines("line")[0].cut_off
    assert len(told.stage.engines("person")) == 1
    assert told.asked() == []
    assert await told.stage.answer("person") == 200
    told.gone()


async def test_who_is_asked_lets_the_other_go_first(make_bench: MakeBench) -> None:
    told = Told(make_bench(full(1)))
    await told.stage.send("line", "flex")
    (lease,) = told.bench.plane.leases
    told.order(lease.lease_id)
    await told.bench.settle()
    assert told.stage.engines("line")[0].cut_off
    assert len(told.stage.engines("line")) == 1  # though there is room
    await told.stage.send("later", "flex")
    assert told.stage.engines("later") == []
    told.bench.clock.advance(limits.GIVE_WAY_S)
    await told.stage.send("person")
    assert await told.stage.answer("person") == 200
    await until(lambda: len(told.stage.engines("line")) == 2)
    assert told.stage.counts == {"requeued": 1, "refused": 0}
    assert await told.stage.answer("line") == 200
    assert await told.stage.answer("later") == 200


async def test_who_is_asked_too_late_is_left_alone(make_bench: MakeBench) -> None:
    told = Told(make_bench(full(2)))
    await told.stage.send("line", "flex")
    (lease,) = told.bench.plane.leases
    told.stage.engines("line")[0].send(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n{")
    await told.bench.settle()
    told.order(lease.lease_id, lease.lease_id + 1)
    assert not told.stage.engines("line")[0].cut_off
    assert told.count("preemption_late_total") == 2
    assert told.count("preempted_total") == 0


async def test_what_may_be_ended_is_told_until_it_is_answered(make_bench: MakeBench) -> None:
    told = Told(make_bench(records("a")))
    told.bench.plane.noting.listen(on=True)
    await told.stage.send("line", "flex")
    await told.stage.send("person")
    told.bench.plane.noting.tell_all()
    by_id = _yielding(told.ring)
    assert sorted(by_id.values()) == [False, True]
    told.stage.engines("line")[0].send(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n{")
    await told.bench.settle()
    told.bench.plane.noting.tell_all()
    assert set(_yielding(told.ring).values()) == {False}


def _yielding(ring: FakeRing) -> dict[int, bool]:
    """Return what the last list of open leases says of each."""
    found = [n for sent in ring.reader.take() for n in note_wire.read_notes(sent.batch)]
    lists = [note for note in found if isinstance(note, notes.OpenLeases)]
    return {lease.lease_id: lease.yields for note in lists for lease in note.leases}


# --- in earnest -----------------------------------------------------------------------------------


class Lines:
    """An engine's script: lines are answered when the gate is open, and persons at once."""

    def __init__(self) -> None:
        self.order: list[str] = []
        self.gate = asyncio.Event()

    async def __call__(self, connection: Connection, request: Received) -> None:
        name = json.loads(request.body)["messages"][0]["content"]
        self.order.append(name)
        if name == "line":
            await self.gate.wait()
        await answer_json(connection, b"{}")


def chat(name: str, tier: str) -> bytes:
    message = {"role": "user", "content": name}
    return chat_request(
        json.dumps({"model": "m", "service_tier": tier, "messages": [message]}).encode()
    )


async def test_the_workers_of_a_proxy_give_way_to_each_other() -> None:
    lines = Lines()
    async with (
        ToldManager() as manager,
        ScriptedEngine(lines) as engine,
        ProxyProcess("--manager-url", manager.url, "--workers", "3") as proxy,
        contextlib.AsyncExitStack() as stack,
    ):
        await manager.publish(msgspec.structs.replace(engine.record("a"), max_inputs=2))
        await until(lambda: any(r.fleet_version == manager.version for r in manager.reports))
        talks: dict[int, list[Talk]] = {pid: [] for pid in proxy.workers()}
        while min(map(len, talks.values())) < 2:
            talk = await stack.enter_async_context(Talk(proxy.port))
            port = talk.writer.get_extra_info("sockname")[1]
            held: list[int] = []
            while not held:
                await asyncio.sleep(0.002)
                held = [pid for pid in talks if port in proxy.client_ports_of(pid)]
            talks[held[0]].append(talk)
        busy, online, idle = talks.values()
        for talk in busy[:2]:
            await talk.send(chat("line", "flex"))
        for number, person in enumerate((online[0], idle[0])):
            await until(lambda n=number: lines.order.count("line") == 2 + n)
            await until_metric(proxy, "leases_of_others", 4)  # of two, by each of the others
            await person.send(chat("person", "auto"))
            assert (await person.answer()).status == 200
        await until(lambda: len(lines.order) == 6)
        assert lines.order == ["line", "line", "person", "line", "person", "line"]
        assert await proxy.metric("doherty_preemption_asked_total") == 2
        assert await proxy.metric("doherty_preempted_total", outcome="requeued") == 2
        assert await proxy.metric("doherty_preemption_late_total") == 0
        lines.gate.set()
        assert [(await talk.answer()).status for talk in busy[:2]] == [200, 200]
        await until_metric(proxy, "leases_of_others", 0)
        assert await proxy.metric("doherty_internal_errors_total") == 0
