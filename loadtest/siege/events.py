"""Streams are passed on as they come: the first event does not wait for the second."""

from __future__ import annotations

import time

from loadtest.siege.engine import PAUSE_S, Engine, request_body
from loadtest.siege.findings import Figure, Finding, milliseconds, promise
from loadtest.siege.slow import whole
from loadtest.siege.target import Proxy
from loadtest.siege.traffic import connect, numbers, post

AHEAD_S_MIN = 0.35


async def first_event(*, quick: bool) -> Finding:
    """Ask for streams of two events, the second of which is late; time both."""
    tries = 2 if quick else 20
    ahead_s = []
    async with Engine() as engine, Proxy(engine.url) as proxy:
        for _ in range(tries):
            number = next(numbers)
            raw = await connect(proxy.port)
            raw.write(post(request_body("pause", number)))
            await raw.until(lambda: raw.received.count(b"data: ") == 1, 5.0)  # noqa: B023
            first_s = time.monotonic()
            await raw.until(lambda: raw.received.count(b"data: ") == 2, 5.0)  # noqa: B023
            ahead_s.append(time.monotonic() - first_s)
            raw.close()
        figures = (
            promise("first event held back", "no" if min(ahead_s) > PAUSE_S / 4 else "yes", "no",
                    met=min(ahead_s) > PAUSE_S / 4),
            Figure(what="first event ahead of the second, least", value=milliseconds(min(ahead_s)),
                   gate=f">= {milliseconds(AHEAD_S_MIN)}", met=min(ahead_s) >= AHEAD_S_MIN),
            *await whole(proxy),
        )  # fmt: skip
    return Finding(scenario="first event", figures=figures)
