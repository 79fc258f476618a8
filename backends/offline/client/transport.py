"""The service, reached over HTTP through whatever may restart between.

Every request here may be repeated: reads change nothing, a cancelled job stays cancelled, and what
makes something carries a key (`Idempotency-Key`) under which it is made once. So a broken
connection, and an answer that says to come again, are waited out for `patience_s`; any other
refusal is final.
"""

from __future__ import annotations

import asyncio
import os
import random
import uuid
from collections.abc import AsyncIterator, Mapping
from typing import BinaryIO, Final

import aiohttp
import msgspec
import orjson
from yarl import URL

from backends.offline.client.errors import RefusedError, UnreachableError

ANSWER_S_MAX = 60.0  # beyond what a request asks to wait
PAUSE_S_MIN, PAUSE_S_MAX = 0.1, 3.0  # between attempts, doubled each time, half of it by chance
PIECE_BYTES = 256 * 1024
COME_AGAIN: Final = frozenset((408, 429, 502, 503, 504))
SHOWN_CHARACTERS_MAX = 300


class Reply(msgspec.Struct, frozen=True):
    """An answer, read whole."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class Transport:
    """One service under one key. To be closed."""

    def __init__(self, base_url: str, api_key: str | None, patience_s: float) -> None:
        url = base_url.rstrip("/").removesuffix("/v1")
        if URL(url).scheme not in {"http", "https"} or not URL(url).host:
            raise ValueError(f"'{base_url}' is no address, such as http://127.0.0.1:8000/v1")
        self._url = url
        self._headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._patience_s = patience_s
        self._chance = random.Random()  # noqa: S311 - so that clients do not come back all at once
        self._session: aiohttp.ClientSession | None = None

    async def get(self, path: str, wait_s: float = 0.0) -> Reply:
        """Read something. Raises `RefusedError`, `UnreachableError`."""
        return await self._call("GET", path, wait_s=wait_s)

    async def find(self, path: str, wait_s: float = 0.0) -> Reply | None:
        """Read something that may not be there: None. Raises as `get`."""
        try:
            return await self.get(path, wait_s)
        except RefusedError as error:
            if error.status != 404:
                raise
            return None

    async def make(self, path: str, value: object = None) -> Reply:
        """Have something made, once. Raises as `get`."""
        headers = {"content-type": "application/json", "idempotency-key": uuid.uuid4().hex}
        return await self._call("POST", path, headers=headers, content=orjson.dumps(value))

    async def upload(self, path: str, name: str, file: BinaryIO, size: int) -> Reply:
        """Upload the first `size` octets of a file on disk, for a batch. Raises as `get`."""
        boundary = uuid.uuid4().hex
        part = f"--{boundary}\r\nContent-Disposition: form-data; name="
        head = f'{part}"purpose"\r\n\r\nbatch\r\n{part}"file"; filename="{name}"\r\n'.encode()
        head += b"Content-Type: application/jsonl\r\n\r\n"
        tail = f"\r\n--{boundary}--\r\n".encode()
        headers = {
            "content-type": f"multipart/form-data; boundary={boundary}",
            "content-length": str(len(head) + size + len(tail)),
            "idempotency-key": uuid.uuid4().hex,
        }
        content = _Upload(head, file, size, tail)
        return await self._call("POST", path, headers=headers, content=content)

    async def close(self) -> None:
        """Let go of the connections."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def _call(
        self,
        method: str,
        path: str,
        *,
        headers: Mapping[str, str] | None = None,
        content: bytes | _Upload | None = None,
        wait_s: float = 0.0,
    ) -> Reply:
        clock = asyncio.get_running_loop()
        end_s, attempt = clock.time() + wait_s + self._patience_s, 0
        while True:
            after_s = 0.0
            try:
                reply = await self._once(method, path, headers or {}, content, wait_s)
            except (aiohttp.ClientError, OSError, TimeoutError) as error:
                problem = problem_of(error)
            else:
                if reply.status < 300:
                    return reply
                refusal = refusal_of(reply)
                if reply.status not in COME_AGAIN:
                    raise refusal
                problem, after_s = str(refusal), retry_after_s(reply)
            whole_s = min(PAUSE_S_MAX, PAUSE_S_MIN * 2.0 ** min(attempt, 16))
            rest_s = max(min(after_s, PAUSE_S_MAX), whole_s * (0.5 + 0.5 * self._chance.random()))
            if clock.time() + rest_s >= end_s:
                raise UnreachableError(f"{self._url} does not answer: {problem}")
            attempt += 1
            await asyncio.sleep(rest_s)

    async def _once(
        self,
        method: str,
        path: str,
        headers: Mapping[str, str],
        content: bytes | _Upload | None,
        wait_s: float,
    ) -> Reply:
        if self._session is None:
            self._session = aiohttp.ClientSession(headers=self._headers)
        body = content.pieces() if isinstance(content, _Upload) else content
        # An upload takes as long as it takes; silence after it does not.
        timeout = aiohttp.ClientTimeout(sock_connect=10.0, sock_read=wait_s + ANSWER_S_MAX)
        async with self._session.request(
            method,
            URL(self._url + path, encoded=True),
            data=body,
            headers=headers,
            timeout=timeout,
            allow_redirects=False,
        ) as response:
            fields = {name.lower(): value for name, value in response.headers.items()}
            return Reply(response.status, fields, await response.read())


class _Upload:
    """A form with one file in it, which can be sent again."""

    def __init__(self, head: bytes, file: BinaryIO, size: int, tail: bytes) -> None:
        self._head, self._file, self._size, self._tail = head, file, size, tail

    async def pieces(self) -> AsyncIterator[bytes]:
        yield self._head
        at = 0
        while at < self._size:
            piece = os.pread(self._file.fileno(), min(PIECE_BYTES, self._size - at), at)
            if not piece:
                raise OSError("the file has become shorter")
            yield piece
            at += len(piece)
        yield self._tail


def problem_of(error: Exception) -> str:
    """Say why nothing was answered, in words for people where the library has its own."""
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return f"the name {error.host} is not known"
    if isinstance(error, aiohttp.ClientSSLError):
        return f"no connection by TLS ({error.os_error})"
    if isinstance(error, aiohttp.ClientConnectorError):
        # With several addresses of one name there is no number, but a list of what happened.
        why = os.strerror(error.errno).lower() if error.errno else "no connection"
        return f"{why}; does Doherty run there (`doherty up`)?"
    return str(error) or type(error).__name__


def refusal_of(reply: Reply) -> RefusedError:
    """Read an error in OpenAI's shape, or in any other."""
    try:
        problem = orjson.loads(reply.body)["error"]
        return RefusedError(reply.status, str(problem["message"]), problem.get("code"))
    except (ValueError, KeyError, TypeError, AttributeError):
        said = reply.body[:SHOWN_CHARACTERS_MAX].decode("utf-8", "replace").strip()
        return RefusedError(reply.status, said or "no reason was given")


def retry_after_s(reply: Reply) -> float:
    """Return what the answer asks to wait; 0: it asks nothing."""
    try:
        return max(0.0, float(reply.headers.get("retry-after", "0")))
    except ValueError:
        return 0.0
