"""The tables of a view, each from counters and records that a test says."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import orjson
import pytest
from aiohttp import web
from msgspec import structs

from proxy.contract import FleetSnapshot, LoadSample, ReplicaRecord, ReplicaState
from proxy.contract.regions import RegionSummary, RemoteState
from proxy.contract.scaling import SCALING_PATH
from proxy.contract.view import (
    HOLDERS_MAX,
    MODELS_MAX,
    NOTES_MAX,
    PREFIXES_MAX,
    RINGS_MAX,
    View,
    decode_view,
)
from proxy.io.control import HotPrefix
from proxy.io.telemetry import Labels, Sample
from tests.fakes.admin import Admin, Standing, admin


class Told(Standing):
    """A fleet of which a test says what was counted, in one worker or several."""

    def count(self, name: str, value: float, **labels: str) -> None:
        self.counters.append(Sample(name, _labels(labels), value))

    def gauge(self, name: str, value: float, **labels: str) -> None:
        self.gauges.append(Sample(name, _labels(labels), value))

    def publish(self, *records: ReplicaRecord) -> None:
        fleet = self.roster.fleet
        version = fleet.version + 1 if fleet is not None else 1
        self.roster.take(FleetSnapshot(epoch="e", version=version, replicas=records))


def _labels(labels: dict[str, str]) -> Labels:
    return tuple(labels.items())


class Clock:
    """Time that passes when a test says so."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@asynccontextmanager
async def watched(standing: Told) -> AsyncIterator[tuple[Admin, Clock]]:
    async with admin(standing) as listener:
        clock = listener.viewing._now_s = Clock()
        listener.viewing.count()  # the first moment: nothing has been counted
        clock.now_s += 10.0
        yield listener, clock


async def view_of(listener: Admin) -> View:
    got = await listener.get("/view")
    assert got.status == 200
    return decode_view(got.body)


async def test_rates_and_shares_are_of_the_window() -> None:
    told = Told()
    async with watched(told) as (listener, clock):
        for worker in (1, 2):
            for code, outcome, count in (
                ("200", "ok", 40),
                ("200", "stream_cut", 5),
                ("429", "queue_full", 10),
                ("502", "replica_lost", 5),
                ("499", "client_gone", 1),
            ):
                told.count(
                    "requests_total", count * worker,
                    route="chat", model="m", code=code, outcome=outcome,
                )  # fmt: skip
            told.count("prompt_tokens_total", 1000, route="chat", model="m")
            told.count("prefix_cached_tokens_total", 250 * worker, route="chat", model="m")
            told.count("generation_tokens_total", 600, route="chat", model="m")
            told.gauge("requests_in_flight", 3)
            told.gauge("client_connections", worker)
        view = await view_of(listener)
        assert view.window_s == 10.0
        assert view.proxy.requests_per_s == 18.3
        assert view.proxy.errors_per_s == 3.0  # 502, and streams that were cut
        assert view.proxy.tokens_per_s == 120.0
        assert view.proxy.cached_ratio == 0.375
        assert (view.proxy.in_flight, view.proxy.connections) == (6, 3)
        assert view.codes == {"200": 13.5, "429": 3.0, "502": 1.5, "499": 0.3}
        assert list(view.codes) == ["200", "429", "502", "499"]
        (model,) = view.models
        assert (model.model, model.tokens_per_s, model.cached_ratio) == ("m", 120.0, 0.375)
        clock.now_s += 100.0
        listener.viewing.count()
        clock.now_s += 5.0
        view = await view_of(listener)  # nothing has happened since
        assert view.proxy.requests_per_s == 0.0
        assert view.proxy.cached_ratio is None
        assert view.codes == {}


async def test_classes_tell_who_waits_and_who_was_refused() -> None:
    told = Told()
    async with watched(told) as (listener, _):
        for outcome, count in (
            *(("ok", 10), ("queue_full", 3), ("queue_timeout", 2), ("not_awake", 1)),
            *(("deadline_exceeded", 1), ("replica_lost", 5), ("invalid_request", 7)),
            ("insufficient_quota", 3),
        ):
            told.count("class_requests_total", count, **{"class": "offline"}, outcome=outcome)
        for worker in (1, 2):
            told.gauge("queue_depth", worker, **{"class": "online"})
            told.gauge("queue_bytes", 100.0, **{"class": "online"})
            told.gauge("queue_oldest_seconds", 1.5 * worker, **{"class": "online"})
        online, semi, offline = (await view_of(listener)).classes
        assert (online.work_class, semi.work_class, offline.work_class) == (
            *("online", "semi-online"),
            "offline",
        )
        assert (online.depth, online.queue_bytes, online.oldest_s) == (3, 200, 3.0)
        assert (semi.depth, semi.oldest_s) == (0, None)
        assert (offline.requests_per_s, offline.refused_per_s) == (3.2, 1.0)


