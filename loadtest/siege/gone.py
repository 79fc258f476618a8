"""Clients that go away, in every state that a request can be in: the engine hears of it.

Time counts from the client's close to the engine's seeing that its connection has ended, or, where
the engine has none yet, to the proxy's giving up the attempt.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Callable, Iterator

import msgspec

from loadtest.measure import quantile
from loadtest.run import RunError
from loadtest.siege.engine import Engine, request_body
from loadtest.siege.findings import Figure, Finding, at_most, milliseconds, promise
from loadtest.siege.slow import READER_BUFFER_BYTES, whole
from loadtest.siege.target import Proxy
from loadtest.siege.traffic import HEAD, Raw, connect, numbers, post

SEEN_S_MAX = 0.1
LIMIT_S = 5.0  # then nobody has heard of it


class State(msgspec.Struct, frozen=True, kw_only=True):
    """How a request is brought into a state, and when it is there."""

    name: str
    mode: str
    there: Callable[[Raw, Engine, int], bool]
    ahead_bytes: int = -1  # of a second request, sent ahead; -1: none
    stalled: bool = False  # the client reads nothing


def _has_it(_raw: Raw, engine: Engine, number: int) -> bool:
    return number in engine.got


def _began(raw: Raw, _engine: Engine, _number: int) -> bool:
    return b"\r\n\r\n" in raw.received


STATES = (
    State(name="waiting for a whole answer", mode="hold", there=_has_it),
    State(name="waiting for the first event", mode="head", there=_began),
    State(name="within a stream", mode="drip", there=lambda raw, *_: b"data: " in raw.received),
    State(name="within a stream, reading nothing", mode="stream", there=_has_it, stalled=True),
    State(name="with another request queued", mode="hold", there=_has_it, ahead_bytes=0),
    State(name="with 100 KB queued", mode="hold", there=_has_it, ahead_bytes=100_000),
)
STALLED_AFTER_S = 0.03  # for the buffers to fill
SENT_AFTER_S = 0.003  # for what was sent to be read


async def clients_gone(*, quick: bool) -> Finding:
    """Go away by FIN and by RST, many times in each state."""
    tries = 3 if quick else 200
    figures: list[Figure] = []
    async with Engine() as engine, Proxy(engine.url) as proxy:
        for how in ("FIN", "RST"):
            figures += await _while_sending(engine, proxy, how, tries)
            for state in STATES:
                figures += await _in_state(state, engine, proxy, how, tries)
        figures += await whole(proxy)
    for how in ("FIN", "RST"):
        figures += await _while_connecting(how, tries)
    return Finding(scenario="clients gone", figures=tuple(figures))


async def _in_state(
    state: State, engine: Engine, proxy: Proxy, how: str, tries: int
) -> list[Figure]:
    seen_s: list[float] = []
    unseen = second_got = 0
    for _ in range(tries):
        number, second = next(numbers), next(numbers)
        raw = await connect(proxy.port, READER_BUFFER_BYTES if state.stalled else 0)
        if state.stalled:
            raw.transport.pause_reading()
        raw.write(post(request_body(state.mode, number)))
        if state.ahead_bytes >= 0:
            raw.write(post(request_body("answer", second, state.ahead_bytes)))
        await _there(state, raw, engine, number)
        left_s = time.monotonic()
        _go(raw, how, half=state.stalled or state.ahead_bytes > 0)
        if await engine.until(lambda: number in engine.gone_s, LIMIT_S):  # noqa: B023
            seen_s.append(engine.gone_s[number] - left_s)
        else:
            unseen += 1
        raw.close()
        second_got += second in engine.got
    return _figures(f"{state.name}, {how}", seen_s, unseen, second_got)


async def _there(state: State, raw: Raw, engine: Engine, number: int) -> None:
    def there() -> bool:
        return state.there(raw, engine, number)

    if state.there is _has_it:
        arrived = await engine.until(there, LIMIT_S)
    else:
        arrived = await raw.until(there, LIMIT_S)
    if not arrived:
        raise RunError(f"no request came to be {state.name}")
    await asyncio.sleep(STALLED_AFTER_S if state.stalled else SENT_AFTER_S)


def _go(raw: Raw, how: str, *, half: bool) -> None:
    """Leave. A close with octets unread would be a reset; then only the sending side is closed."""
    if how == "RST":
        raw.reset()
    elif half:
        raw.transport.write_eof()
    else:
        raw.close()


async def _while_sending(engine: Engine, proxy: Proxy, how: str, tries: int) -> list[Figure]:
    """Go within the body. An engine that has the beginning by then must hear of it."""
    seen_s: list[float] = []
    unseen = 0
    for _ in range(tries):
        number = next(numbers)
        body = request_body("answer", number, 300_000)
        connections = set(engine.connections)
        raw = await connect(proxy.port)
        raw.write(HEAD + b"content-length: %d\r\n\r\n%b" % (len(body), body[:200_000]))
        await asyncio.sleep(SENT_AFTER_S)
        left_s = time.monotonic()
        _go(raw, how, half=False)
        begun = engine.connections - connections
        if await engine.until(lambda: not begun & engine.connections, LIMIT_S):  # noqa: B023
            seen_s.append(time.monotonic() - left_s)
        else:
            unseen += 1
        unseen += number in engine.got
    return _figures(f"sending the body, {how}", seen_s, unseen, 0)


async def _while_connecting(how: str, tries: int) -> list[Figure]:
    """Go while the proxy's attempt to connect hangs before an engine whose queue is full.

    Such an engine sees nothing; that the attempt is given up is seen by the worker's descriptors.
    """
    seen_s: list[float] = []
    unseen = 0
    async with Engine() as engine, Proxy(engine.url) as proxy:
        port = engine.port
        await engine.close()
        with _deaf(port):
            idle = proxy.descriptors()
            for _ in range(tries):
                raw = await connect(proxy.port)
                raw.write(post(request_body("answer", next(numbers))))
                if await _descriptors(proxy, idle + 2) is None:  # the client's and the attempt's
                    raise RunError("no attempt to connect hangs")
                left_s = time.monotonic()
                _go(raw, how, half=False)
                given_up_s = await _descriptors(proxy, idle)
                if given_up_s is None:
                    unseen += 1
                else:
                    seen_s.append(given_up_s - left_s)
        figures = _figures(f"connecting, {how}", seen_s, unseen, 0)
        return [*figures, *await whole(proxy)]


@contextlib.contextmanager
def _deaf(port: int) -> Iterator[None]:
    """Listen on a port, with a queue that is full from the start."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        listener.listen(0)
        for _ in range(2):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(("127.0.0.1", port))
        yield


async def _descriptors(proxy: Proxy, count: int) -> float | None:
    """Wait until the worker has so many descriptors; return when that was so."""
    limit_s = time.monotonic() + LIMIT_S
    while proxy.descriptors() != count:
        if time.monotonic() > limit_s:
            return None
        await asyncio.sleep(0.0005)
    return time.monotonic()


def _figures(state: str, seen_s: list[float], unseen: int, late: int) -> list[Figure]:
    tries = len(seen_s) + unseen
    p50_s, p99_s = (quantile(seen_s, share) or 0.0 for share in (0.5, 0.99))
    figures = [
        promise(state, f"{tries - unseen} of {tries} heard", "all", met=not unseen),
        at_most("  p99", p99_s, SEEN_S_MAX, milliseconds),
        Figure(what="  p50", value=milliseconds(p50_s)),
    ]
    if late:
        figures.append(promise("  queued, and served", str(late), "0", met=False))
    return figures
