"""Which replicas there are: a static list of URLs, or the manager's watch. Runs in the supervisor.

A source that falls silent takes nothing back: the data plane goes on with the fleet it last saw.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from types import MappingProxyType

import aiohttp
import msgspec

from proxy import tls
from proxy.contract import (
    FLEET_WATCH_PATH,
    HEARTBEAT_INTERVAL_S,
    SNAPSHOT_BYTES_MAX,
    FleetSnapshot,
    ReplicaRecord,
    ReplicaState,
    decode_snapshot,
)
from proxy.core.replica import parse_url

_log = logging.getLogger("doherty.registry")

NOTHING_KNOWN: Mapping[str, ReplicaRecord] = MappingProxyType({})
OnSnapshot = Callable[[FleetSnapshot], None]

RETRY_FIRST_S = 0.1
RETRY_MAX_S = 2.0
MODELS_REFRESH_S = 15.0
_MODELS_TIMEOUT = aiohttp.ClientTimeout(total=3.0)


class _ModelEntry(msgspec.Struct):
    id: str


class _ModelList(msgspec.Struct):
    data: list[_ModelEntry]


class StaticList:
    """Replicas named on the command line: their models are asked of themselves."""

    def __init__(
        self,
        urls: Sequence[str],
        session: aiohttp.ClientSession,
        api_key: str | None,
        *,
        known: Mapping[str, ReplicaRecord] = NOTHING_KNOWN,
        version: int = 0,
    ) -> None:
        """A list that follows another goes on from what that knew and had published."""
        self._session = session
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self.version = version
        # The URL is the name: every proxy given the same list builds the same ring.
        self.records = {
            url: known.get(url)
            or ReplicaRecord(
                replica_id=url.removeprefix("http://").removeprefix("https://").rstrip("/"),
                url=url.rstrip("/"),
                state=ReplicaState.STARTING,
                reason="its model list has not been read yet",
            )
            for url in urls
        }

    async def run(self, on_snapshot: OnSnapshot) -> None:
        """Publish the list, then each change of it, until cancelled."""
        self._publish(on_snapshot)
        await asyncio.gather(*(self._follow(url, on_snapshot) for url in self.records))

    def _publish(self, on_snapshot: OnSnapshot) -> None:
        self.version += 1
        records = tuple(self.records.values())
        on_snapshot(FleetSnapshot(epoch="static", version=self.version, replicas=records))

    async def _follow(self, url: str, on_snapshot: OnSnapshot) -> None:
        pause_s = RETRY_FIRST_S
        while True:
            old = self.records[url]
            models = await self._models(url)
            if isinstance(models, str):
                new = old
                if old.state is ReplicaState.STARTING and old.reason != models:
                    _log.warning("replica %s is not taken in yet: %s", old.replica_id, models)
                    new = msgspec.structs.replace(old, reason=models)
            else:
                new = msgspec.structs.replace(
                    old, models=models, state=ReplicaState.READY, reason=""
                )
                if new != old:
                    shown = ", ".join(models) or "any model"
                    _log.info("replica %s serves %s", old.replica_id, shown)
            if new != old:
                self.records[url] = new
                self._publish(on_snapshot)
            ready = new.state is ReplicaState.READY
            pause_s = MODELS_REFRESH_S if ready else min(RETRY_MAX_S, pause_s * 2)
            await asyncio.sleep(pause_s)

    async def _models(self, url: str) -> tuple[str, ...] | str:
        """Return the names it serves, none when it has no list; or why it cannot be asked."""
        try:
            async with self._session.get(
                f"{url.rstrip('/')}/v1/models", timeout=_MODELS_TIMEOUT, headers=self._headers
            ) as answer:
                if answer.status in (404, 405, 501):
                    return ()
                if answer.status != 200:
                    return f"/v1/models answers {answer.status}"
                body = bytearray()
                async for piece in answer.content.iter_any():
                    body += piece
                    if len(body) > SNAPSHOT_BYTES_MAX:
                        return "/v1/models answers without end"
            listed = msgspec.json.decode(body, type=_ModelList)
            return tuple(sorted(entry.id for entry in listed.data))
        except msgspec.MsgspecError:
            return "/v1/models answers no model list"
        except (aiohttp.ClientError, TimeoutError) as error:
            return f"it does not answer ({_why(error)})"


def _why(error: Exception) -> str:
    """Name a failure; one of TLS in the words of the data path."""
    for cause in (getattr(error, "certificate_error", None), getattr(error, "os_error", None)):
        if isinstance(cause, ssl.SSLError):
            return tls.explain(cause)
    return type(error).__name__


class ManagerWatch:
    """The fleet as a manager publishes it."""

    def __init__(self, url: str, session: aiohttp.ClientSession) -> None:
        self._url = url.rstrip("/") + FLEET_WATCH_PATH
        self._session = session

    async def run(self, on_snapshot: OnSnapshot) -> None:
        """Follow the watch and take it up again whenever it breaks, until cancelled."""
        pause_s = RETRY_FIRST_S
        lost = False
        while True:
            try:
                async for snapshot in self._watch():
                    if lost:
                        _log.info("the manager is back")
                    lost = False
                    pause_s = RETRY_FIRST_S
                    on_snapshot(snapshot)
                reason = "the watch ended"
            except (aiohttp.ClientError, TimeoutError, msgspec.MsgspecError, ValueError) as error:
                reason = str(error) or type(error).__name__
            if not lost:
                _log.warning("manager lost, going on with the fleet last seen: %s", reason)
                lost = True
            await asyncio.sleep(pause_s)
            pause_s = min(RETRY_MAX_S, pause_s * 2)

    async def _watch(self) -> AsyncIterator[FleetSnapshot]:
        timeout = aiohttp.ClientTimeout(sock_connect=2.0, sock_read=3 * HEARTBEAT_INTERVAL_S)
        async with self._session.get(self._url, timeout=timeout) as answer:
            answer.raise_for_status()
            buffer = bytearray()
            async for piece in answer.content.iter_any():
                buffer += piece
                if len(buffer) > SNAPSHOT_BYTES_MAX:
                    raise ValueError("a snapshot is larger than it may be")
                *lines, rest = bytes(buffer).split(b"\n")
                buffer = bytearray(rest)
                # Snapshots are whole: of several that came together only the last one counts.
                for line in [line for line in lines if line.strip()][-1:]:
                    yield decode_snapshot(line)


def check_urls(urls: Sequence[str]) -> None:
    """Raise `ValueError` naming the first URL that cannot be a replica's, or one given twice."""
    seen = set()
    for url in urls:
        authority = parse_url(url)
        if authority in seen:
            raise ValueError(f"replica URL {url!r} is given twice")
        seen.add(authority)
