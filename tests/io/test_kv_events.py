"""Simulated engines tell of their caches over real sockets, and what they tell is known here."""

from __future__ import annotations

import asyncio
import random
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest
import zmq

from backends.ports import PortLeases
from backends.simulator.kv_cache import Stored
from backends.simulator.kv_events import Endpoint
from proxy.core import limits
from proxy.core.kv_source import KvSource
from proxy.io.kv_reach import Followed
from tests.fakes.kv_follow import Following, following
from tests.fakes.simulator import Simulated, simulator

BLOCK = 16  # tokens
DIALECTS = ("vllm", "sglang")


@asynccontextmanager
async def followed(**changes: Any) -> AsyncIterator[tuple[Following, Simulated]]:
    """An engine of 40 blocks, and who follows it."""
    settings = {"kv_events": Endpoint(replay_port=0, topic="kv"), "kv_cache_tokens": 40 * BLOCK}
    async with simulator(**settings | changes) as engine, following() as seen:
        await seen.follow(engine.url)
        yield seen, engine


def prompt(letter: str, blocks: int) -> str:
    return letter * 4 * BLOCK * blocks


@pytest.mark.parametrize("dialect", DIALECTS)
async def test_what_is_stored_is_bound_and_what_goes_is_told(dialect: str) -> None:
    async with followed(dialect=dialect) as (seen, engine):
        if dialect == "sglang":  # which says only what was cached, when something was
            await seen.ask(engine.url, prompt("s", 2))
            await seen.ask(engine.url, prompt("s", 2) + "x")
            await seen.until(lambda: seen.resident() > 0)
        first = await seen.ask(engine.url, prompt("a", 20))
        await seen.until(lambda: seen.bound() == 1)
        await seen.until(lambda: seen.states[-1][2] >= 20 * BLOCK)
        assert seen.evicted == []
        await seen.ask(engine.url, prompt("b", 39))
        await seen.until(lambda: len(seen.evicted) >= len(first.hashes) - 1)
        # The first point may lie within a block, and then is never cached.
        assert {one for _, one in seen.evicted} <= set(first.hashes)
        assert (seen.state().gaps, seen.state().bad_batches) == (0, 0)
        assert seen.follower.age_s("a") < 20


async def test_who_comes_late_is_told_what_was() -> None:
    endpoint = Endpoint(replay_port=0, topic="kv")
    async with simulator(kv_events=endpoint) as engine, following() as seen:
        await seen.ask(engine.url, prompt("a", 10))
        await seen.follow(engine.url)
        assert seen.resident() == 10 * BLOCK
        assert (seen.evicted, seen.cleared, seen.state().rebuilds) == ([], [], 0)


@pytest.mark.parametrize("room_bytes", [limits.KV_HELD_BYTES_MAX, 0])
async def test_what_was_said_before_the_cache_was_emptied_is_not_read_while_there_is_room(
    room_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "KV_HELD_BYTES_MAX", room_bytes)
    async with simulator(kv_events=Endpoint(replay_port=0)) as engine, following() as seen:
        for letter in "abcd":
            await seen.ask(engine.url, prompt(letter, 10))
        assert (await engine.post("/reset_prefix_cache"))[0] == 200
        await seen.ask(engine.url, prompt("e", 3))
        (publisher,) = engine.process.server.publishers
        assert publisher._sequence >= 5
        await seen.follow(engine.url)
        assert seen.resident() == 3 * BLOCK
        assert (seen.state().gaps, seen.state().rebuilds, seen.cleared) == (0, 0, [])
        assert (seen.state().batches < publisher._sequence) == bool(room_bytes)
        assert seen.follower._room.left_bytes == room_bytes
        await seen.ask(engine.url, prompt("f", 3))
        await seen.until(lambda: seen.resident() == 6 * BLOCK)


async def test_each_rank_has_a_cache_of_its_own() -> None:
    endpoint = Endpoint(replay_port=0)
    async with simulator(kv_events=endpoint, dp_size=2) as engine, following() as seen:
        ranks = [Followed(f"a/{rank}", engine.url, dp_rank=rank) for rank in (0, 1)]
        seen.follower.follow([*ranks, Followed("a", engine.url)])
        await seen.until(lambda: seen.fresh("a/0") and seen.fresh("a/1"))
        body = {"model": "demo", "prompt": prompt("a", 10), "max_tokens": 2}
        await engine.post("/v1/completions", body, {"X-data-parallel-rank": "1"})
        await seen.until(lambda: seen.resident("a/1") == 10 * BLOCK)
        assert seen.resident("a/0") == 0
        assert seen.state("a").grade == "record"  # which of the two it would be, nobody says


