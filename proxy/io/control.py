"""What supervisor and worker say to each other, over one socket pair each.

Down: who you are and how that changes, the fleet, a replica that answered its probe, what others
have decided, drain, count, explain. Up: ready, a replica that failed, what was decided, counts,
explanations. Frames of MessagePack behind a four-octet length; both ends are ours, of one version.
A worker that loses its supervisor drains and ends, so that no port is held by an orphan.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator, Callable
from typing import cast

import msgspec
from typing_extensions import override

from proxy.config import ProxyConfig
from proxy.contract import FleetSnapshot
from proxy.contract.demand import ModelDemand, ReplicaDemand
from proxy.contract.keys import KeySet
from proxy.contract.regions import ModelSummary, RemoteState
from proxy.io.telemetry import Sample

_LENGTH = struct.Struct("!I")
FRAME_BYTES_MAX = 64 * 1024 * 1024
_HELD_BYTES_MAX = 1024 * 1024  # read and not taken; a frame that is larger is read whole


class Start(msgspec.Struct, tag=True, frozen=True):
    config: ProxyConfig
    accept: bool = True  # or get ready and wait for `Accept`
    place: int = 0  # among the workers
    cells_fd: int = -1  # of the memory in which all of them count (`io/shared_cells.py`); -1: none
    workers: int = 1
    quota_fd: int = -1  # of the memory in which tenants are counted (`io/quota_memory.py`)
    rows: dict[str, int] = {}  # whose row is whose in it
    nonces_fd: int = -1  # of that in which all keep the hops that they took; -1: each its own
    notes_fd: int = -1  # of that in which each says what it decides (`core/note_ring.py`)
    notes_read: list[tuple[int, int]] = []  # up to where what is said there is no news


class Accept(msgspec.Struct, tag=True, frozen=True):
    """Take connections now."""


class Reconfigure(msgspec.Struct, tag=True, frozen=True):
    """Go on as this says; open logs and certificates anew."""

    config: ProxyConfig
    rows: dict[str, int] = {}  # of the tenants that have limits by it


class FleetIs(msgspec.Struct, tag=True, frozen=True):
    snapshot: FleetSnapshot
    columns: dict[str, int] = {}  # of the replicas that have a limit, in the memory of all workers


class KeysAre(msgspec.Struct, tag=True, frozen=True):
    """All API keys there are now; it is obeyed before any request that comes after it."""

    keys: KeySet


class JwtKeysAre(msgspec.Struct, tag=True, frozen=True):
    """The public keys of the identity provider, as it publishes them."""

    document: bytes


class JwtKeysWanted(msgspec.Struct, tag=True, frozen=True):
    """A token names a key that is not among them."""


class RemotesAre(msgspec.Struct, tag=True, frozen=True):
    """What is known now of the proxies of other regions, and the name of this one's life."""

    remotes: list[RemoteState]
    ours: bytes = b""


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

    hot: bool = False  # and which prefixes are hot, since somebody looks


class Listen(msgspec.Struct, tag=True, frozen=True):
    """Whether anybody wants to hear what you decide, as this origin."""

    on: bool
    origin: int = 0
    hurry: bool = False  # and waits for it: say when there is something


class Whole(msgspec.Struct, tag=True, frozen=True):
    """Somebody has missed something: tell all that is open."""


class Heard(msgspec.Struct, tag=True, frozen=True):
    """A page of what is cached where, as notes of nobody."""

    batch: bytes


class GiveWay(msgspec.Struct, tag=True, frozen=True):
    """An online request waits for a replica: up, what the worker of this origin is to end for it.

    Down, to that worker; and to all others without leases: keep offline work from there meanwhile.
    """

    origin: int
    replica: str
    lease_ids: list[int]


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
    """There are notes of this worker for those who hurry."""


class Missed(msgspec.Struct, tag=True, frozen=True):
    """This worker was overtaken by what others say."""


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


class Demanded(msgspec.Struct, tag=True, frozen=True):
    """What this worker has in hand, by the fleet of this snapshot that it chose by meanwhile."""

    models: dict[str, ModelDemand]
    replicas: dict[str, ReplicaDemand]
    epoch: str = ""
    version: int = 0
    at_once: bool = False  # somebody waits for a model of which nothing is awake
    # By model, then by other region: our requests that are there, and those that wait and may not
    # be computed there.
    abroad: dict[str, dict[str, int]] = {}
    bound: dict[str, dict[str, int]] = {}


class Summarised(msgspec.Struct, tag=True, frozen=True):
    """What this worker sees of each model here, for other regions."""

    models: dict[str, ModelSummary]


class HotPrefix(msgspec.Struct, frozen=True, array_like=True):
    """One that many requests of this worker begin with."""

    name: int  # its hash
    octets: int
    count: int
    spread: int  # replicas that its requests may choose from as if all had it; 0: its own
    held_by: int
    holders: list[str]  # some of those


class Counted(msgspec.Struct, tag=True, frozen=True):
    counters: list[Sample]
    gauges: list[Sample]
    hot: list[HotPrefix] = []


