"""Requests under way: so many at a time, each with a script of its own, drawn from the seed."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import get_args

import msgspec

from loadtest.scripts import MODEL, Framing, Script
from loadtest.storm.caller import Caller, Ending, call
from loadtest.storm.ledger import Seen, TokenReader

# Longer than any answer with every stall that the weather has.
ANSWER_TIMEOUT_S = 60.0
REFUSED_PAUSE_S = 0.05
# Of the requests, those that open a connection although they have one. The kernel deals connections
# out to the workers, so this is what brings both into play.
NEW_CONNECTION_SHARE = 0.2

FRAMINGS: tuple[Framing, ...] = get_args(Framing)
OnBegin = Callable[[int], None]


def draw_script(seed: int, number: int, pace: float = 1.0) -> tuple[Script, bytes]:
    """Return what one request asks for, and its body. At a pace of 2 it comes twice as fast."""
    draw = random.Random(f"{seed}:{number}")
    token = f"t{number:06d}"
    body = request_body(token, draw.choice((300, 1_000, 4_000, 20_000)), draw)
    stream = draw.random() < 0.85
    # A body that only a close ends is left to streams: their `[DONE]` shows that it came whole.
    # Of a JSON text that was cut, RFC 9112 §8 gives a reader no sign.
    weights = (70, 15, 15) if stream else (30, 70, 0)
    script = Script(
        token=token,
        events=draw.randint(5, 40),
        stream=stream,
        framing=draw.choices(FRAMINGS, weights)[0],
        first_ms=round(draw.choice((0.0, draw.uniform(1, 300))) / pace, 1),
        pause_ms=round(draw.uniform(10, 60) / pace, 1),
        pad=draw.choice((0, 0, 60, 3_000)),
        chunk=draw.choice((0, 0, 37, 1_000)),
        crc=zlib.crc32(body),
    )
    return script, body


def request_body(token: str, size: int, draw: random.Random) -> bytes:
    """Return a chat request whose prompt nobody else has."""
    words = f"{token} {draw.getrandbits(64):x} "
    prompt = (words * (size // len(words) + 1))[:size]
    return (
        f'{{"model":"{MODEL}","stream":true,"messages":[{{"role":"user","content":"{prompt}"}}]}}'
    ).encode()


def render(port: int, script: str, body: bytes) -> bytes:
    """Return the octets of a request."""
    return (
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\n"
        f"content-type: application/json\r\nx-doherty-explain: 1\r\nx-script: {script}\r\n"
        f"content-length: {len(body)}\r\n\r\n"
    ).encode() + body


def script_text(script: Script) -> str:
    return msgspec.json.encode(script).decode()


class Witness:
    """Streams straight from the engines, beside the load, that meet the same faults.

    How late their ends are seen is what the machine and this client take, without a proxy.
    """

    def __init__(self, engine_ports: Sequence[int], pace: float) -> None:
        self.seen: list[Seen] = []
        self._ports = engine_ports
        self._pace = pace
        self._ended = False

    async def run(self, streams_each: int) -> None:
        """Have so many under way with each engine until told to end."""
        async with asyncio.TaskGroup() as group:
            for port, place in itertools.product(self._ports, range(streams_each)):
                group.create_task(self._follow(port, place))

    async def _follow(self, port: int, place: int) -> None:
        for number in itertools.count():
            if self._ended:
                return
            token = f"w{port}-{place}-{number}"
            script = Script(token=token, events=40, pause_ms=35 / self._pace)
            seen = Seen(script=script, reader=TokenReader(script), begun_s=time.monotonic())
            seen.engine = f"127.0.0.1:{port}"
            request = render(port, script_text(script), b"{}")
            try:
                caller = await call(port)
            except OSError:  # it is being started again
                await asyncio.sleep(REFUSED_PAUSE_S)
                continue
            self.seen.append(seen)
            seen.ending = await caller.ask(request, seen.reader, ANSWER_TIMEOUT_S)
            seen.ended_s = caller.ended_s
            caller.close()

    def end(self) -> None:
        """Begin no more."""
        self._ended = True


class Load:
    """Sends scripted requests and keeps what came back."""

    def __init__(self, port: int, scripts: Sequence[tuple[Script, bytes]], seed: int) -> None:
        self.seen: list[Seen] = []
        self.unasked_bytes = 0  # octets that came on connections with no request under way
        self._port = port
        self._scripts = iter(enumerate(scripts))
        self._draw = random.Random(seed)

    async def run(self, concurrency: int, on_begin: OnBegin | None = None) -> None:
        """Have so many under way until all have ended."""
        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(self._caller(self._scripts, on_begin))

    async def _caller(
        self, scripts: Iterator[tuple[int, tuple[Script, bytes]]], on_begin: OnBegin | None
    ) -> None:
        caller: Caller | None = None
        for number, (script, body) in scripts:
            if on_begin is not None:
                on_begin(number)
            if caller is None or not caller.usable or self._draw.random() < NEW_CONNECTION_SHARE:
                self._leave(caller)
                caller = await call(self._port)
            await self._ask(caller, script, body)
        self._leave(caller)

    async def _ask(self, caller: Caller, script: Script, body: bytes) -> None:
        reader = TokenReader(script)
        seen = Seen(script=script, reader=reader, begun_s=time.monotonic())
        self.seen.append(seen)
        request = render(self._port, script_text(script), body)
        seen.ending = await caller.ask(request, reader, ANSWER_TIMEOUT_S)
        seen.ended_s = caller.ended_s
        if seen.ending is Ending.WHOLE and not reader.keep_alive:
            caller.close()

    def _leave(self, caller: Caller | None) -> None:
        if caller is not None:
            self.unasked_bytes += caller.unasked_bytes
            caller.close()
