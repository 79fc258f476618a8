"""One connection between two proxies: hellos and proofs, then sealed frames in both directions."""

from __future__ import annotations

import asyncio
import ipaddress
import os
import time
from collections import deque
from collections.abc import Collection

from proxy.contract.regions import SUMMARY_BYTES_MAX
from proxy.core import claim_limits, limits, peer_wire
from proxy.core.peer_wire import Frame, Hello, WireError


class PeerLink:
    """Our end. What is sent is queued and never waited for; `waiting_bytes` says how much waits."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, name: str, place: str
    ) -> None:
        """`name` is for logs: where it comes from or goes to. `place` is what stays of it when the
        other side comes again."""
        self.name = name
        self.place = place
        self.region = ""
        self.expected = ""  # the region that it should be of; empty: any that may link to us
        self.peer_id = b""
        self.dialled_by = b""
        self.ended = asyncio.Event()
        self.failure: str | None = None  # why we ended it
        self.heard_s = time.monotonic()
        self.delay_s = 0.0  # of what the other side says, about
        self._round_trips_s: deque[float] = deque(maxlen=claim_limits.ROUND_TRIPS_MAX)
        self._bytes_max = limits.PEER_FRAME_BYTES_MAX
        self._has_ended_writing = False
        self._reader = reader
        self._writer = writer
        self._outward = self._inward = peer_wire.Seal(b"")

    async def shake_hands(
        self,
        *,
        region: str,
        proxy_id: bytes,
        key: str | None,
        dialled: bool,
        others: Collection[str] = (),
    ) -> Hello:
        """Find out who is there, and show who we are. Raises `WireError`.

        `others` are the regions besides ours that may link to us: with the key, or from this
        machine.
        """
        try:
            async with asyncio.timeout(limits.PEER_HANDSHAKE_TIMEOUT_S):
                ours = peer_wire.make_hello(
                    region, proxy_id, os.urandom(peer_wire.NONCE_BYTES), key
                )
                self._write(ours)
                theirs = await self._read(limits.PEER_HELLO_BYTES_MAX)
                hello = peer_wire.read_hello(theirs, region, key, others)
                if hello.region != region and key is None and not self.near:
                    raise WireError("proxies of two regions link only with a peer_key")
                both = peer_wire.Link(key, ours, theirs, dialled=dialled)
                self._write(both.proof)
                both.check(await self._read(limits.PEER_HELLO_BYTES_MAX))
        except TimeoutError as error:
            raise WireError("it does not answer") from error
        self._outward, self._inward = both.outward, both.inward
        self.peer_id = hello.proxy_id
        self.region = hello.region
        if hello.region != region:
            self._bytes_max = SUMMARY_BYTES_MAX
        self.dialled_by = proxy_id if dialled else hello.proxy_id
        self.heard_s = time.monotonic()
        return hello

    async def receive(self) -> Frame:
        """Return the next frame for others; beats are answered here. Raises `WireError`."""
        while True:
            octets = await self._read(self._bytes_max + peer_wire.TAG_BYTES)
            frame = peer_wire.read_frame(self._inward.open(octets))
            self.heard_s = time.monotonic()
            if frame.kind == peer_wire.BEAT:
                self.send(peer_wire.write_beat(peer_wire.ECHO, frame.figure))
            elif frame.kind == peer_wire.ECHO:
                there_and_back_s = self.heard_s - frame.figure
                if 0.0 <= there_and_back_s <= limits.PEER_SILENCE_S:
                    self.delay_s = there_and_back_s / 2
                    self._round_trips_s.append(there_and_back_s)
            else:
                return frame

    def beat(self) -> None:
        """Be heard; end it when the other side is not."""
        now_s = time.monotonic()
        if now_s - self.heard_s > limits.PEER_SILENCE_S:
            self.fail("it is silent")
        self.send(peer_wire.write_beat(peer_wire.BEAT, now_s))

    @property
    def round_trip_s(self) -> float:
        """Return the least of the last: that is the path's, and the rest of others is a queue's."""
        return min(self._round_trips_s, default=0.0)

    @property
    def near(self) -> bool:
        """Whether the other end is on this machine."""
        name = self._writer.get_extra_info("peername")
        if not isinstance(name, tuple):
            return True  # a unix socket's has no address
        return ipaddress.ip_address(name[0].partition("%")[0]).is_loopback

    @property
    def waiting_bytes(self) -> int:
        return self._writer.transport.get_write_buffer_size()

    def send(self, frame: bytes) -> None:
        if not (self._has_ended_writing or self._writer.is_closing()):
            self._writer.write(self._outward.close(frame))

    def end_writing(self) -> None:
        """Say no more, and go on reading: the other side ends it once it has read everything. One
        that is closed at once may be lost with what the other has not read, as soon as that one
        writes (shutdown(2), send(2): EPIPE)."""
        if not (self._has_ended_writing or self._writer.is_closing()):
            self._has_ended_writing = True
            self._writer.write_eof()

    def fail(self, reason: str) -> None:
        self.failure = self.failure or reason
        self._writer.transport.abort()

    def close(self) -> None:
        self._writer.close()

    def _write(self, octets: bytes) -> None:
        self._writer.write(peer_wire.LENGTH.pack(len(octets)) + octets)

    async def _read(self, bytes_max: int) -> bytes:
        try:
            (size,) = peer_wire.LENGTH.unpack(await self._reader.readexactly(4))
            if size > bytes_max:
                raise WireError(f"a frame of {size} octets")
            return await self._reader.readexactly(size)
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            raise LinkLostError(self.failure or "the connection has ended") from error


class LinkLostError(Exception):
    """The connection has ended; nobody has said anything wrong."""


async def connect(address: str, timeout_s: float) -> PeerLink:
    """Dial a peer. Raises `OSError`."""
    host, port = peer_wire.parse_address(address)
    async with asyncio.timeout(timeout_s):
        if port < 0:
            path = host.removeprefix(peer_wire.UNIX)
            reader, writer = await asyncio.open_unix_connection(path)
        else:
            reader, writer = await asyncio.open_connection(host, port)
    return PeerLink(reader, writer, address, address)


def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> PeerLink:
    """Take a connection that somebody has made to us."""
    name = writer.get_extra_info("peername")
    if isinstance(name, tuple):
        return PeerLink(reader, writer, f"{name[0]}:{name[1]}", str(name[0]))
    return PeerLink(reader, writer, "a unix socket", peer_wire.UNIX)