async def test_what_the_manager_tells_of_rank_0_holds_for_the_ranks_after_it() -> None:
    leases = PortLeases(random.Random())
    first, replay = leases.lease(2), leases.lease(2)
    endpoint = Endpoint(port=first, replay_port=replay)
    told = KvSource(f"tcp://127.0.0.1:{first}", f"tcp://127.0.0.1:{replay}", "")
    async with simulator(kv_events=endpoint, dp_size=2) as engine, following() as seen:
        ranks = [Followed(f"a/{rank}", engine.url, rank, told) for rank in (0, 1)]
        seen.follower.follow(ranks)
        await seen.until(lambda: seen.fresh("a/0") and seen.fresh("a/1"))
        body = {"model": "demo", "prompt": prompt("a", 10), "max_tokens": 2}
        await engine.post("/v1/completions", body, {"X-data-parallel-rank": "1"})
        await seen.until(lambda: seen.resident("a/1") == 10 * BLOCK)
        assert seen.resident("a/0") == 0


@pytest.mark.parametrize("dialect", DIALECTS)
async def test_a_reset_clears(dialect: str) -> None:
    async with followed(dialect=dialect) as (seen, engine):
        await seen.ask(engine.url, prompt("a", 10))
        await seen.until(lambda: seen.resident() == 10 * BLOCK)
        path = "/reset_prefix_cache" if dialect == "vllm" else "/flush_cache"
        assert (await engine.post(path))[0] == 200
        await seen.ask(engine.url, prompt("b", 2))  # an engine tells of it with its next step
        await seen.until(lambda: seen.resident() == 2 * BLOCK)
        assert seen.cleared == ["a"]


async def test_a_sleep_that_the_manager_tells_of_clears_at_once_and_once() -> None:
    async with followed(sleep_mode=True) as (seen, engine):
        await seen.ask(engine.url, prompt("a", 10))
        await seen.until(lambda: seen.resident() == 10 * BLOCK)
        assert (await engine.post("/sleep?level=1"))[0] == 200
        seen.follower.cleared("a")
        assert (seen.cleared, seen.resident()) == (["a"], 0)
        assert (await engine.post("/wake_up"))[0] == 200
        await seen.ask(engine.url, prompt("b", 2))
        await seen.until(lambda: seen.resident() == 2 * BLOCK)
        assert seen.cleared == ["a"]


@pytest.mark.parametrize("replay", [True, False])
async def test_an_engine_that_is_started_anew_is_empty(replay: bool) -> None:
    async with following() as seen:
        async with simulator(kv_events=Endpoint(replay_port=0)) as engine:
            (publisher,) = engine.process.server.publishers
            replay_port = publisher.replay_port if replay else None
            where = Endpoint(port=publisher.port, replay_port=replay_port)
            await seen.follow(engine.url)
            await seen.ask(engine.url, prompt("a", 10))
            await seen.until(lambda: seen.resident() == 10 * BLOCK)
        await seen.until(lambda: not seen.fresh())
        assert seen.resident() == 10 * BLOCK  # until it is known to be another one
        async with simulator(port=engine.port, kv_events=where) as anew:
            await seen.ask(anew.url, prompt("b", 3))
            await seen.until(seen.fresh)
            if replay:
                assert seen.resident() == 3 * BLOCK
                assert (seen.cleared, seen.state().restarts) == (["a"], 1)
            else:  # it cannot be asked: nothing is known, and nothing is said
                assert (seen.cleared, seen.resident(), seen.state().rebuilds) == ([], 0, 1)


async def test_an_engine_process_that_is_killed_comes_back_empty() -> None:
    config = {"publisher": "zmq", "endpoint": "tcp://*:0", "replay_endpoint": "tcp://*:0"}
    flags = ("--kv-events-config", msgspec.json.encode(config).decode())
    async with following() as seen:
        async with engine_process(*flags) as (engine, url):
            await seen.follow(url)
            await seen.ask(url, prompt("a", 10))
            await seen.until(lambda: seen.resident() == 10 * BLOCK)
            engine.kill()
            await seen.until(lambda: not seen.fresh())
        # Its sockets are elsewhere now; where, it says itself.
        async with engine_process(*flags, "--port", url.rpartition(":")[2]) as (_, url):
            await seen.ask(url, prompt("b", 3))
            await seen.until(seen.fresh)
            assert (seen.cleared, seen.resident()) == (["a"], 3 * BLOCK)


