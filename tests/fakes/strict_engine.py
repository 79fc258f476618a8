"""An engine that reads with h11, which is strict, and answers each request with its own body.

Whatever it cannot read as one well-formed request after another is the proxy's fault and fails the
test. `odd` names the requests, by their body, that get other octets instead of an answer: those of
a vector. The same conversation runs over the bench's fake transports and over real sockets.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import NamedTuple, Self, cast

import h11
from typing_extensions import override

from proxy.contract import ReplicaRecord

_HEAD_BYTES_MAX = 1 << 20
# What a proxy asks of its own accord; not counted as delivered.
_PATHS = b"/v1/models /health /metrics /v1/loads /kv_event_sources /server_info"
_ABOUT_ITSELF = tuple((b"GET", path) for path in _PATHS.split())
_MODELS = b'{"object":"list","data":[{"id":"m","object":"model"}]}'


class Delivered(NamedTuple):
    """One request as an engine got it."""

    method: bytes
    target: bytes
    fields: tuple[tuple[bytes, bytes], ...]
    body: bytes


class Odd(NamedTuple):
    """What comes instead of an answer, and whether the connection ends then."""

    octets: bytes
    closes: bool


def echo(body: bytes) -> bytes:
    """Return the body of the answer to a request with this body."""
    return b"echo:" + body


class Conversation:
    """One connection of the engine, without the connection: octets in, octets out."""

    def __init__(self, odd: Mapping[bytes, Odd]) -> None:
        self.delivered: list[Delivered] = []
        self.fault = ""  # why the octets that came are not plain requests
        self.closing = False
        self._odd = odd
        self._reader = h11.Connection(h11.SERVER, max_incomplete_event_size=_HEAD_BYTES_MAX)
        self._request: h11.Request | None = None
        self._body = b""

    @property
    def at_rest(self) -> bool:
        """Whether nothing of a further request has come."""
        return self._request is None and not self._reader.trailing_data[0]

    def feed(self, data: bytes) -> list[bytes]:
        """Take octets; return what to send, in the pieces to send it in."""
        self._reader.receive_data(data)
        out: list[bytes] = []
        try:
            while not self.closing:
                event = self._reader.next_event()
                if isinstance(event, h11.Request):
                    self._request = event
                elif isinstance(event, h11.Data):
                    self._body += event.data
                elif isinstance(event, h11.EndOfMessage):
                    out.append(self._answer(list(event.headers)))
                else:
                    break
        except h11.RemoteProtocolError as error:
            self.fault = f"{error}: {data[:200]!r}"
            self.closing = True
        return out

    def _answer(self, trailers: list[tuple[bytes, bytes]]) -> bytes:
        request, self._request = self._request, None
        body, self._body = self._body, b""
        assert request is not None
        fields = tuple((bytes(name), bytes(value)) for name, value in request.headers)
        if trailers:
            self.fault = f"trailers came through: {trailers!r}"
        got = Delivered(bytes(request.method), bytes(request.target), fields, body)
        if got[:2] in _ABOUT_ITSELF:
            text = _MODELS
        else:
            self.delivered.append(got)
            text = echo(body)
        send = self._reader.send
        answered = send(h11.Response(status_code=200, headers=[("content-length", str(len(text)))]))
        answered = (answered or b"") + (send(h11.Data(data=text)) or b"")
        send(h11.EndOfMessage())
        odd = self._odd.get(body)
        if self._reader.our_state is h11.MUST_CLOSE:
            self.closing = True
        else:
            self._reader.start_next_cycle()
        if odd is None:
            return answered
        self.closing = odd.closes
        return odd.octets


class StrictEngine:
    """The engine on real sockets. Use as `async with StrictEngine() as engine`."""

    def __init__(self) -> None:
        self.odd: dict[bytes, Odd] = {}
        self.conversations: list[Conversation] = []
        self.port = 0
        self._server: asyncio.Server | None = None
        self._transports: set[asyncio.Transport] = set()

    @property
    def delivered(self) -> list[Delivered]:
        return [request for talk in self.conversations for request in talk.delivered]

    @property
    def faults(self) -> list[str]:
        return [talk.fault for talk in self.conversations if talk.fault]

    def record(self, replica_id: str) -> ReplicaRecord:
        url = f"http://127.0.0.1:{self.port}"
        return ReplicaRecord(replica_id=replica_id, url=url, models=("m",))

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _Connection(self), "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for transport in list(self._transports):
            transport.abort()
        await self._server.wait_closed()


class _Connection(asyncio.Protocol):
    def __init__(self, engine: StrictEngine) -> None:
        self._engine = engine
        self._conversation = Conversation(engine.odd)
        engine.conversations.append(self._conversation)

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._engine._transports.add(self._transport)

    @override
    def data_received(self, data: bytes) -> None:
        for piece in self._conversation.feed(data):
            self._transport.write(piece)
        if self._conversation.closing:
            self._transport.close()

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        self._engine._transports.discard(self._transport)
