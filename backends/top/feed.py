"""The admin listener, asked: one view, a stream of them, a wish for a replica, a dry run.

A stream that breaks is taken up again after a pause that doubles, up to ten seconds, and whoever
watches hears why; the last view stays what is known. The server sends something every few seconds,
if only a comment, so a silence means that the connection is lost without a word (a laptop that
slept, a firewall that forgot).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import NamedTuple, Self
from urllib.parse import quote, urlsplit

import aiohttp
import msgspec

from backends.failure import StartError
from backends.top.events import Events, EventTooLongError
from proxy.contract.bodies import TooLongError, whole_body
from proxy.contract.view import VIEW_PATH, VIEW_WATCH_PATH, WISH_PATH, View, decode_view

ROUTE_PATH = "/debug/route"
SILENCE_S_MAX = 15.0
ANSWER_S_MAX = 15.0
PAUSE_S_MIN, PAUSE_S_MAX = 0.5, 10.0
ANSWER_BYTES_MAX = 16 * 1024 * 1024
ERROR_BYTES_MAX = 64 * 1024


class FeedError(Exception):
    """Why there is no view, in words for an operator. What says `final` is not tried again."""

    def __init__(self, words: str, *, final: bool = False) -> None:
        super().__init__(words)
        self.final = final


class Broken(NamedTuple):
    """The stream is lost: why, and after how many seconds it is tried again."""

    words: str
    pause_s: float


class _Said(msgspec.Struct):
    message: str = ""


class _Refused(msgspec.Struct):
    error: _Said


def check_url(url: str) -> str:
    """Return the address without a slash at its end. Raises `StartError`."""
    parts = urlsplit(url)
    if parts.scheme not in {"http", "https"} or not parts.netloc:
        raise StartError(f"'{url}' is no admin listener's address, such as http://127.0.0.1:8001")
    return url.rstrip("/")


class Admin:
    """Use as `async with Admin(url, key) as admin`."""

    def __init__(self, url: str, key: str | None) -> None:
        self.url = url
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._session: aiohttp.ClientSession

    async def __aenter__(self) -> Self:
        # No proxy of the environment's: an admin listener is on this machine or near.
        self._session = aiohttp.ClientSession(headers=self._headers, trust_env=False)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def fetch(self) -> View:
        """Return the view of now. Raises `FeedError`."""
        status, body = await self._ask("GET", VIEW_PATH)
        if status != 200:
            raise self._refusal(status, body)
        return self._decoded(body)

    async def wish(self, replica_id: str, wish: str) -> str:
        """Drain or undrain a replica; return what was said to it. Raises `FeedError`."""
        path = WISH_PATH.format(replica_id=quote(replica_id, safe=""), wish=wish)
        status, body = await self._ask("POST", path)
        if status >= 300:
            raise self._refusal(status, body)
        return f"{replica_id}: {wish} was taken"

    async def explain(self, body: bytes, path: str) -> bytes:
        """Return the JSON of a dry run, or of the error a client would read. Raises `FeedError`."""
        where = f"{ROUTE_PATH}?path={quote(path, safe='')}"
        status, said = await self._ask("POST", where, body)
        if status in {401, 403} or (status == 404 and not said.startswith(b"{")):
            raise self._refusal(status, said)
        return said

    async def follow(
        self,
        on_view: Callable[[View], None],
        on_break: Callable[[Broken], None],
        pause_s_min: float = PAUSE_S_MIN,
    ) -> None:
        """Tell each view as it comes, until cancelled. Raises `FeedError` if trying is in vain.

        Where views have come once, nothing is in vain: a proxy is being replaced, a key changed.
        """
        pause_s, known = pause_s_min, False
        while True:
            came = 0
            try:
                async for view in self._watch():
                    came += 1
                    on_view(view)
                words = "the stream ended"
            except FeedError as error:
                if error.final and not (known or came):
                    raise
                words = str(error)
            known = known or came > 0
            pause_s = pause_s_min if came else min(pause_s * 2, PAUSE_S_MAX)
            on_break(Broken(words, pause_s))
            await asyncio.sleep(pause_s)

    async def _watch(self) -> AsyncIterator[View]:
        timeout = aiohttp.ClientTimeout(
            total=None, sock_connect=ANSWER_S_MAX, sock_read=SILENCE_S_MAX
        )
        events = Events(b"view")
        try:
            async with self._session.get(self.url + VIEW_WATCH_PATH, timeout=timeout) as answer:
                if answer.status != 200:
                    raise self._refusal(answer.status, await whole_body(answer, ERROR_BYTES_MAX))
                async for piece in answer.content.iter_any():
                    for data in events.feed(piece):
                        yield self._decoded(data)
        except (EventTooLongError, TooLongError) as error:
            raise FeedError(str(error)) from error
        except (aiohttp.ClientError, OSError) as error:  # TimeoutError is an OSError
            raise FeedError(self._lost(error)) from error

    async def _ask(self, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
        timeout = aiohttp.ClientTimeout(total=ANSWER_S_MAX)
        try:
            async with self._session.request(
                method, self.url + path, data=body, timeout=timeout
            ) as answer:
                return answer.status, await whole_body(answer, ANSWER_BYTES_MAX)
        except (aiohttp.ClientError, OSError, TooLongError) as error:
            raise FeedError(self._lost(error)) from error

    def _decoded(self, body: bytes) -> View:
        try:
            return decode_view(body)
        except msgspec.MsgspecError as error:
            words = f"{self.url} answered something else than a view: {error}"
            raise FeedError(words, final=True) from error

    def _lost(self, error: Exception) -> str:
        if isinstance(error, TimeoutError):
            return f"{self.url} is silent"
        reason = getattr(error, "os_error", None) or error
        return f"{self.url} does not answer: {getattr(reason, 'strerror', None) or reason}"

    def _refusal(self, status: int, body: bytes) -> FeedError:
        try:
            said = msgspec.json.decode(body, type=_Refused).error.message
        except msgspec.MsgspecError:
            said = ""
        if status == 401:
            words = "the admin key is wrong or missing: DOHERTY_ADMIN_API_KEY, or --api-key-file"
            return FeedError(words, final=True)
        if status == 404 and not said:
            words = (
                f"{self.url} has no {VIEW_PATH}: is that a proxy's admin listener, of this release?"
            )
            return FeedError(words, final=True)
        return FeedError(said or f"{self.url} answered {status}", final=status in {403, 404})