async def test_an_engine_that_restarts_begins_its_share_anew() -> None:
    told = Told()
    record = ReplicaRecord(replica_id="a", url="http://a:1", models=("m",))

    def loaded(prompt: int, cached: int, restarts: int = 0) -> ReplicaRecord:
        load = LoadSample(
            at_s=1.0, prompt_tokens_total=prompt, cached_tokens_total=cached, kv_used_ratio=0.5
        )
        return structs.replace(record, load=load, restarts=restarts)

    told.publish(loaded(1000, 0))
    async with watched(told) as (listener, clock):
        told.publish(loaded(3000, 500))
        assert (await view_of(listener)).replicas[0].cached_ratio == 0.25
        # It has had more since its restart than it had before, and yet all of it is new.
        told.publish(loaded(4000, 3000, restarts=1))
        clock.now_s += 1.0
        assert (await view_of(listener)).replicas[0].cached_ratio == 0.75
        told.publish(record)
        clock.now_s += 1.0
        (replica,) = (await view_of(listener)).replicas
        assert (replica.cached_ratio, replica.kv_used_ratio, replica.running) == (None, None, None)


async def test_replicas_are_told_by_pool_with_what_workers_have_there() -> None:
    told = Told()
    record = ReplicaRecord(replica_id="z", url="http://a:1", models=("m",), pool="a", max_inputs=8)
    asleep = structs.replace(record, replica_id="b", pool="b", asleep=True, region="there")
    held = structs.replace(
        record, replica_id="a", pool="b", state=ReplicaState.DRAINING, held=True, reason="why"
    )
    told.publish(asleep, held, record)
    async with watched(told) as (listener, _):
        for worker in (1, 2):
            told.count("replica_requests_total", 10 * worker, replica="z")
            told.gauge("replica_inflight", worker, replica="z")
            told.gauge("replica_wait_seconds", 0.5 * worker, replica="z")
        told.gauge("replica_cache_source", 1, replica="z", source="events")
        told.gauge("replica_cache_source", 1, replica="a", source="record")
        one, two, three = (await view_of(listener)).replicas
        assert (one.replica_id, two.replica_id, three.replica_id) == ("z", "a", "b")
        assert (one.inflight, one.wait_s, one.requests_per_s) == (3, 1.0, 3.0)
        assert (one.inflight_max, one.cache_source) == (8, "events")
        assert (one.region, three.region) == ("here", "there")
        assert (two.state, two.held, two.reason) == ("draining", True, "why")
        assert two.cache_source == "record"
        assert (three.state, three.inflight) == ("asleep", 0)
        # Those that are held are home to their keys all the same.
        assert sum(r.ring_ratio for r in (one, two, three)) > 0.999


async def test_other_regions_are_told_with_what_is_there() -> None:
    told = Told()
    async with watched(told) as (listener, _):
        summary = RegionSummary(region="us", sequence=1, draining=True)
        told.states = [
            RemoteState(
                name="us#0", region="us", url="http://u:1", linked=True, round_trip_s=0.08,
                at_s=109.5, summary=summary,
            ),
            RemoteState(name="ap#0", region="ap", url="http://p:1"),
        ]  # fmt: skip
        told.gauge("remote_inflight", 2, remote="us#0")
        told.gauge("remote_inflight", 3, remote="us#0")
        away, here = (await view_of(listener)).regions
        assert (away.peer, away.linked, away.summary_age_s) == ("ap#0", False, None)
        assert (here.peer, here.round_trip_s, here.summary_age_s) == ("us#0", 0.08, 0.5)
        assert (here.draining, here.inflight) == (True, 5)


async def test_what_workers_count_of_a_prefix_is_added_up_on_the_busiest_ring_that_holds_it() -> (
    None
):
    told = Told()
    base = ReplicaRecord(replica_id="a", url="http://a:1", models=("m", "n"))
    told.publish(
        base,
        structs.replace(base, replica_id="b", models=("n",)),
        structs.replace(base, replica_id="c", models=("o", "p")),
    )
    told.prefixes = [
        HotPrefix(1 << 63, 900, 20, 0, 1, ["a"]),
        HotPrefix(1 << 62, 700, 30, 1, 1, ["c"]),
        HotPrefix(1 << 63, 900, 15, 2, 2, ["a", "b"]),
        HotPrefix(5, 700, 30, 0, 1, ["gone"]),
    ]
    async with watched(told) as (listener, _):
        told.count("requests_total", 5, route="c", model="n", code="200", outcome="ok")
        told.count("requests_total", 3, route="c", model="p", code="200", outcome="ok")
        n, o, m = (await view_of(listener)).rings
        assert (n.model, n.models) == ("n", ("n",))
        assert (o.model, o.models) == ("p", ("o", "p"))
        assert (m.model, m.prefixes) == ("m", ())
        (hot,) = n.prefixes
        assert (hot.heat, hot.spread, hot.holders, hot.held_by) == (35.0, 2, ("a", "b"), 2)
        assert (hot.name, hot.at) == ("8000000000000000", 0.5)
        (other,) = o.prefixes
        assert (other.at, other.home) == (0.25, "c")
        assert {arc.replica_id for arc in n.arcs} == {"a", "b"}


