"""A lean streaming client: one request, one connection at a time, kept alive between requests.

Written on `asyncio.Protocol` because the client shares a machine with what it measures: some
microseconds a chunk instead of a hundred. A connection is reused only when its last answer ended
cleanly and it has not been idle long enough for the server to be closing it just now; so a request
is never sent twice, and what the server did to a request is what is counted.
"""

from __future__ import annotations

import asyncio
import base64
import ssl
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, cast
from urllib.parse import unquote, urlsplit

import msgspec

from loadtest.wire import AnswerReader, WireError

if TYPE_CHECKING:
    from typing_extensions import override
else:

    def override(method):  # typing.override is Python 3.12's
        return method


IDLE_CONNECTIONS_MAX = 1024
IDLE_S_MAX = 2.0  # servers close idle connections after 5 s and more
CONNECT_TIMEOUT_S = 10.0


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """Where requests go."""

    host: str
    port: int
    tls: bool
    path_prefix: str  # of a server that does not live at the root; empty or "/something"
    credentials: str | None = None

    @property
    def authority(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.tls else 80) else f"{host}:{self.port}"


def parse_url(url: str) -> Target:
    """Return the target that `url` names. Raises `ValueError` saying what to write instead."""
    example = "such as http://127.0.0.1:8000"
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise ValueError(f"{url}: {error}; expected a URL {example}") from error
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{url}: expected a URL {example}")
    if not url.isascii() or any(c <= " " for c in url):
        raise ValueError(f"{url!r}: expected plain ASCII without spaces, {example}")
    tls = parts.scheme == "https"
    credentials = None
    if parts.username is not None:
        credentials = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
    return Target(
        host=parts.hostname,
        port=port or (443 if tls else 80),
        tls=tls,
        path_prefix=parts.path.rstrip("/").removesuffix("/v1"),
        credentials=credentials,
    )


class RequestError(Exception):
    """No whole answer came. `kind` is a word to count by, `detail` is for people."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(f"{kind}: {detail}")
        self.kind = kind
        self.detail = detail


class Connection(asyncio.Protocol):
    """One connection: bytes go out, an `AnswerReader` sees what comes back."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.idle_since_s = 0.0
        self._clock = clock
        self._transport: asyncio.Transport | None = None
        self._reader: AnswerReader | None = None
        self._waiter: asyncio.Future[None] | None = None

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    @override
    def data_received(self, data: bytes) -> None:
        if self._reader is None:
            self.abort()  # nobody asked
            return
        try:
            if self._reader.feed(data, self._clock()):
                self._answered(None)
        except WireError as error:
            self._answered(RequestError("protocol", str(error)))
            self.abort()

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if self._reader is None:
            return
        if self._reader.feed_end() or self._reader.done_seen:
            self._answered(None)
        elif self._reader.status == 0:
            self._answered(RequestError("closed", "connection closed before an answer"))
        else:
            reason = f": {exc}" if exc else ""
            self._answered(RequestError("cut", f"connection closed within the answer{reason}"))

    def _answered(self, failure: RequestError | None) -> None:
        self._reader = None
        if self._waiter is None or self._waiter.done():
            return
        if failure:
            self._waiter.set_exception(failure)
        else:
            self._waiter.set_result(None)

    @property
    def usable(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    async def exchange(self, head: bytes, body: bytes, reader: AnswerReader) -> None:
        """Send a request and read its whole answer into `reader`; raises `RequestError`."""
        assert self._reader is None
        if self._transport is None:
            raise RequestError("closed", "connection closed before the request")
        self._reader = reader
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            self._transport.writelines((head, body))
            await self._waiter
        except BaseException:
            self.abort()  # cancelled, timed out or broken: the server should stop working on it
            raise
        finally:
            self._waiter = None

    def abort(self) -> None:
        self._reader = None
        if self._transport is not None:
            self._transport.abort()


class Client:
    """Sends requests to one target and keeps its connections; close it when done."""

    def __init__(
        self,
        target: Target,
        clock: Callable[[], float],
        *,
        api_key: str | None = None,
        idle_s_max: float = IDLE_S_MAX,
        explain: bool = True,
    ) -> None:
        """`explain`: ask a Doherty why it decided as it did, which costs it some microseconds."""
        self._target = target
        self._clock = clock
        self._idle_s_max = idle_s_max
        self._idle: deque[Connection] = deque(maxlen=IDLE_CONNECTIONS_MAX)
        self._tls = ssl.create_default_context() if target.tls else None
        lines = [
            f"host: {target.authority}",
            "user-agent: doherty-loadtest",
        ]
        if explain:
            lines.append("x-doherty-explain: 1")
        if api_key:
            lines.append(f"authorization: Bearer {api_key}")
        elif target.credentials:
            encoded = base64.b64encode(target.credentials.encode()).decode()
            lines.append(f"authorization: Basic {encoded}")
        self._common_head = "\r\n".join(lines)

    def now_s(self) -> float:
        """Return the time by the clock that answers are stamped with."""
        return self._clock()

    async def post(
        self, path: str, body: bytes, headers: str = "", reader: AnswerReader | None = None
    ) -> AnswerReader:
        """POST JSON. `headers` are further whole lines, each ended with CRLF.

        A `reader` of the caller's own keeps what had come of an answer that then broke.
        """
        head = (
            f"POST {self._target.path_prefix}{path} HTTP/1.1\r\n{self._common_head}\r\n"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n{headers}\r\n"
        )
        return await self._send(head.encode("latin-1"), body, reader or AnswerReader())

    async def get(self, path: str) -> AnswerReader:
        head = f"GET {self._target.path_prefix}{path} HTTP/1.1\r\n{self._common_head}\r\n\r\n"
        return await self._send(head.encode("latin-1"), b"", AnswerReader())

    async def _send(self, head: bytes, body: bytes, reader: AnswerReader) -> AnswerReader:
        connection = self._idle_connection() or await self._connect()
        await connection.exchange(head, body, reader)
        if reader.complete and reader.keep_alive and connection.usable:
            connection.idle_since_s = self._clock()
            if len(self._idle) == IDLE_CONNECTIONS_MAX:
                self._idle.popleft().abort()
            self._idle.append(connection)
        else:
            connection.abort()
        return reader

    def _idle_connection(self) -> Connection | None:
        """Return the connection that was used last; close those that have been idle too long."""
        oldest_s = self._clock() - self._idle_s_max
        while self._idle and (not self._idle[0].usable or self._idle[0].idle_since_s < oldest_s):
            self._idle.popleft().abort()
        while self._idle:
            connection = self._idle.pop()
            if connection.usable:
                return connection
        return None

    async def _connect(self) -> Connection:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                _, connection = await loop.create_connection(
                    lambda: Connection(self._clock),
                    self._target.host,
                    self._target.port,
                    ssl=self._tls,
                )
        except TimeoutError as error:
            raise RequestError("connect", f"no connection in {CONNECT_TIMEOUT_S:g} s") from error
        except (OSError, ssl.SSLError) as error:
            raise RequestError("connect", str(error) or type(error).__name__) from error
        return connection

    def close(self) -> None:
        while self._idle:
            self._idle.pop().abort()
