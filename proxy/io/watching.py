"""Those who watch the view: a stream of server-sent events to each, of the newest and no other.

A view is whole, so a watcher that is slow skips what it missed: never more is kept for one than the
view that it is being sent. One that takes nothing for `STUCK_S` is let go, and there are at most
`WATCHERS_MAX`, so that forgotten pages cannot fill the listener that operators need in a bad night.

Over a slow line a view of hundreds of replicas is too much a second, so it is compressed for those
who take gzip: each view once for all of them, as a run of deflate blocks that refers to nothing
before it (`Z_FULL_FLUSH`). Such runs one after another are one deflate stream (RFC 1951 §2.3),
wherever somebody came in; before them goes a gzip head, and after them, where a stream ends in
order, the foot with the check sum of what this watcher was sent (RFC 1952 §2.3).
"""

from __future__ import annotations

import asyncio
import struct
import zlib
from typing import Final

from aiohttp import web

from proxy.io.viewing import Viewing

WATCHERS_MAX: Final = 32
HEARTBEAT_S: Final = 5.0  # a comment, when there was no view for so long
STUCK_S: Final = 20.0
_BEGIN: Final = b"retry: 1000\n\n"  # milliseconds before a browser connects again
_HEARTBEAT: Final = b": nothing new\n\n"
_GZIP_HEAD: Final = b"\x1f\x8b\x08\0\0\0\0\0\0\xff"
_LAST_BLOCK: Final = b"\x03\x00"
_FIELDS: Final = {
    "Content-Type": "text/event-stream",
    "Cache-Control": "no-store",
    "Vary": "Accept-Encoding",
    "X-Accel-Buffering": "no",  # nginx would keep events back
}


def packed(octets: bytes) -> bytes:
    """Return a run of deflate blocks that stands alone. The fastest level: a view shrinks to a
    seventh by it, and to a tenth by the slowest.
    """
    packer = zlib.compressobj(1, zlib.DEFLATED, -zlib.MAX_WBITS)
    return packer.compress(octets) + packer.flush(zlib.Z_FULL_FLUSH)


class Watchers:
    """All of them."""

    def __init__(self, viewing: Viewing) -> None:
        self._viewing = viewing
        self._packed_number = -1
        self._packed = b""  # the event of the view of that number

    @property
    def full(self) -> bool:
        return self._viewing.watchers >= WATCHERS_MAX

    async def answer(self, request: web.Request) -> web.StreamResponse:
        """Serve one until it goes or the listener ends."""
        gzip = takes_gzip(request.headers.get("Accept-Encoding", ""))
        stream = web.StreamResponse(headers=_FIELDS)
        if gzip:
            stream.headers["Content-Encoding"] = "gzip"
        self._viewing.watchers += 1
        try:
            await stream.prepare(request)
            await self._tell(_Packed(stream) if gzip else _Plain(stream))
        except (ConnectionError, TimeoutError):
            if request.transport is not None:  # what it did not take is not to be waited for
                request.transport.abort()
        finally:
            self._viewing.watchers -= 1
        return stream

    async def _tell(self, watcher: _Plain | _Packed) -> None:
        viewing = self._viewing
        await watcher.write(_BEGIN, packed(_BEGIN))
        body, number = await viewing.newest(), viewing.number
        while not viewing.closed:
            event = b"event: view\ndata: %b\n\n" % body
            await watcher.write(event, self._pack(event, number) if watcher.packs else b"")
            while not await viewing.newer(number, HEARTBEAT_S) and not viewing.closed:
                await watcher.write(_HEARTBEAT, packed(_HEARTBEAT))
            body, number = viewing.body, viewing.number
        await watcher.end()

    def _pack(self, event: bytes, number: int) -> bytes:
        if self._packed_number != number:
            self._packed, self._packed_number = packed(event), number
        return self._packed


class _Plain:
    """One that is sent events as they are."""

    packs = False

    def __init__(self, stream: web.StreamResponse) -> None:
        self._stream = stream

    async def write(self, octets: bytes, _packed: bytes) -> None:
        async with asyncio.timeout(STUCK_S):
            await self._stream.write(octets)

    async def end(self) -> None:
        """Nothing more comes."""


class _Packed:
    """One that is sent them compressed."""

    packs = True

    def __init__(self, stream: web.StreamResponse) -> None:
        self._stream = stream
        self._head = _GZIP_HEAD
        self._sum = self._octets = 0

    async def write(self, octets: bytes, packed: bytes) -> None:
        self._sum = zlib.crc32(octets, self._sum)
        self._octets += len(octets)
        head, self._head = self._head, b""
        async with asyncio.timeout(STUCK_S):
            await self._stream.write(head + packed)

    async def end(self) -> None:
        """Nothing more comes."""
        foot = struct.pack("<II", self._sum, self._octets & 0xFFFFFFFF)
        async with asyncio.timeout(STUCK_S):
            await self._stream.write(_LAST_BLOCK + foot)


def takes_gzip(accepted: str) -> bool:
    """Whether a client has said that it takes gzip (RFC 9110 §12.5.3)."""
    for one in accepted.lower().split(","):
        name, _, weight = one.partition(";")
        if name.strip() in ("gzip", "x-gzip"):
            return weight.replace(" ", "") not in ("q=0", "q=0.0", "q=0.00", "q=0.000")
    return False
