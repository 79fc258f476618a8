"""Clients that are slow on purpose: half heads, half bodies, answers that nobody takes."""

from __future__ import annotations

import asyncio
import itertools
import time

from loadtest.siege.engine import STREAM_BYTES, Engine, request_body
from loadtest.siege.findings import Figure, Finding, at_most, kibibytes, promise, ratio, timing
from loadtest.siege.target import POLL_S, Proxy
from loadtest.siege.traffic import HEAD, Raw, Traffic, Window, connect_many, numbers, post

DRIP_S = 1.0
SLICES = 100
GONE_S_MAX = 10.0
GONE_LIMIT_S = 60.0  # then we stop waiting
HELD_BYTES_MAX = 16 * 1024  # a slow head or body
P99_TIMES_MAX = 2.0
READERS_P99_TIMES_MAX = 1.5
SETTLE_S = 0.3
HIGH_WATER_BYTES = 256 * 1024
# What the proxy says that it keeps for a slow reader: its mark, and one read of its loop on top.
KEPT_BYTES_MAX = 128 * 1024 + 256_000
# The kernels on the way take up to 6 MiB of a fast stream, more than there is, but seldom so much.
WAITING_SHARE_MIN = 0.9
READ_BYTES_PER_S = 1024
READER_BUFFER_BYTES = 4096


async def slow_heads(*, quick: bool) -> Finding:
    """Heads that never end, an octet a second."""
    return await _dripping("slow heads", HEAD + b"x-slow: ", quick=quick)


async def slow_bodies(*, quick: bool) -> Finding:
    """Bodies that never end, an octet a second."""
    begin = HEAD + b'content-length: 1000000\r\n\r\n{"model":"'
    return await _dripping("slow bodies", begin, quick=quick)


async def _dripping(scenario: str, begin: bytes, *, quick: bool) -> Finding:
    """Hold many connections open. The quick way does not wait until they have been sent away."""
    count, seconds, rate = (100, 0.5, 50.0) if quick else (1000, 6.0, 200.0)
    async with Engine() as engine, Proxy(engine.url) as proxy:
        traffic = Traffic(proxy.port, rate)
        async with traffic.flowing(), asyncio.TaskGroup() as group:
            await traffic.window(0.3)
            base = await traffic.window(seconds)
            before_bytes = proxy.rss_bytes()
            connections = (await proxy.metrics())["client_connections"]
            held = await connect_many(proxy.port, count)
            opened_s = time.monotonic()
            for raw in held:
                raw.write(begin)
            drip = group.create_task(_drip(held))
            under = await traffic.window(seconds)
            each_bytes = (proxy.rss_bytes() - before_bytes) / count
            gone = () if quick else await _gone(proxy, held, opened_s, connections)
            drip.cancel()
        for raw in held:
            raw.close()
        figures = (
            *gone,
            *others(base, under, P99_TIMES_MAX),
            at_most("memory for each", each_bytes, HELD_BYTES_MAX, kibibytes),
            *await whole(proxy),
        )
    return Finding(scenario=scenario, figures=figures)


async def _drip(held: list[Raw]) -> None:
    """Let each send an octet a second; not all at once, as nobody would who is not one program."""
    for part in itertools.cycle(range(SLICES)):
        for raw in held[part::SLICES]:
            raw.write(b"x")
        await asyncio.sleep(DRIP_S / SLICES)


async def _gone(
    proxy: Proxy, held: list[Raw], opened_s: float, connections: float
) -> tuple[Figure, ...]:
    """Wait until the proxy has sent them all away, and holds no connection of theirs."""
    limit_s = opened_s + GONE_LIMIT_S
    for raw in held:
        await raw.until(lambda: raw.first_s > 0, limit_s - time.monotonic())  # noqa: B023
    told_s = max((raw.first_s or limit_s) for raw in held) - opened_s
    # The good traffic may have opened some more meanwhile.
    most = connections + len(held) / 50
    while time.monotonic() < limit_s:
        if (await proxy.metrics())["client_connections"] <= most:
            break
        await asyncio.sleep(POLL_S)
    statuses = sorted({raw.status for raw in held})
    return (
        promise("all sent away with", str(statuses)[1:-1], "408", met=statuses == [408]),
        timing(f"last of {len(held):,} told to go after", told_s, GONE_S_MAX),
        timing("last connection gone after", time.monotonic() - opened_s, GONE_S_MAX),
    )