async def test_tables_are_bounded() -> None:
    told = Told()
    record = ReplicaRecord(replica_id="a", url="http://a:1")
    told.publish(
        *(structs.replace(record, replica_id=f"r{n}", models=(f"m{n}",)) for n in range(100))
    )
    told.prefixes = [HotPrefix(n, 9, 100 + n, 0, 40, [f"r{n}"]) for n in range(8)] * 40
    told.prefixes += [
        HotPrefix(1000 + n, 9, 9, 0, 40, [f"r{m}" for m in range(60)]) for n in range(200)
    ]
    async with watched(told) as (listener, _):
        for number in range(2 * MODELS_MAX):
            told.count(
                "requests_total", number, route="c", model=f"m{number}", code="200", outcome="ok"
            )
        view = await view_of(listener)
        assert len(view.models) == MODELS_MAX
        assert view.models[0].model == f"m{2 * MODELS_MAX - 1}"
        assert len(view.rings) == RINGS_MAX
        prefixes = [prefix for ring in view.rings for prefix in ring.prefixes]
        assert len(prefixes) <= PREFIXES_MAX
        assert all(len(prefix.holders) <= HOLDERS_MAX for prefix in prefixes)


# --- the manager's news --------------------------------------------------------------------------


class Scaler:
    """A manager that tells of its scaling, and nothing else."""

    def __init__(self) -> None:
        self.body = b""
        self.status = 200
        self.asked = 0

    async def answer(self, _: web.Request) -> web.Response:
        self.asked += 1
        return web.Response(status=self.status, body=self.body)


@asynccontextmanager
async def scaler() -> AsyncIterator[tuple[Scaler, web.AppRunner]]:
    made = Scaler()
    app = web.Application()
    app.router.add_get(SCALING_PATH, made.answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield made, runner
    finally:
        await runner.cleanup()


def a_note(number: int) -> dict[str, object]:
    return {"at_s": number, "pool": "p", "was": 1, "desired": 2, "reason": f"{number} wait",
            "moves": ["p-1: wake"], "panicking": True, "terms": {}}  # fmt: skip


async def test_pools_and_decisions_are_the_managers_and_stay_when_it_has_gone() -> None:
    told = Told()
    async with scaler() as (manager, runner), watched(told) as (listener, _):
        told.manager = "http://{}:{}/".format(*runner.addresses[0][:2])
        pool = {"pool": "p", "model": "m", "work_class": "online", "scaled": True, "min": 1,
                "max": 4, "desired": 2, "ready": 1, "coming": 1, "going": 0, "unheard": {},
                "resting": {"p-2": "asleep"}, "waiting": "no GPU is free"}  # fmt: skip
        pools = [
            pool | {"notes": [a_note(n) for n in range(40)]},
            {"pool": "o", "notes": [a_note(n) | {"pool": "o"} for n in range(100, 140)]},
        ]
        manager.body = orjson.dumps({"at_s": 1.0, "pools": pools, "gpus": {}})
        view = await view_of(listener)
        assert [one.pool for one in view.pools] == ["o", "p"]
        assert (view.pools[1].resting, view.pools[1].waiting) == (1, "no GPU is free")
        assert len(view.scaling) == NOTES_MAX
        assert (view.scaling[0].at_s, view.scaling[0].pool) == (139.0, "o")
        assert view.scaling[0].moves == ("p-1: wake",)
        assert view.scaling_age_s is not None
        for status, body in ((500, b""), (200, b"no JSON"), (200, b'{"pools": 1}'), (404, b"")):
            manager.status, manager.body = status, body
            listener.viewing.hurry()
            again = await view_of(listener)
            assert (again.pools, again.scaling) == (view.pools, view.scaling)
            assert again.scaling_age_s is not None
            assert again.scaling_age_s >= view.scaling_age_s
        assert manager.asked == 5
        await runner.cleanup()
        listener.viewing.hurry()
        assert (await view_of(listener)).pools == view.pools
        told.manager = None
        listener.viewing.hurry()
        alone = await view_of(listener)
        assert (alone.pools, alone.scaling, alone.scaling_age_s) == ((), (), None)


async def test_a_view_that_fails_is_told_and_counting_goes_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    told = Told("a")
    async with watched(told) as (listener, clock):
        told.counters = [Sample("requests_total", (("model",),), 1)]  # type: ignore[arg-type]
        listener.viewing.watchers = 1
        listener.viewing.count()
        assert "making the view" in caplog.text
        told.counters.clear()
        number = listener.viewing.number
        clock.now_s += 1.0
        listener.viewing.count()
        assert listener.viewing.number == number + 1


async def test_who_asks_all_the_time_has_one_view_made_at_a_time() -> None:
    told = Told("a")
    async with watched(told) as (listener, clock):
        before = told.recounts
        await asyncio.gather(*(view_of(listener) for _ in range(20)))
        assert told.recounts == before + 1
        clock.now_s += 1.0
        await view_of(listener)
        assert told.recounts == before + 2