@asynccontextmanager
async def engine_process(*flags: str) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    """Run `python -m backends.simulator`; give it and its URL."""
    command = [sys.executable, "-m", "backends.simulator", "--profile", "fast", "--port", "0"]
    process = await asyncio.create_subprocess_exec(
        *command, *flags, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
    )
    assert process.stdout is not None
    try:
        async with asyncio.timeout(30):
            yield process, (await process.stdout.readline()).decode().split()[-1]
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def test_a_manager_that_started_it_anew_says_so() -> None:
    async with followed() as (seen, engine):
        await seen.ask(engine.url, prompt("a", 10))
        await seen.until(lambda: seen.resident() == 10 * BLOCK)
        seen.follower.follow([Followed("a", engine.url, restarts=1)])
        assert (seen.cleared, seen.resident()) == (["a"], 0)


class Lossy:
    """Drops what an engine publishes while it is told to."""

    def __init__(self, engine: Simulated) -> None:
        (publisher,) = engine.process.server.publishers
        self.publisher = publisher
        self.socket = publisher._publisher
        self.dropping = False
        publisher._publisher = self  # type: ignore[assignment]  # the one method that is called

    def send_multipart(self, frames: Any, flags: int) -> None:
        if not self.dropping:
            self.socket.send_multipart(frames, flags)

    def close(self, linger: int) -> None:
        self.socket.close(linger=linger)

    def forget(self) -> None:
        self.publisher._buffer.clear()


async def test_what_was_dropped_is_told_again() -> None:
    async with followed() as (seen, engine):
        lossy = Lossy(engine)
        await seen.ask(engine.url, prompt("a", 10))
        await seen.until(lambda: seen.resident() == 10 * BLOCK)
        lossy.dropping = True
        await seen.ask(engine.url, prompt("b", 5))
        lossy.dropping = False
        await seen.ask(engine.url, prompt("c", 5))
        await seen.until(lambda: seen.resident() == 20 * BLOCK)
        assert (seen.state().gaps, seen.state().rebuilds) == (1, 0)
        assert seen.fresh()


async def test_what_is_read_at_once_happened_when_the_engine_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("proxy.core.limits.KV_LATE_S", 60.0)
    passed_s = 0.0
    clock = time.monotonic
    async with (
        simulator(kv_events=Endpoint(replay_port=0)) as engine,
        following(now_s=lambda: clock() + passed_s) as seen,
    ):
        await seen.follow(engine.url)
        (publisher,) = engine.process.server.publishers
        begun_s = time.time() + 10  # the engine's clock is ahead
        publisher.publish([Stored((1,), 0, bytes(4 * BLOCK))], begun_s)
        await seen.until(lambda: seen.resident() == BLOCK)
        passed_s = 20.0
        publisher.publish([Stored((2,), 0, bytes(4 * BLOCK))], begun_s - 9)
        publisher.publish([Stored((3,), 0, bytes(4 * BLOCK))], begun_s - 6)
        await seen.until(lambda: seen.resident() == 3 * BLOCK)
        binding = seen.follower.binding("a")
        assert binding is not None
        one, other = binding.tree.growths[-2:]
        assert other.at_s - one.at_s == pytest.approx(3, abs=1)


async def test_what_is_not_to_be_had_again_begins_the_tree_anew() -> None:
    async with followed() as (seen, engine):
        lossy = Lossy(engine)
        await seen.ask(engine.url, prompt("a", 10))
        await seen.until(lambda: seen.resident() == 10 * BLOCK)
        lossy.dropping = True
        await seen.ask(engine.url, prompt("b", 5))
        lossy.dropping = False
        lossy.forget()
        await seen.ask(engine.url, prompt("c", 5))
        await seen.until(lambda: seen.resident() == 5 * BLOCK)
        assert (seen.state().gaps, seen.state().rebuilds) == (1, 1)
        assert (seen.cleared, seen.evicted) == ([], [])
        await seen.until(seen.fresh)


async def test_without_replay_a_gap_begins_the_tree_anew() -> None:
    async with followed(kv_events=Endpoint(topic="kv")) as (seen, engine):
        lossy = Lossy(engine)
        # A subscription takes a moment to arrive.
        await seen.until(lambda: seen.state().endpoint)
        while not seen.resident():
            await seen.ask(engine.url, prompt("a", 10) + str(seen.keys))
        lossy.dropping = True
        await seen.ask(engine.url, prompt("b", 5))
        lossy.dropping = False
        await seen.ask(engine.url, prompt("c", 5))
        await seen.until(lambda: seen.state().gaps == 1 and seen.resident() == 5 * BLOCK)
        assert seen.state().rebuilds == 1