# --- readers ---------------------------------------------------------------------------------


async def slow_readers(*, quick: bool) -> Finding:
    """Streams that are taken at a kibibyte a second, by readers with small receive buffers."""
    count, seconds, rate = (40, 0.5, 50.0) if quick else (500, 8.0, 100.0)
    async with Engine() as engine, Proxy(engine.url) as proxy:
        traffic = Traffic(proxy.port, rate)
        async with traffic.flowing(), asyncio.TaskGroup() as group:
            await traffic.window(0.3)
            base = await traffic.window(seconds)
            before_bytes = proxy.rss_bytes()
            readers = await connect_many(proxy.port, count, READER_BUFFER_BYTES)
            asked = [next(numbers) for _ in readers]
            for raw, number in zip(readers, asked, strict=True):
                raw.transport.pause_reading()
                raw.write(post(request_body("stream", number)))
            reading = group.create_task(_read_slowly(readers))
            await engine.until(lambda: all(n in engine.got for n in asked), 20)
            await _full(engine, asked)
            under = await traffic.window(seconds)
            each_bytes = (proxy.rss_bytes() - before_bytes) / count
            sent = [engine.sent_bytes[n] for n in asked]
            reading.cancel()
        for raw in readers:
            raw.close()
        waiting = sum(size < STREAM_BYTES for size in sent)
        figures = (
            promise("streams that the engine began", f"{len(sent) - sent.count(0)}", f"{count}",
                    met=all(sent)),
            promise("  whose engine waits too", f"{waiting}", f">= {WAITING_SHARE_MIN:.0%}",
                    met=waiting >= count * WAITING_SHARE_MIN),
            Figure(what="  taken from it before, mean", value=kibibytes(sum(sent) / count)),
            at_most("memory for each", each_bytes, HIGH_WATER_BYTES, kibibytes),
            at_most("  its mark and one read", each_bytes, KEPT_BYTES_MAX, kibibytes,
                    promised=True),
            *others(base, under, READERS_P99_TIMES_MAX),
            *await whole(proxy),
        )  # fmt: skip
    return Finding(scenario="slow readers", figures=figures)


async def _full(engine: Engine, asked: list[int]) -> None:
    """Wait until every buffer on the way is as full as it gets."""
    before, limit_s = -1, time.monotonic() + GONE_LIMIT_S
    while (sent := sum(engine.sent_bytes[n] for n in asked)) > before * 1.01:
        before = sent
        await asyncio.sleep(SETTLE_S)
        if time.monotonic() > limit_s:
            return


async def _read_slowly(readers: list[Raw]) -> None:
    """Let each reader take what its small buffer holds, some kibibytes, in as many seconds."""
    for part in itertools.cycle(range(SLICES)):
        reading = [raw for raw in readers[part::SLICES] if not raw.transport.is_closing()]
        for raw in reading:
            raw.transport.resume_reading()
        await asyncio.sleep(0)  # one turn of the loop, one read
        for raw in reading:
            raw.transport.pause_reading()
        await asyncio.sleep(READER_BUFFER_BYTES / READ_BYTES_PER_S / SLICES)


# --- what every scenario asks ----------------------------------------------------------------


def others(base: Window, under: Window, times_max: float) -> tuple[Figure, ...]:
    """Say what the siege was to the good traffic."""
    failed = base.failed + under.failed
    return (
        promise("good requests failed", f"{failed} of {base.count + under.count}", "0",
                met=not failed and under.count > 0),
        ratio("good requests' p99", under.p99_s, base.p99_s, times_max),
    )  # fmt: skip


async def whole(proxy: Proxy) -> tuple[Figure, ...]:
    """Say whether the proxy has come through as it was: same worker, nothing held or complained."""
    left = await proxy.held()
    trouble = proxy.errors[:1] or ([] if proxy.same_worker else ["the worker died"])
    return (
        promise("held afterwards", left or "nothing", "nothing", met=not left),
        promise("complaints in the log", trouble[0] if trouble else "none", "none",
                met=not trouble),
    )  # fmt: skip
