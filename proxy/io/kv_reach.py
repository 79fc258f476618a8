"""Where a replica's KV events are: as its manager says, else asked of it, else as configured.

A manager has leased the ports and started the engine with them, so there is nothing to ask, and no
release of an engine that does not say it. One endpoint stands for all ranks of a server: both
engines count on from the port of rank 0.
"""

from __future__ import annotations

from typing import NamedTuple

import aiohttp

from proxy.core.kv_source import KvSource, listed_source, named_source, seen_from_here
from proxy.core.replica import parse_url

DISCOVERY_TIMEOUT = aiohttp.ClientTimeout(total=3.0)
DISCOVERY_BYTES_MAX = 4 * 1024 * 1024  # SGLang's server info is 20 KB


class LostError(Exception):
    """A source cannot be followed at the moment; the text says why."""


class Followed(NamedTuple):
    """A replica, or one rank of its engine, whose cache is to be known."""

    name: str
    url: str  # scheme and authority
    dp_rank: int | None = None
    told: KvSource | None = None  # by the manager, of rank 0
    restarts: int = 0


class Reach:
    """How to find a replica's events."""

    def __init__(
        self, session: aiohttp.ClientSession, api_key: str | None, configured: KvSource | None
    ) -> None:
        self.ask_by(session, api_key, configured)
        self._by_info: set[str] = set()  # URLs of engines that tell it in their server info alone

    def ask_by(
        self, session: aiohttp.ClientSession, api_key: str | None, configured: KvSource | None
    ) -> None:
        """Go on with these."""
        self._session = session
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._configured = configured

    async def find(self, replica: Followed) -> KvSource | None:
        """Return where they are, None when it has none. Raises `LostError`, `ValueError`."""
        _, host, _ = parse_url(replica.url)
        if replica.told is not None:
            return _of_rank(replica.told, host, replica.dp_rank)
        self._by_info.discard(replica.url)
        body = await self._get(replica.url + "/kv_event_sources")
        if body is not None:
            return listed_source(body, host, replica.dp_rank)
        source = await self._named(replica, host)
        if source is not None:
            self._by_info.add(replica.url)
        if source is not None or self._configured is None:
            return source
        return _of_rank(self._configured, host, replica.dp_rank)

    async def still(self, replica: Followed, source: KvSource) -> bool:
        """Say whether they are where they were found. Raises what `find` raises."""
        if replica.told is None and replica.url in self._by_info:
            _, host, _ = parse_url(replica.url)
            return await self._named(replica, host) == source
        return await self.find(replica) == source

    async def _named(self, replica: Followed, host: str) -> KvSource | None:
        body = await self._get(replica.url + "/server_info")
        return None if body is None else named_source(body, host, replica.dp_rank)

    async def _get(self, url: str) -> bytes | None:
        """Return what is there; None when nothing ever will be."""
        try:
            async with self._session.get(
                url, timeout=DISCOVERY_TIMEOUT, headers=self._headers
            ) as answer:
                if answer.status in (401, 403, 404, 405, 501):
                    return None
                if answer.status != 200:
                    raise LostError(f"it answers {answer.status} when asked for its events")
                body = bytearray()
                async for piece in answer.content.iter_any():
                    body += piece
                    if len(body) > DISCOVERY_BYTES_MAX:
                        raise LostError("it says without end where its events are")
                return bytes(body)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise LostError(f"it does not answer ({type(error).__name__})") from None


def _of_rank(source: KvSource, host: str, dp_rank: int | None) -> KvSource:
    """Return where the events of one rank are, as seen from here, of the source of rank 0."""
    rank = dp_rank or 0
    return KvSource(
        seen_from_here(source.endpoint, host, rank),
        seen_from_here(source.replay, host, rank) if source.replay else "",
        source.topic,
    )
