"""What supervisor and worker say to each other, over one socket pair each.

Down: who you are and how that changes, the fleet, a replica that answered its probe, what others
have decided, drain, count, explain. Up: ready, a replica that failed, what was decided, counts,
explanations. Frames of MessagePack behind a four-octet length; both ends are ours, of one version.
A worker that loses its supervisor drains and ends, so that no port is held by an orphan.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator

import msgspec

from proxy.config import ProxyConfig
from proxy.contract import FleetSnapshot
from proxy.io.telemetry import Sample

_LENGTH = struct.Struct("!I")
FRAME_BYTES_MAX = 64 * 1024 * 1024
_READ_BYTES = 256 * 1024


class Start(msgspec.Struct, tag=True, frozen=True):
    config: ProxyConfig
    accept: bool = True  # or get ready and wait for `Accept`


class Accept(msgspec.Struct, tag=True, frozen=True):
    """Take connections now."""


class Reconfigure(msgspec.Struct, tag=True, frozen=True):
    """Go on as this says; open logs and certificates anew."""

    config: ProxyConfig


class FleetIs(msgspec.Struct, tag=True, frozen=True):
    snapshot: FleetSnapshot


class Cleared(msgspec.Struct, tag=True, frozen=True):
    """A suspect replica has answered its probe."""

    replica_id: str


class Accused(msgspec.Struct, tag=True, frozen=True):
    """A replica that was doubted did not answer its probe."""

    replica_id: str


class Drain(msgspec.Struct, tag=True, frozen=True):
    """Finish what runs, then end. A later one takes the place of an earlier.

    An idle connection may have its next request on the way already. While the drain is `gentle` it
    stays open, and that request is served and told that it is the last one here.
    """

    grace_s: float
    gentle: bool = False
    stay: bool = False  # though nothing is left to finish: somebody still asks
    keep_port: bool = False  # go on taking connections: whoever sends them does not know yet
    # Gentle without the port: a successor has it, and who asks here hears that the port is ready.


class Count(msgspec.Struct, tag=True, frozen=True):
    """Say what you have counted."""


class Listen(msgspec.Struct, tag=True, frozen=True):
    """Whether anybody wants to hear what you decide."""

    on: bool


class Whole(msgspec.Struct, tag=True, frozen=True):
    """Somebody has missed something: tell all that is open."""


class Heard(msgspec.Struct, tag=True, frozen=True):
    """Notes of another; of the oldest of them, when it was written."""

    origin: int
    at_s: float
    batch: bytes


class Gone(msgspec.Struct, tag=True, frozen=True):
    """There is no such origin any more: what it holds open is over."""

    origin: int


class Recite(msgspec.Struct, tag=True, frozen=True):
    """Tell what is cached where, in pages of this transfer."""

    transfer: int


class Explain(msgspec.Struct, tag=True, frozen=True):
    """Say what you would do with this request, and why."""

    number: int
    path: bytes
    fields: list[tuple[bytes, bytes]]
    body: bytes


class Ready(msgspec.Struct, tag=True, frozen=True):
    """Listening, with a fleet."""


class Suspect(msgspec.Struct, tag=True, frozen=True):
    replica_id: str
    reason: str


class Doubt(msgspec.Struct, tag=True, frozen=True):
    """A request has heard nothing of this replica for long: is it there?"""

    replica_id: str


class Noted(msgspec.Struct, tag=True, frozen=True):
    """Notes of this worker; of the oldest of them, when it was written."""

    at_s: float
    batch: bytes


class Page(msgspec.Struct, tag=True, frozen=True):
    transfer: int
    batch: bytes
    last: bool


class Garbled(msgspec.Struct, tag=True, frozen=True):
    """What this origin says cannot be read."""

    origin: int
    reason: str


class Explained(msgspec.Struct, tag=True, frozen=True):
    """The answer to the `Explain` of this number: a status, and JSON."""

    number: int
    status: int
    body: bytes


class Counted(msgspec.Struct, tag=True, frozen=True):
    counters: list[Sample]
    gauges: list[Sample]


Down = Start | Accept | Reconfigure | FleetIs | Cleared | Accused | Drain | Count | Explain
Sharing = Listen | Whole | Heard | Gone | Recite
FromWorker = Noted | Page | Garbled
Message = Down | Sharing | FromWorker | Ready | Suspect | Doubt | Counted | Explained
_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)


def frame_of(message: Message) -> bytes:
    """Return the octets of a message, for those who send it to many."""
    octets = _encoder.encode(message)
    return _LENGTH.pack(len(octets)) + octets


class Channel:
    """One end of the socket pair."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._held = bytearray()  # what was read, taken as far as `_at`: many frames at a time
        self._at = 0

    @classmethod
    async def open(cls, end: socket.socket) -> Channel:
        end.setblocking(False)
        reader, writer = await asyncio.open_unix_connection(sock=end, limit=FRAME_BYTES_MAX)
        return cls(reader, writer)

    def send(self, message: Message) -> None:
        """Queue a message; a peer that does not read is found by its silence, not by blocking."""
        self.send_frame(frame_of(message))

    def send_frame(self, frame: bytes) -> None:
        if not self._writer.is_closing():
            self._writer.write(frame)

    async def drained(self) -> None:
        """Wait until the other end has taken most of what waits, or is gone."""
        with contextlib.suppress(ConnectionError):
            await self._writer.drain()

    @property
    def waiting_bytes(self) -> int:
        """What the other end has not taken yet."""
        return self._writer.transport.get_write_buffer_size()

    async def receive(self) -> Message | None:
        """Return the next message, or None when the other end is gone."""
        while True:
            if len(self._held) >= self._at + _LENGTH.size:
                (size,) = _LENGTH.unpack_from(self._held, self._at)
                if size > FRAME_BYTES_MAX:
                    return None
                begin = self._at + _LENGTH.size
                if len(self._held) >= begin + size:
                    self._at = begin + size
                    return _decoder.decode(self._held[begin : self._at])
            try:
                piece = await self._reader.read(_READ_BYTES)
            except ConnectionError:
                return None
            if not piece:
                return None
            del self._held[: self._at]
            self._held += piece
            self._at = 0

    async def __aiter__(self) -> AsyncIterator[Message]:
        while (message := await self.receive()) is not None:
            yield message

    @property
    def has_more(self) -> bool:
        """Whether the next message has been read already, at least its beginning."""
        return len(self._held) > self._at

    def close(self) -> None:
        self._writer.close()
