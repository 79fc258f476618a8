"""An engine that costs next to nothing: it answers at once, or streams numbered events at a pace.

What it streams can be checked by whoever reads it: events are numbered from 0, and `[DONE]` is the
last, so that one that is missing, doubled or foreign shows.
"""

from __future__ import annotations

import asyncio
import re
from typing import Self

import orjson

MODEL = "tiny"
EVENTS = 20  # of a stream
EVENT_PAUSE_S = 0.02
_WHOLE = orjson.dumps({"object": "chat.completion", "choices": [], "usage": {"prompt_tokens": 1}})
_STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
)


class TinyEngine:
    """Use as `async with TinyEngine() as engine`; it listens on a free port of 127.0.0.1."""

    def __init__(self) -> None:
        self.port = 0
        self.requests_total = 0
        self._server: asyncio.Server | None = None
        self._serving: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, backlog=1024)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for task in list(self._serving):
            task.cancel()
        await asyncio.gather(*self._serving, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._serving.add(task)
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = re.search(rb"(?i)\r\ncontent-length: (\d+)", head)
                body = await reader.readexactly(int(length[1])) if length else b""
                await self._answer(head, body, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        except asyncio.CancelledError:
            pass  # by the end of the run, and by nobody else
        finally:
            self._serving.discard(task)
            writer.close()

    async def _answer(self, head: bytes, body: bytes, writer: asyncio.StreamWriter) -> None:
        if head.startswith(b"GET "):
            listed = {"object": "list", "data": [{"id": MODEL, "object": "model"}]}
            _write_json(writer, orjson.dumps(listed))
        else:
            self.requests_total += 1
            if orjson.loads(body).get("stream"):
                await self._stream(writer)
                return
            _write_json(writer, _WHOLE)
        await writer.drain()

    async def _stream(self, writer: asyncio.StreamWriter) -> None:
        writer.write(_STREAM_HEAD)
        for number in range(EVENTS):
            writer.write(_chunk(event(number)))
            await writer.drain()
            await asyncio.sleep(EVENT_PAUSE_S)
        writer.write(_chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")
        await writer.drain()


def event(number: int) -> bytes:
    """Return event `number` of a stream."""
    return b'data: {"choices":[{"delta":{"content":"%d "}}]}\n\n' % number


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def _write_json(writer: asyncio.StreamWriter, body: bytes) -> None:
    head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    writer.write(head % len(body) + body)