News = FleetIs | KeysAre | JwtKeysAre | RemotesAre | Cleared | Accused
Down = Start | Accept | Reconfigure | News | Drain | Count | Explain

Sharing = Listen | Whole | Heard | Gone | Recite | GiveWay
FromWorker = Noted | Missed | Page | Garbled | GiveWay
Told = Ready | Suspect | Doubt | JwtKeysWanted | Demanded | Summarised | Counted | Explained
Message = Down | Sharing | FromWorker | Told
_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)


def frame_of(message: Message) -> bytes:
    """Return the octets of a message, for those who send it to many."""
    octets = _encoder.encode(message)
    return _LENGTH.pack(len(octets)) + octets


class Channel(asyncio.Protocol):
    """One end of the socket pair."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._held = bytearray()  # what was read, taken as far as `_at`: many frames at a time
        self._at = 0
        self._ended = False  # the other end is gone
        self._reading = True
        self._news: asyncio.Future[None] | None = None  # somebody waits for a message
        self._room: asyncio.Future[None] | None = None  # what was sent is not taken
        self._on_message: Callable[[Message], None] | None = None

    @classmethod
    async def open(cls, end: socket.socket) -> Channel:
        end.setblocking(False)
        loop = asyncio.get_running_loop()
        _, channel = await loop.create_unix_connection(cls, sock=end)
        return channel

    # --- what the event loop says ------------------------------------------------------------

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is none by name

    @override
    def data_received(self, data: bytes) -> None:
        if self._at:
            del self._held[: self._at]
            self._at = 0
        self._held += data
        if self._on_message is not None:
            self._hand_over(self._on_message)
            return
        if len(self._held) >= _HELD_BYTES_MAX and self._size >= 0 and self._reading:
            self._reading = False
            assert self._transport is not None
            self._transport.pause_reading()
        _wake(self._news)

    @override
    def connection_lost(self, error: Exception | None) -> None:
        self._ended = True
        _wake(self._news)
        _wake(self._room)

    @override
    def pause_writing(self) -> None:
        self._room = asyncio.get_running_loop().create_future()

    @override
    def resume_writing(self) -> None:
        _wake(self._room)
        self._room = None

    # --- sending -----------------------------------------------------------------------------

    def send(self, message: Message) -> None:
        """Queue a message; a peer that does not read is found by its silence, not by blocking."""
        self.send_frame(frame_of(message))

    def send_frame(self, frame: bytes) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(frame)

    async def drained(self) -> None:
        """Wait until the other end has taken most of what waits, or is gone."""
        if self._room is not None and not self._ended:
            await asyncio.shield(self._room)

    @property
    def waiting_bytes(self) -> int:
        """What the other end has not taken yet."""
        return self._transport.get_write_buffer_size() if self._transport is not None else 0

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    # --- receiving ---------------------------------------------------------------------------

    async def receive(self) -> Message | None:
        """Return the next message, or None when the other end is gone."""
        while True:
            message = self._take()
            if message is not None:
                return message
            if self._ended:
                return None
            if not self._reading:
                self._reading = True
                assert self._transport is not None
                self._transport.resume_reading()
            self._news = asyncio.get_running_loop().create_future()
            try:
                await self._news
            finally:
                self._news = None

    async def __aiter__(self) -> AsyncIterator[Message]:
        while (message := await self.receive()) is not None:
            yield message

    async def follow(self, on_message: Callable[[Message], None]) -> None:
        """Have each message handled when it comes, until the other end is gone.

        Raises what a handler raises, and what is no message.
        """
        self._news = asyncio.get_running_loop().create_future()
        self._on_message = on_message
        try:
            self._hand_over(on_message)
            if not self._ended:
                await self._news
        finally:
            self._on_message = self._news = None

    def _hand_over(self, on_message: Callable[[Message], None]) -> None:
        try:
            while (message := self._take()) is not None:
                on_message(message)
        except Exception as error:  # noqa: BLE001 - it is raised where it is waited for
            self._on_message = None
            if self._news is not None and not self._news.done():
                self._news.set_exception(error)

    @property
    def has_more(self) -> bool:
        """Whether the next message has been read already, at least its beginning."""
        return len(self._held) > self._at

    @property
    def _size(self) -> int:
        """Return the size of the next message, or -1 when it is not here yet."""
        if len(self._held) < self._at + _LENGTH.size:
            return -1
        (size,) = _LENGTH.unpack_from(self._held, self._at)
        if size > FRAME_BYTES_MAX:
            self._ended = True
            self.close()
            return -1
        return int(size) if len(self._held) >= self._at + _LENGTH.size + size else -1

    def _take(self) -> Message | None:
        size = self._size
        if size < 0:
            return None
        begin = self._at + _LENGTH.size
        self._at = begin + size
        with memoryview(self._held) as held:
            return _decoder.decode(held[begin : self._at])


def _wake(waiting: asyncio.Future[None] | None) -> None:
    if waiting is not None and not waiting.done():
        waiting.set_result(None)
