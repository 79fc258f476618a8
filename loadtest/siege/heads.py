"""Heads that are too much: long, many, or in tiny pieces. Refused cheaply, whatever comes after."""

from __future__ import annotations

import asyncio
import time

from loadtest.siege.engine import Engine
from loadtest.siege.findings import Figure, Finding, milliseconds, promise, timing
from loadtest.siege.slow import whole
from loadtest.siege.target import Proxy
from loadtest.siege.traffic import HEAD, connect

PIECE_BYTES = 64
CPU_S_MAX = 0.020
ANSWER_LIMIT_S = 10.0

MANY = b"".join(b"x-%d: y\r\n" % n for n in range(10_000))
TARGET = b"POST /v1/" + b"x" * 100_000 + b" HTTP/1.1\r\nhost: siege\r\n\r\n"
# name, octets, how many of them at a time, the status that is due
FLOODS = (
    ("1 MiB value in 64-octet pieces", HEAD + b"x-long: " + b"x" * (1 << 20), PIECE_BYTES, 431),
    ("10,000 fields", HEAD + MANY + b"\r\n", 0, 431),
    ("100 KB target", TARGET, 0, 414),
    ("300 KB value", HEAD + b"x-long: " + b"x" * 300_000 + b"\r\n\r\n", 0, 431),
)


async def head_flood(*, quick: bool) -> Finding:
    """Judge each flood by its status and the processor time that it cost the worker."""
    tries = 2 if quick else 20
    figures: list[Figure] = []
    async with Engine() as engine, Proxy(engine.url) as proxy:
        for name, octets, piece_bytes, due in FLOODS:
            statuses, spent_s = set(), []
            for _ in range(tries):
                before_s = proxy.cpu_s()
                statuses.add(await _flood(proxy.port, octets, piece_bytes))
                await asyncio.sleep(0.05)
                spent_s.append(proxy.cpu_s() - before_s)
            said = ", ".join(map(str, sorted(statuses)))
            figures += [
                promise(name, said, str(due), met=statuses == {due}),
                timing("  processor time, worst", max(spent_s), CPU_S_MAX),
                Figure(
                    what="  processor time, median", value=milliseconds(sorted(spent_s)[tries // 2])
                ),
            ]
        taken = sum(engine.got.values())
        figures.append(promise("reached the engine", str(taken), "0", met=not taken))
        figures += await whole(proxy)
    return Finding(scenario="head flood", figures=tuple(figures))


async def _flood(port: int, octets: bytes, piece_bytes: int) -> int:
    """Send it all, whatever the proxy says meanwhile; return the status that it said."""
    raw = await connect(port)
    if piece_bytes:
        for begin in range(0, len(octets), piece_bytes):
            raw.write(octets[begin : begin + piece_bytes])
            await asyncio.sleep(0)  # written at the end of the turn, so pieces stay pieces
    else:
        raw.write(octets)
    begin_s = time.monotonic()
    await raw.until(lambda: raw.status > 0 or raw.ended_s > 0, ANSWER_LIMIT_S)
    await raw.until(lambda: raw.ended_s > 0, ANSWER_LIMIT_S - (time.monotonic() - begin_s))
    raw.close()
    return raw.status
