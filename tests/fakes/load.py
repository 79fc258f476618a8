"""A steady load of streaming requests, and for each one what became of it, as its client saw it.

Every request has a connection of its own and a prompt of its own, and the answer is judged octet by
octet, not by a forgiving client: an HTTP message that is whole and yet lacks the stream's `[DONE]`
is the failure that nobody would notice, and is told apart from those that everybody sees.
"""

from __future__ import annotations

import asyncio
import enum
import itertools
import json
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from types import TracebackType
from typing import Self

import msgspec

POLL_S = 0.02
WAIT_S = 40.0
PAUSE_S = 0.02  # after a request that did not end well, so that a closed port is not hammered
LIMIT_BYTES = 1 << 20


class Outcome(enum.Enum):
    """What a client can say of its request."""

    COMPLETE = "complete"
    CUT_VISIBLY = "cut visibly"  # an error event, or the connection ended inside the answer
    CUT_SILENTLY = "cut silently"  # a whole HTTP message without `[DONE]` and without an error
    REFUSED = "refused"  # no connection
    UNANSWERED = "unanswered"  # a connection that ended before the first octet of an answer
    ERROR = "error"  # an HTTP status of an error


class Record(msgspec.Struct):
    """One request. Times are monotonic; 0 is never."""

    begun_s: float
    outcome: Outcome | None = None  # None: under way
    head_s: float = 0.0
    ended_s: float = 0.0
    client_port: int = 0
    replica: str = ""
    status: int = 0
    code: str = ""  # of the error, in the body or in the stream
    message: str = ""
    tokens: int = 0


class Load:
    """As many clients as asked for, each with one request after the other.

    Use as `async with Load(url, clients=8) as load`; leaving waits for what is under way.
    """

    def __init__(
        self, url: str, *, clients: int, max_tokens: int = 30, model: str = "demo"
    ) -> None:
        host, _, port = url.removeprefix("http://").partition(":")
        self._address = (host, int(port))
        self._clients = clients
        self._max_tokens = max_tokens
        self._model = model
        self._numbers = itertools.count()
        self._stopping = False
        self._tasks: list[asyncio.Task[None]] = []
        self.records: list[Record] = []

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(self._client()) for _ in range(self._clients)]
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stopping = True
        if error is not None:
            for task in self._tasks:
                task.cancel()
        ends = await asyncio.gather(*self._tasks, return_exceptions=True)
        if error is None:
            for end in ends:
                if end is not None:
                    raise end

    async def stop(self) -> None:
        """Begin nothing more; return when all has ended."""
        self._stopping = True
        await asyncio.gather(*self._tasks)

    async def until(self, claim: Callable[[], bool], what: str) -> None:
        """Let the load go on until `claim` holds."""
        end_s = time.monotonic() + WAIT_S
        while not claim():
            for task in self._tasks:
                if task.done() and not self._stopping:
                    task.result()
            assert time.monotonic() < end_s, f"in vain: {what}; {self.summary()}"
            await asyncio.sleep(POLL_S)

    async def until_more(self, count: int) -> None:
        """Let `count` more requests begin and complete."""
        since_s = time.monotonic()
        await self.until(
            lambda: len(self.having(Outcome.COMPLETE, since_s=since_s)) >= count,
            f"{count} more complete",
        )

    async def until_streaming(self, count: int) -> None:
        """Wait until so many answers have begun and not ended."""
        await self.until(lambda: len(self.streaming()) >= count, f"{count} streams")

    def having(self, *outcomes: Outcome, since_s: float = 0.0) -> list[Record]:
        """Return the requests that ended so and began at `since_s` or later."""
        return [r for r in self.records if r.outcome in outcomes and r.begun_s >= since_s]

    def failed(self) -> list[Record]:
        """Return what ended, and not well."""
        return [r for r in self.records if r.outcome not in (None, Outcome.COMPLETE)]

    def streaming(self) -> list[Record]:
        """Return the requests whose answer is on its way."""
        return [r for r in self.records if r.outcome is None and r.head_s]

    def summary(self) -> str:
        """Return the outcomes, counted, and the failures in words."""
        kinds = [str(r.outcome and r.outcome.value) for r in self.records]
        counts = {kind: kinds.count(kind) for kind in sorted(set(kinds))}
        return f"{counts} {self.failed()[:10]}"

    async def _client(self) -> None:
        while not self._stopping:
            record = Record(time.monotonic())
            self.records.append(record)
            record.outcome = await self._ask(record, next(self._numbers))
            record.ended_s = time.monotonic()
            if record.outcome is not Outcome.COMPLETE:
                await asyncio.sleep(PAUSE_S)

    async def _ask(self, record: Record, number: int) -> Outcome:
        try:
            reader, writer = await asyncio.open_connection(*self._address, limit=LIMIT_BYTES)
        except OSError:
            return Outcome.REFUSED
        try:
            record.client_port = writer.get_extra_info("sockname")[1]
            writer.write(self._request(number))
            return await _read_answer(reader, record)
        except (OSError, EOFError):
            return Outcome.CUT_VISIBLY if record.head_s else Outcome.UNANSWERED
        finally:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()

    def _request(self, number: int) -> bytes:
        body = json.dumps(
            {
                "model": self._model,
                "messages": [{"role": "user", "content": f"{number} is the number of this."}],
                "stream": True,
                "max_tokens": self._max_tokens,
            }
        ).encode()
        head = (
            "POST /v1/chat/completions HTTP/1.1",
            f"Host: {self._address[0]}:{self._address[1]}",
            "Content-Type: application/json",
            f"Content-Length: {len(body)}",
            "",
            "",
        )
        return "\r\n".join(head).encode() + body


async def _read_answer(reader: asyncio.StreamReader, record: Record) -> Outcome:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("ascii").split("\r\n")
    record.head_s = time.monotonic()
    fields = dict(line.lower().split(": ", 1) for line in head[1:] if line)
    record.status = int(head[0].split()[1])
    record.replica = fields.get("x-doherty-replica", "")
    if record.status != 200:
        error = json.loads(await reader.readexactly(int(fields["content-length"])))["error"]
        record.code, record.message = error["code"], error["message"]
        return Outcome.ERROR
    assert fields["transfer-encoding"] == "chunked", fields
    return await _read_events(reader, record)


async def _read_events(reader: asyncio.StreamReader, record: Record) -> Outcome:
    """Read chunks to the end of the message; events are judged as soon as they are whole.

    EOF inside is an `IncompleteReadError`; what was seen of an error before it is remembered.
    """
    text, done = b"", False
    while True:
        size = int((await reader.readuntil(b"\r\n")).strip(), 16)
        data = await reader.readexactly(size + 2)
        assert data.endswith(b"\r\n")
        if not size:
            break
        *events, text = (text + data[:-2]).split(b"\n\n")
        done = _take_events(events, record) or done
    if record.code:
        return Outcome.CUT_VISIBLY
    return Outcome.COMPLETE if done and not text else Outcome.CUT_SILENTLY


def _take_events(events: Iterable[bytes], record: Record) -> bool:
    """Count tokens, note an error; say whether the end was among them."""
    done = False
    for event in events:
        payload = event.removeprefix(b"data: ")
        if payload == b"[DONE]":
            done = True
        elif payload:
            value = json.loads(payload)
            if "error" in value:
                record.code, record.message = value["error"]["code"], value["error"]["message"]
            else:
                record.tokens += sum(bool(c["delta"].get("content")) for c in value["choices"])
    return done
