"""A raw engine on a real socket that follows a script: refuse, cut at an octet, stall, lie.

It reads whole requests itself, so that a test can say how often and with which octets one was
delivered, and over how many connections. Health and models it answers by itself, uncounted.
"""

from __future__ import annotations

import asyncio
import re
import socket
import ssl
import struct
from collections.abc import Awaitable, Callable
from typing import Self

from proxy.contract import ReplicaRecord

RESET = struct.pack("ii", 1, 0)


class Received:
    """One request as the engine got it."""

    def __init__(self, head: bytes, body: bytes, connection: int) -> None:
        self.head = head
        self.body = body
        self.connection = connection  # counted from 1, per engine
        self.fields = {
            name.decode().lower(): value.strip().decode("latin-1")
            for name, _, value in (line.partition(b":") for line in head.split(b"\r\n")[1:])
        }

    @property
    def target(self) -> str:
        return self.head.split(b" ")[1].decode()


class Connection:
    """What a script may do with the connection that a request came on."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self.writer = writer

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    def close(self) -> None:
        self.writer.close()

    def reset(self) -> None:
        """Close so that the other side sees a reset."""
        connected = self.writer.get_extra_info("socket")
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        self.writer.transport.abort()


Script = Callable[[Connection, Received], Awaitable[None]]


# What a proxy asks of its own accord. Of loads and events nothing is in the answer.
_ABOUT_ITSELF = (
    *("/v1/models", "/health", "/metrics", "/v1/loads"),
    *("/kv_event_sources", "/server_info"),
)


async def reply(connection: Connection, request: Received) -> None:
    """Answer with the length of what came."""
    await answer_json(connection, b'{"received":%d}' % len(request.body))


class ScriptedEngine:
    """Use as `async with ScriptedEngine() as engine`; `script` may change between requests."""

    def __init__(
        self,
        script: Script = reply,
        models: tuple[str, ...] = ("m",),
        context: ssl.SSLContext | None = None,
    ) -> None:
        self.context = context  # None: plain HTTP
        self.script = script
        self.models = models
        self.requests: list[Received] = []
        self.connections_total = 0
        self.gone = 0  # connections that the other side ended
        self.port = 0
        self.probes = 0  # health checks answered
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._serving: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        return f"http{'s' if self.context else ''}://127.0.0.1:{self.port}"

    @property
    def connections_open(self) -> int:
        return len(self._writers)

    def record(self, replica_id: str) -> ReplicaRecord:
        return ReplicaRecord(replica_id=replica_id, url=self.url, models=self.models)

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(
            self._serve, "127.0.0.1", self.port, ssl=self.context
        )
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def stop(self) -> None:
        """Close the port and every connection. A stopped engine refuses."""
        if self._server is None:
            return
        server, self._server = self._server, None
        server.close()
        for writer in list(self._writers):
            writer.transport.abort()
        for task in list(self._serving):
            task.cancel()
        await asyncio.gather(*self._serving, return_exceptions=True)
        await server.wait_closed()

    async def _say_who(self, connection: Connection, request: Received) -> None:
        self.probes += request.target == "/health"
        listed = ",".join(f'{{"id":"{model}","object":"model"}}' for model in self.models)
        await answer_json(connection, f'{{"object":"list","data":[{listed}]}}'.encode())

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._serving.add(task)
        self._writers.add(writer)
        self.connections_total += 1
        number = self.connections_total
        try:
            while not writer.is_closing():
                head = (await reader.readuntil(b"\r\n\r\n"))[:-4]
                length = re.search(rb"(?i)\r\ncontent-length: (\d+)", head)
                body = await reader.readexactly(int(length[1])) if length else b""
                request = Received(head, body, number)
                if request.target in _ABOUT_ITSELF:
                    await self._say_who(Connection(writer), request)
                    continue
                self.requests.append(request)
                await self.script(Connection(writer), request)
        except (asyncio.IncompleteReadError, ConnectionError):
            self.gone += 1
        except asyncio.CancelledError:
            pass  # by `stop`, and by nobody else
        finally:
            self._writers.discard(writer)
            self._serving.discard(task)
            writer.close()


async def answer_json(connection: Connection, body: bytes) -> None:
    await connection.send(
        b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b"
        % (len(body), body)
    )


def streaming(
    *pieces: bytes, then: Callable[[Connection], Awaitable[None]] | None = None
) -> Script:
    """Return a script that streams events, one a chunk; `then` comes instead of the end."""

    async def script(connection: Connection, _: Received) -> None:
        await connection.send(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
            b"transfer-encoding: chunked\r\n\r\n"
        )
        for piece in pieces:
            await connection.send(b"%x\r\n%b\r\n" % (len(piece), piece))
        if then is None:
            await connection.send(b"0\r\n\r\n")
        else:
            await then(connection)

    return script


async def free_port() -> int:
    """Return a port on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
