"""A proxy of two workers in front of engines that tell of their caches: what it then believes."""

from __future__ import annotations

import asyncio
import contextlib
import random
import statistics
import time
from collections.abc import AsyncIterator, Callable, Hashable
from typing import Any, NamedTuple

import aiohttp
import msgspec
import orjson
import pytest

from backends.simulator.kv_events import Endpoint
from proxy.config import ProxyConfig
from proxy.contract import FleetSnapshot, ReplicaRecord, ReplicaState
from proxy.core import limits, note_wire, notes
from proxy.core.prefix import PrefixChain
from proxy.io import control, witness
from proxy.io.hub import Hub
from proxy.io.tasks import Tasks
from proxy.io.witness import Witness
from tests.fakes.hub import WORKERS, FakeWorker
from tests.fakes.proxy_process import ProxyProcess
from tests.fakes.simulator import Simulated, simulator
from tests.fakes.talk import ask

BLOCK = 16  # tokens, of 4 octets
CACHE_TOKENS = 160 * BLOCK  # of each engine; the proxy is not told, and believes in 340,000
HEAD = "You are brief and polite, and you never say more than you know. " * 8
PATIENCE_S = 20.0
PAUSE_S = 0.1  # events are read four times a second, and these caches turn over in a few


class Asked(NamedTuple):
    """One request: what the proxy believed and what the engine had."""

    replica: str
    believed: int
    cached: int


