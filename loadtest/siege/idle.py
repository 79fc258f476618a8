"""Engines that close idle connections whenever they like: no client may notice.

A request that meets the close is lost. Sent again it may be computed twice, so it counts here how
often each request was delivered: exactly once.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import Callable

from loadtest.client import RequestError
from loadtest.siege.engine import Engine, request_body
from loadtest.siege.findings import Figure, Finding, promise
from loadtest.siege.slow import whole
from loadtest.siege.target import Proxy, client_of
from loadtest.siege.traffic import PATH, numbers

CLIENTS = 16
ENGINES_AT_ONCE = 8  # each with a pool of its own, so that its connections are idle for a while
IDLE_S_MAX = 0.05
REQUESTS_A_CONNECTION = 7

_draw = random.Random(1)


def _random_idle(_served: int) -> float:
    return _draw.uniform(0.0005, IDLE_S_MAX)


def _after_some(served: int) -> float | None:
    return 0.0 if served == REQUESTS_A_CONNECTION else None


def _at_once(_served: int) -> float:
    return 0.0


ENGINES: tuple[tuple[str, Callable[[int], float | None]], ...] = (
    ("idle for 0 to 50 ms", _random_idle),
    (f"after {REQUESTS_A_CONNECTION} requests", _after_some),
    ("after each answer", _at_once),
)


async def keep_alive_races(*, quick: bool) -> Finding:
    """Requests whose pauses are like those after which the engine closes.

    The quick way lets each engine close an idle connection once before: that a request is the first
    to meet such a close, as a reset, is rare, but nothing for a promise.
    """
    count = 160 if quick else 20_000
    figures: list[Figure] = []
    for name, idle_s in ENGINES:
        async with contextlib.AsyncExitStack() as stack:
            engines = [await stack.enter_async_context(Engine()) for _ in range(ENGINES_AT_ONCE)]
            for engine in engines:
                engine.idle_s = idle_s
            urls = [engine.url for engine in engines]
            proxy = await stack.enter_async_context(Proxy(*urls, flags=("--policy", "round_robin")))
            if quick:
                await _lessons(proxy)
            figures += await _race(name, engines, proxy, count)
            figures += await whole(proxy)
    return Finding(scenario="keep-alive races", figures=tuple(figures))


async def _lessons(proxy: Proxy) -> None:
    client = client_of(proxy.port)
    answers = [
        client.post(PATH, request_body("answer", next(numbers))) for _ in range(ENGINES_AT_ONCE)
    ]
    await asyncio.gather(*answers)
    await asyncio.sleep(2 * IDLE_S_MAX)
    client.close()


async def _race(name: str, engines: list[Engine], proxy: Proxy, count: int) -> list[Figure]:
    asked = [next(numbers) for _ in range(count)]
    left = iter(asked)
    outcomes: Counter[str] = Counter()

    async def ask() -> None:
        client = client_of(proxy.port)
        for number in left:
            await asyncio.sleep(_draw.uniform(0.0, IDLE_S_MAX))
            try:
                answer = await client.post(PATH, request_body("answer", number))
            except RequestError as error:
                outcomes[error.kind] += 1
                continue
            own = answer.body == b'{"number":%d}' % number
            outcomes["ok" if answer.status == 200 and own else str(answer.status)] += 1
        client.close()

    await asyncio.gather(*(ask() for _ in range(CLIENTS)))
    failed = count - outcomes["ok"]
    got = sum((engine.got for engine in engines), Counter[int]())
    twice = sum(got[number] > 1 for number in asked)
    again = (await proxy.metrics()).get('retries_total{reason="closed_idle"}', 0)
    detail = {kind: n for kind, n in outcomes.items() if kind != "ok"}
    return [
        promise(f"closed {name}: failed", f"{failed} of {count:,} {detail or ''}".strip(), "0",
                met=not failed),
        promise("  delivered twice", str(twice), "0", met=not twice),
        Figure(what="  connections made", value=f"{sum(e.connections_total for e in engines):,}"),
        Figure(what="  met the close, sent once more", value=f"{again:g}"),
    ]  # fmt: skip
