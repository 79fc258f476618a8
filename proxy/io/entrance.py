"""Where clients come in: the listening sockets of one worker, plain or with TLS.

With TLS a connection is a client's only after its handshake. Until then it is counted as one, so
that half handshakes cannot get past the limit on connections; it has a deadline; and when it fails
that is a count and not a line in the log, because anybody can make it fail as often as they like.

The sockets can be given a new context at any time, without a gap: each is duplicated, the duplicate
is served with the new context, and then the old one is closed. Connections that wait in the queue
belong to the socket and not to a descriptor of it, so none is lost (socket(7), dup(2)).
"""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, cast

from typing_extensions import override

from proxy.core import limits
from proxy.io.plane import Plane
from proxy.io.server import ServerProtocol

LISTEN_BACKLOG = 4096


class Entrance:
    """All client connections of one worker, from the listening socket on."""

    def __init__(self, plane: Plane, listeners: Sequence[socket.socket]) -> None:
        self.connections: set[ServerProtocol] = set()
        self.handshakes: set[Handshake] = set()
        self._plane = plane
        self._listeners = tuple(listeners)
        self._servers: list[asyncio.Server] = []
        self._context: ssl.SSLContext | None = None
        self._closed = False
        self._opening = asyncio.Lock()

    def __len__(self) -> int:
        return len(self.connections) + len(self.handshakes)

    async def change(self, context: ssl.SSLContext | None) -> None:
        """Go on with another context, if open. Connections that are made stay as they are.

        Raises `OSError`, and then goes on with the one before.
        """
        async with self._opening:
            secure = context is not None or self._context is not None
            if self._servers and secure and not self._closed:
                await self._open(context)

    async def open(self, context: ssl.SSLContext | None) -> None:
        """Serve, in place of what was served before. Raises `OSError`, having changed nothing."""
        async with self._opening:
            if not self._closed:
                await self._open(context)

    async def _open(self, context: ssl.SSLContext | None) -> None:
        def connection() -> asyncio.Protocol:
            if context is None:
                return cast("asyncio.Protocol", ServerProtocol(self._plane, self.connections))
            return Handshake(self, self._plane, context)

        fresh: list[asyncio.Server] = []
        try:
            for listener in self._listeners:
                fresh.append(await _serve(connection, listener))  # noqa: PERF401 - kept on failure
        except BaseException:
            _close(fresh)
            raise
        if self._closed:  # meanwhile
            _close(fresh)
            return
        before, self._servers, self._context = self._servers, fresh, context
        _close(before)

    def close(self) -> None:
        """Take no further connections; those that others may take from the sockets are theirs."""
        self._closed = True
        _close(self._servers)
        for listener in self._listeners:
            listener.close()

    def kill(self) -> None:
        for connection in list(self.connections):
            connection.kill()
        for handshake in list(self.handshakes):
            handshake.kill()


async def _serve(
    connection: Callable[[], asyncio.Protocol], listener: socket.socket
) -> asyncio.Server:
    """Serve a duplicate of the socket."""
    again = socket.socket(fileno=os.dup(listener.fileno()))
    try:
        return await asyncio.get_running_loop().create_server(
            connection, sock=again, backlog=LISTEN_BACKLOG
        )
    except BaseException:
        again.close()
        raise


def _close(servers: Sequence[asyncio.Server]) -> None:
    for server in servers:
        server.close()


class Handshake(asyncio.Protocol):
    """A connection on which TLS is not spoken yet."""

    __slots__ = ("_context", "_entrance", "_plane", "_protocol", "_steps", "_transport")

    _transport: asyncio.Transport
    _steps: Coroutine[Any, Any, asyncio.Transport | None]

    def __init__(self, entrance: Entrance, plane: Plane, context: ssl.SSLContext) -> None:
        self._entrance = entrance
        self._plane = plane
        self._context = context
        self._protocol = ServerProtocol(plane, entrance.connections)

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        if len(self._entrance) >= self._plane.connections_max:
            self._plane.telemetry.connections_refused_total += 1
            self._transport.abort()
            return
        self._entrance.handshakes.add(self)
        self._steps = asyncio.get_running_loop().start_tls(
            self._transport,
            cast("asyncio.Protocol", self._protocol),
            self._context,
            server_side=True,
            ssl_handshake_timeout=limits.TLS_HANDSHAKE_TIMEOUT_S,
            ssl_shutdown_timeout=limits.TLS_SHUTDOWN_TIMEOUT_S,
        )
        # The first step is taken here and not by a task: that would come a turn later, and octets
        # that arrive before TLS is in place would be lost.
        self._steps.send(None).add_done_callback(self._ended)

    def _ended(self, _: asyncio.Future[None]) -> None:
        self._entrance.handshakes.discard(self)
        secured, reason = None, "closed"
        try:
            self._steps.send(None)
        except StopIteration as done:
            secured = done.value
        except OSError as error:  # `ssl.SSLError` is one
            reason = _reason(error)
        if secured is None or self._transport.is_closing():
            self._plane.telemetry.tls_failures[reason] += 1
            self._transport.abort()
            return
        self._protocol.carrier = self._transport
        self._protocol.connection_made(secured)

    def kill(self) -> None:
        self._transport.abort()


def _reason(error: OSError) -> str:
    """Return the label under which a failure is counted; there are few, whatever clients do."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return "certificate"
    if isinstance(error, ssl.SSLError):
        match error.reason:
            case "HTTP_REQUEST":
                return "plain_http"
            case "PEER_DID_NOT_RETURN_A_CERTIFICATE":
                return "certificate"
            case _:
                return "protocol"
    return "timeout" if isinstance(error, ConnectionAbortedError) else "closed"