class Scene:
    """The proxy and its engines."""

    def __init__(self, proxy: ProxyProcess, engines: list[Simulated]) -> None:
        self.proxy = proxy
        self.engines = engines

    async def ask(self, said: list[str]) -> Asked:
        """Send it on a connection of its own, to whichever worker takes it."""
        body = request_of(said)
        url = f"http://127.0.0.1:{self.proxy.port}/v1/chat/completions"
        async with (
            aiohttp.ClientSession() as session,
            session.post(url, data=body, headers={"x-doherty-explain": "1"}) as answer,
        ):
            assert answer.status == 200
            usage = (await answer.json())["usage"]
            told = answer.headers
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
        return Asked(told["x-doherty-replica"], int(told["x-doherty-cached-tokens"]), cached)

    async def candidates(self, said: list[str]) -> dict[str, dict[str, Any]]:
        body = request_of(said)
        head = (
            "POST /debug/route?path=/v1/chat/completions HTTP/1.1\r\nhost: localhost\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        got = await ask(self.proxy.admin_port, head.encode() + body, "POST")
        assert got.status == 200
        return {entry["replica"]: entry for entry in orjson.loads(got.body)["candidates"]}

    async def until_shown(self, said: list[str], claim: Callable[[dict[str, Any]], bool]) -> None:
        """Wait until every worker shows it of each replica; they explain in turn, or any does."""
        async with asyncio.timeout(PATIENCE_S):
            in_row = 0
            while in_row < 4:
                shown = await self.candidates(said)
                in_row = in_row + 1 if all(map(claim, shown.values())) else 0
                await asyncio.sleep(0.01)

    async def until_graded(self, **grades: int) -> None:
        async with asyncio.timeout(PATIENCE_S):
            for source, count in grades.items():
                while await self.proxy.metric("doherty_replica_cache_source", source=source) != (
                    count
                ):
                    await asyncio.sleep(0.02)


def request_of(said: list[str]) -> bytes:
    """The first is the system's, then user and assistant take turns."""
    roles = ["system", *["user", "assistant"] * len(said)]
    messages = [{"role": role, "content": text} for role, text in zip(roles, said, strict=False)]
    return msgspec.json.encode({"model": "demo", "messages": messages, "max_tokens": 2})


@contextlib.asynccontextmanager
async def opened(*flags: str) -> AsyncIterator[Scene]:
    settings: dict[str, Any] = {
        "kv_events": Endpoint(replay_port=0, topic="kv"),
        "kv_cache_tokens": CACHE_TOKENS,
        "model_tokens_max": CACHE_TOKENS,
        "sleep_mode": True,
    }
    async with simulator(**settings) as one, simulator(**settings) as other:
        urls = ("--worker-urls", one.url, other.url)
        # Without their metrics it does not learn how much the engines can hold.
        fixed = ("--workers", "2", "--scrape-interval-secs", "0", *urls)
        async with ProxyProcess(*fixed, *flags) as proxy:
            yield Scene(proxy, [one, other])


async def conversations(scene: Scene, count: int) -> list[Asked]:
    """Hold a dozen of them at once: three times what the engines can keep."""
    draw = random.Random(5)
    said = [[HEAD, f"{number} asks. " * draw.randrange(8, 40)] for number in range(12)]
    asked = []
    for _ in range(count):
        number = draw.randrange(len(said))
        asked.append(await scene.ask(said[number]))
        said[number] += ["Yes.", f"{draw.random()} and so on, " * draw.randrange(8, 40)]
        await asyncio.sleep(PAUSE_S)
    return asked


def median_error(asked: list[Asked]) -> float:
    """Return how far off the beliefs were, as a share of what there was, or was believed."""
    return statistics.median(
        abs(one.believed - one.cached) / max(one.cached, one.believed, BLOCK) for one in asked
    )


# --- one who witnesses, and workers that a test plays ---------------------------------------------


class Heard:
    """A witness of one engine, and the worker that it speaks to."""

    def __init__(self, tasks: Tasks, session: aiohttp.ClientSession, url: str) -> None:
        self.hub = Hub(WORKERS)
        self.worker = FakeWorker(self.hub)
        self.witness = Witness(tasks, self.hub)
        self.session = session
        self.record = ReplicaRecord(replica_id="a", url=url)
        self.notes: list[notes.Note] = []
        self.listens: list[bool] = []

    def know(self, **changes: Any) -> None:
        self.record = msgspec.structs.replace(self.record, **changes)
        self.witness.know(FleetSnapshot(epoch="e", version=1, replicas=(self.record,)))

    def take(self) -> None:
        for batch in self.worker.batches():
            self.notes += note_wire.read_notes(batch)
        self.listens += [one.on for one in self.worker.channel.heard(control.Listen)]

    async def until(self, claim: Callable[[], object]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not claim():
                await asyncio.sleep(0.005)
                self.take()

    def of(self, kind: type[notes.Note]) -> int:
        return sum(isinstance(note, kind) for note in self.notes)

    def fresh(self) -> bool:
        states = [note for note in self.notes if isinstance(note, notes.State)]
        return bool(states) and states[-1].fresh

    def dispatch(self, lease_id: int, *hashes: int) -> None:
        lease = notes.OpenLease(
            lease_id, notes.replica_key("a"), 10, 0, 100 * len(hashes), stream=True, weight=1.0
        )
        ends = [100 * (at + 1) for at in range(len(hashes))]
        chain = PrefixChain(0, hashes, ends, ends[-1])
        self.worker.note(note_wire.write_dispatched(lease, chain), time.monotonic())

    @property
    def held(self) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        return [
            (tuple(note.hashes), tuple(note.sizes))
            for note in self.notes
            if isinstance(note, notes.Holds)
        ]


@pytest.fixture
async def heard() -> AsyncIterator[tuple[Heard, Simulated]]:
    tasks = Tasks()
    async with (
        simulator(kv_events=Endpoint(replay_port=0), sleep_mode=True) as engine,
        aiohttp.ClientSession() as session,
    ):
        made = Heard(tasks, session, engine.url)
        made.witness.look(session, ProxyConfig())
        yield made, engine
        await made.witness.close()
        await tasks.close()


async def test_workers_speak_while_an_engine_can_be_followed(
    heard: tuple[Heard, Simulated],
) -> None:
    seen, _engine = heard
    seen.know(state=ReplicaState.STARTING)
    seen.know(state=ReplicaState.READY)
    await seen.until(seen.fresh)
    assert seen.listens == [False, True]
    seen.know(state=ReplicaState.DRAINING)
    seen.take()
    assert seen.listens == [False, True], "it is followed on"
    seen.know(state=ReplicaState.STOPPING)
    seen.take()
    assert seen.listens == [False, True, False]
    assert seen.witness.samples() == []
    seen.know(state=ReplicaState.READY)
    await seen.until(lambda: seen.listens[-1])
    seen.witness.look(seen.session, ProxyConfig(kv_events="off"))
    seen.know()
    seen.take()
    assert not seen.listens[-1]


async def test_an_engine_that_does_not_say_is_followed_at_the_port_that_is_configured() -> None:
    tasks = Tasks()
    endpoint = Endpoint(replay_port=0)
    async with (
        simulator(dialect="sglang", kv_events=endpoint) as engine,
        aiohttp.ClientSession() as session,
    ):
        (publisher,) = engine.process.server.publishers
        engine.process.server.publishers = []  # it says nothing of it
        ports = {"kv_events_port": publisher.port, "kv_events_replay_port": publisher.replay_port}
        seen = Heard(tasks, session, engine.url)
        seen.witness.look(session, ProxyConfig(**ports))
        seen.know()
        await seen.until(seen.fresh)
        await seen.witness.close()
    await tasks.close()


async def test_one_is_followed_where_the_manager_says() -> None:
    """Though nothing answers to the question, and something else is configured."""
    tasks = Tasks()
    endpoint = Endpoint(replay_port=0, topic="kv")
    async with (
        simulator(dialect="sglang", kv_events=endpoint) as engine,
        aiohttp.ClientSession() as session,
    ):
        (publisher,) = engine.process.server.publishers
        engine.process.server.publishers = []  # it says nothing of it
        seen = Heard(tasks, session, engine.url)
        seen.witness.look(session, ProxyConfig(kv_events_port=1))
        seen.know(kv_events="tcp://127.0.0.1:1")
        seen.know(
            kv_events=f"tcp://*:{publisher.port}",
            kv_replay=f"tcp://*:{publisher.replay_port}",
            kv_topic="kv",
        )
        await seen.until(seen.fresh)
        await seen.witness.close()
    await tasks.close()


async def test_asleep_it_is_followed_on_through_the_drain_before(
    heard: tuple[Heard, Simulated],
) -> None:
    """So that nothing of what it held before is read anew once it has woken."""
    seen, engine = heard
    seen.know()
    await seen.until(seen.fresh)
    body = {"model": "demo", "prompt": "a" * 640, "max_tokens": 1}
    assert (await engine.post("/v1/completions", body))[0] == 200

    def resident() -> int:
        assert seen.witness._follower is not None
        binding = seen.witness._follower.binding("a")
        return 0 if binding is None else binding.resident_tokens

    await seen.until(resident)
    seen.know(state=ReplicaState.DRAINING)
    seen.know(state=ReplicaState.READY, asleep=True)
    assert resident() == 0
    seen.know(asleep=False)
    await asyncio.sleep(limits.KV_GATHER_S + limits.KV_LATE_S * 1.1)  # all has come
    assert resident() == 0


async def test_one_that_falls_asleep_or_begins_anew_is_empty_at_once(
    heard: tuple[Heard, Simulated],
) -> None:
    seen, _engine = heard
    seen.know(asleep=True)
    assert seen.witness.samples() == []  # not followed yet
    seen.know(asleep=False)
    await seen.until(seen.fresh)
    for changes in ({"asleep": True}, {"asleep": True}, {"asleep": False}, {"restarts": 1}):
        seen.know(**changes)
    await asyncio.sleep(0)
    seen.take()
    assert seen.of(notes.Cleared) == 2
    assert next(sample.labels[1:] for sample in seen.witness.samples()) == (("source", "events"),)


async def test_what_is_under_way_survives_the_news_of_a_clearing(
    heard: tuple[Heard, Simulated],
) -> None:
    seen, engine = heard
    seen.know()
    await seen.until(seen.fresh)
    body = {"model": "demo", "prompt": "a" * 640, "max_tokens": 1}
    assert (await engine.post("/v1/completions", body))[0] == 200
    assert (await engine.post("/reset_prefix_cache"))[0] == 200
    seen.dispatch(1, 13)
    seen.worker.note(note_wire.write_released(1, None), time.monotonic())
    await asyncio.sleep(limits.KV_GATHER_S + limits.KV_LATE_S * 1.1)  # all has come
    seen.dispatch(2, 11, 12)
    assert (await engine.post("/v1/completions", body))[0] == 200
    await seen.until(lambda: seen.of(notes.Cleared))
    assert seen.held == [((12, 11), (100, 100))]
    seen.dispatch(3, 14)  # sent before the news, and told after it
    await seen.until(lambda: len(seen.held) == 2)
    seen.worker.leave()
    assert seen.witness.open_count == 0


# --- all of it -----------------------------------------------------------------------------------


async def test_what_engines_displace_is_not_believed_any_more() -> None:
    async with opened("--kv-events", "off") as scene:
        asked = await conversations(scene, 70)
        assert median_error(asked[25:]) > 0.15  # the record alone does not know
        assert {entry["cache_source"] for entry in (await scene.proxy.replicas()).values()} == {
            "record"
        }
    async with opened() as scene:
        await scene.until_graded(events=2)
        asked = await conversations(scene, 70)
        assert len({one.replica for one in asked}) == 2
        assert median_error(asked[25:]) <= 0.1
        off = statistics.median(abs(one.believed - one.cached) for one in asked[25:])
        assert off <= 2 * BLOCK  # one that is not full, and what an estimate of tokens is off by
        await flushed_is_noticed(scene)
        await silent_is_judged_by_the_record(scene)
        for name in ("leases", "leases_of_others", "replica_inflight"):
            assert await scene.proxy.metric("doherty_" + name) == 0


async def flushed_is_noticed(scene: Scene) -> None:
    said = [HEAD * 4, "one"]
    await scene.ask(said)

    def known(entry: dict[str, Any]) -> bool:
        told = entry["cache_source"] == "events" and entry["resident_tokens"] > 0
        return told and 0 <= entry["cache_source_age_s"] < PATIENCE_S

    await scene.until_shown(said, known)
    for engine in scene.engines:
        assert (await engine.post("/reset_prefix_cache"))[0] == 200
    # Engines tell of it with their next step: that of the request that comes here.
    asked = await scene.ask([*said, "yes", "two"])
    other = next(engine for engine in scene.engines if not engine.url.endswith(asked.replica))
    await other.post("/v1/completions", {"model": "demo", "prompt": "x" * 100, "max_tokens": 1})

    def right(entry: dict[str, Any]) -> bool:
        """Nothing from before is left, and of what came with the news nothing is lost."""
        return (entry["cached_tokens"] > 400) == (entry["replica"] == asked.replica)

    await scene.until_shown(said, right)
    await scene.until_shown([HEAD, "0 asks. "], lambda entry: entry["cached_tokens"] < 150)


async def silent_is_judged_by_the_record(scene: Scene) -> None:
    engine = scene.engines[0]
    name = engine.url.removeprefix("http://")
    before = (await scene.proxy.replicas())[name]
    assert before["cache_source"] == "events"
    assert 0 <= before["cache_source_age_s"] < PATIENCE_S
    engine.process.server.publishers.pop().close()
    await scene.until_graded(record=1, events=1)
    assert (await scene.proxy.replicas())[name]["cache_source"] == "record"
    await scene.until_shown([HEAD], lambda entry: (
        entry["cache_source"] == ("record" if entry["replica"] == name else "events")
    ))  # fmt: skip


async def test_what_is_read_for_its_amount_is_not_overtaken_by_what_was_said_since(
    heard: tuple[Heard, Simulated], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, _engine = heard
    seen.know()
    await seen.until(seen.fresh)
    monkeypatch.setattr(witness, "OVERHEARD_BYTES_MAX", 0)
    follower = seen.witness._follower
    assert follower is not None
    took = follower.dispatched

    def goes_on(key: Hashable, *rest: Any) -> None:
        took(key, *rest)
        if key == (seen.worker.origin, 1):  # a worker does not wait for us
            released = note_wire.write_released(3, None)
            seen.worker.ring.write(seen.worker.origin, time.monotonic(), released)

    monkeypatch.setattr(follower, "dispatched", goes_on)
    for lease_id in (1, 2, 3):
        lease = notes.OpenLease(
            lease_id, notes.replica_key("a"), 10, 0, 100, stream=True, weight=1.0
        )
        note = note_wire.write_dispatched(lease, PrefixChain(0, (lease_id,), (100,), 100))
        seen.worker.ring.write(seen.worker.origin, time.monotonic(), note)
    seen.hub.collect()
    assert seen.witness.open_count == 2
