"""A client's connection that says how each answer ended, and when.

`loadtest.client` answers whether a whole answer came. Here the manner matters: an end that the
framing announces, a close within the answer, and a reset are three different things to a reader,
and only the first is a whole answer. The moment is taken where the octets arrive.
"""

from __future__ import annotations

import asyncio
import enum
import socket
import time
from typing import TYPE_CHECKING, cast

from loadtest.scripts import RESET
from loadtest.wire import AnswerReader, WireError

if TYPE_CHECKING:
    from typing_extensions import override
else:

    def override(method):  # typing.override is Python 3.12's
        return method


class Ending(enum.Enum):
    """How an answer ended."""

    WHOLE = "whole"  # HTTP says that this is all
    CLOSED = "closed"  # within the answer, or before it
    RESET = "reset"
    GARBLED = "garbled"  # not HTTP, or octets after the end
    NEVER = "never"  # not within the time allowed
    LEFT = "left"  # we went away


class Caller(asyncio.Protocol):
    """One connection; one exchange at a time."""

    def __init__(self) -> None:
        self.ended_s = 0.0
        self.unasked_bytes = 0  # that came while no answer was due
        self._transport: asyncio.Transport | None = None
        self._reader: AnswerReader | None = None
        self._waiter: asyncio.Future[Ending] | None = None
        self._gone = Ending.CLOSED

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    @override
    def data_received(self, data: bytes) -> None:
        reader = self._reader
        if reader is None:
            self.unasked_bytes += len(data)
            self.close()
            return
        try:
            if reader.feed(data, time.monotonic()):
                self._end(Ending.WHOLE)
        except WireError:
            self._end(Ending.GARBLED)
            self.close()

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if exc is not None:
            self._gone = Ending.RESET
        if self._reader is not None:
            # RFC 9112 §8: a close ends a body that nothing else frames; a reset never does.
            whole = exc is None and self._reader.feed_end()
            self._end(Ending.WHOLE if whole else self._gone)

    @property
    def usable(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    async def ask(self, request: bytes, reader: AnswerReader, timeout_s: float) -> Ending:
        """Send a request and read its answer into `reader`, to whatever end."""
        self.send(request, reader)
        return await self.ended(timeout_s)

    def send(self, octets: bytes, reader: AnswerReader | None = None) -> None:
        """Send octets of a request; with the first of them comes the reader of its answer."""
        if reader is not None:
            assert self._reader is None
            self._reader = reader
            self._waiter = asyncio.get_running_loop().create_future()
        if self._transport is None:
            self._end(self._gone)
        else:
            self._transport.write(octets)

    async def ended(self, timeout_s: float) -> Ending:
        """Wait for the end of the answer."""
        assert self._waiter is not None
        timer = asyncio.get_running_loop().call_later(timeout_s, self._end, Ending.NEVER)
        try:
            ending = await self._waiter
        finally:
            timer.cancel()
        if ending is not Ending.WHOLE:
            self.close()
        return ending

    def _end(self, ending: Ending) -> None:
        self.ended_s = time.monotonic()
        self._reader = None
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(ending)

    def close(self, *, reset: bool = False) -> None:
        """Go away, whatever is under way."""
        if self._reader is not None:
            self._end(Ending.LEFT)
        if self._transport is None:
            return
        if reset:
            connected = self._transport.get_extra_info("socket")
            connected.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        self._transport.abort()


async def call(port: int) -> Caller:
    """Open a connection. Raises `OSError`."""
    loop = asyncio.get_running_loop()
    _, caller = await loop.create_connection(Caller, "127.0.0.1", port)
    return caller