GARBAGE: dict[str, list[bytes]] = {
    "one frame": [b"kv"],
    "no number": [b"kv", b"1", b""],
    "no msgpack": [b"kv", (50).to_bytes(8, "big"), b"\xc1"],
    "endless": [b"kv", (50).to_bytes(8, "big"), b"\x93\x01\xdd\xff\xff\xff\xff"],
}


@pytest.mark.parametrize("name", GARBAGE)
async def test_garbage_is_counted_and_passed_over(name: str) -> None:
    async with followed() as (seen, engine):
        lossy = Lossy(engine)
        await seen.ask(engine.url, prompt("a", 10))
        await seen.until(lambda: seen.resident() == 10 * BLOCK)
        lossy.socket.send_multipart(GARBAGE[name], zmq.NOBLOCK)
        await seen.until(lambda: seen.state().bad_batches == 1)
        await seen.until(lambda: not seen.fresh())
        await seen.ask(engine.url, prompt("b", 5))
        await seen.until(lambda: seen.resident() >= 5 * BLOCK and seen.fresh())


async def test_a_batch_that_is_too_large_breaks_the_connection_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("proxy.core.limits.KV_BATCH_BYTES_MAX", 10_000)
    async with followed() as (seen, engine):
        lossy = Lossy(engine)
        await seen.ask(engine.url, prompt("a", 5))
        await seen.until(lambda: seen.resident() == 5 * BLOCK)
        lossy.socket.send_multipart([b"kv", (9).to_bytes(8, "big"), bytes(20_000)], zmq.NOBLOCK)
        await seen.until(lambda: "broke" in seen.state().reason)
        await seen.until(seen.fresh)
        assert seen.resident() == 5 * BLOCK


async def test_silence_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("proxy.io.kv_stream.IDLE_CHECK_S", 0.05)
    for where in (Endpoint(replay_port=0), Endpoint()):
        async with followed(kv_events=where) as (seen, _engine):
            heard_s = seen.state().heard_s
            await seen.until(lambda was=heard_s: seen.state().heard_s > was + 0.1)  # type: ignore[misc]
            assert seen.state().rebuilds == 0
        # What nobody has heard of for long is not believed.
        monkeypatch.setattr("proxy.io.kv_stream.STALE_AFTER_S", 0.0)
        async with simulator(kv_events=where) as engine, following() as seen:
            seen.follower.follow([Followed("a", engine.url)])
            await seen.until(lambda seen=seen: seen.state().heard_s > 0)  # type: ignore[misc]
            assert not seen.fresh()
        monkeypatch.setattr("proxy.io.kv_stream.STALE_AFTER_S", 15.0)


async def test_silence_ends_when_the_last_of_it_was_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("proxy.io.kv_stream.IDLE_CHECK_S", 0.05)
    async with followed() as (seen, engine):
        Lossy(engine).dropping = True
        await seen.ask(engine.url, prompt("a", 10))
        await seen.until(lambda: seen.resident() == 10 * BLOCK)
        assert seen.fresh()


async def test_an_engine_without_events_is_judged_by_the_record() -> None:
    async with simulator() as engine, following() as seen:
        seen.follower.follow([Followed("a", engine.url)])
        await seen.until(lambda: "publishes none" in seen.state().reason)
        assert (seen.state().grade, seen.follower.age_s("a")) == ("record", float("inf"))
        await seen.ask(engine.url, prompt("a", 10))
        assert seen.states == []


async def test_an_engine_that_does_not_say_is_found_as_configured() -> None:
    async with simulator(dialect="sglang", kv_events=Endpoint(replay_port=0)) as engine:
        (publisher,) = engine.process.server.publishers
        where = KvSource(f"tcp://*:{publisher.port}", f"tcp://*:{publisher.replay_port}", "")
        engine.process.server.publishers = []  # it says nothing of it
        async with following(configured=where) as seen:
            await seen.ask(engine.url, prompt("a", 10))
            await seen.follow(engine.url)
            assert seen.resident() == 10 * BLOCK


async def test_who_is_not_followed_any_more_is_forgotten() -> None:
    async with followed() as (seen, engine):
        seen.follower.follow([])
        await seen.ask(engine.url, prompt("a", 10))
        assert seen.follower.states() == []
        seen.follower.cleared("a")
        assert seen.cleared == []
        await seen.follow(engine.url, name="b")
        assert seen.resident("b") == 10 * BLOCK
