"""Which replicas there are: a static list of URLs, or the manager's watch. Runs in the supervisor.

A source that falls silent takes nothing back: the data plane goes on with the fleet it last saw.

Loads change all the time, and a snapshot has the whole fleet: those of a static list are published
together, at most once in an interval, and only when they tell something new.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from types import MappingProxyType

import aiohttp
import msgspec

from proxy import tls
from proxy.contract import (
    FLEET_WATCH_PATH,
    SNAPSHOT_BYTES_MAX,
    FleetSnapshot,
    LoadSample,
    ReplicaRecord,
    ReplicaState,
    decode_snapshot,
    known_adapters,
    with_load,
)
from proxy.contract.bodies import TooLongError
from proxy.contract.engines import MODELS_PATH, Listing, read_listing
from proxy.core.replica import parse_url
from proxy.io.newest_lines import newest_lines
from proxy.io.scrape import Scraper, ask, begun_anew
from proxy.io.tasks import beat

_log = logging.getLogger("doherty.registry")

NOTHING_KNOWN: Mapping[str, ReplicaRecord] = MappingProxyType({})
OnSnapshot = Callable[[FleetSnapshot], None]

RETRY_FIRST_S = 0.1
RETRY_MAX_S = 2.0
MODELS_REFRESH_S = 15.0
# A reading that tells nothing new is published all the same when the last one is so old: readers
# go by its age, and an engine that idles is not one that is silent.
LOAD_REFRESH_S = 5.0
# Of the interval: engines answer in that time, as a rule.
PUBLISH_AFTER = 0.1
STATIC_EPOCH = "static"  # of snapshots that no manager has made
_NO_LIST = Listing((), None, "unknown")


class StaticList:
    """Replicas named on the command line; they are asked what they serve, and how busy they are."""

    def __init__(
        self,
        urls: Sequence[str],
        session: aiohttp.ClientSession,
        api_key: str | None,
        *,
        known: Mapping[str, ReplicaRecord] = NOTHING_KNOWN,
        version: int = 0,
        scrape_interval_s: float = 0.0,
    ) -> None:
        """A list that follows another goes on from what that knew and had published."""
        self._interval_s = scrape_interval_s
        self._news = asyncio.Event()  # a load has changed that is not published
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
        await asyncio.gather(
            self._publish_loads(on_snapshot),
            *(self._follow(url, on_snapshot) for url in self.records),
        )

    def _publish(self, on_snapshot: OnSnapshot) -> None:
        self._news.clear()
        self.version += 1
        records = tuple(self.records.values())
        on_snapshot(FleetSnapshot(epoch=STATIC_EPOCH, version=self.version, replicas=records))

    async def _publish_loads(self, on_snapshot: OnSnapshot) -> None:
        """Publish what has changed a moment after all were asked."""
        while True:
            await self._news.wait()
            await beat(self._interval_s, after_s=PUBLISH_AFTER * self._interval_s)
            self._publish(on_snapshot)

    async def _follow(self, url: str, on_snapshot: OnSnapshot) -> None:
        record = self.records[url]
        scraper = Scraper(record.replica_id, record.url, self._session, self._headers)
        loop = asyncio.get_running_loop()
        pause_s, listed_s, listed = RETRY_FIRST_S, 0.0, record.adapters
        while True:
            old = new = self.records[url]
            if old.state is not ReplicaState.READY or loop.time() >= listed_s + MODELS_REFRESH_S:
                listed_s = loop.time()
                listing = await self._list(url)
                new = _taken_in(old, listing)
                listed = listed if isinstance(listing, str) else listing.adapters
            ready = new.state is ReplicaState.READY
            if ready and self._interval_s:
                new = await _scraped(scraper, new, listed)
            if _apart_from_load(new) != _apart_from_load(old):
                self.records[url] = new
                self._publish(on_snapshot)
            elif _tells_news(old.load, new.load):
                self.records[url] = new
                self._news.set()
            if ready and self._interval_s and not scraper.silent:
                await beat(self._interval_s)
            else:
                pause_s = MODELS_REFRESH_S if ready else min(RETRY_MAX_S, pause_s * 2)
                await asyncio.sleep(pause_s)

    async def _list(self, url: str) -> Listing | str:
        """Return the names it serves, none when it has no list; or why it cannot be asked."""
        try:
            status, body = await ask(
                self._session, url.rstrip("/") + MODELS_PATH, self._headers, SNAPSHOT_BYTES_MAX
            )
        except TooLongError:
            return f"{MODELS_PATH} answers without end"
        except (aiohttp.ClientError, TimeoutError) as error:
            return f"it does not answer ({_why(error)})"
        if status in (404, 405, 501):
            return _NO_LIST
        if status != 200:
            return f"{MODELS_PATH} answers {status}"
        return read_listing(body) or f"{MODELS_PATH} answers no model list"


def _taken_in(old: ReplicaRecord, listing: Listing | str) -> ReplicaRecord:
    """Return the record of a replica that has said what it serves, or why it has not."""
    if isinstance(listing, str):
        if old.state is ReplicaState.STARTING and old.reason != listing:
            _log.warning("replica %s is not taken in yet: %s", old.replica_id, listing)
            return msgspec.structs.replace(old, reason=listing)
        return old
    new = msgspec.structs.replace(
        old,
        models=tuple(sorted(listing.names)),
        adapters=known_adapters(listing.adapters, old.load),
        engine=old.engine if listing.kind == _NO_LIST.kind else listing.kind,
        state=ReplicaState.READY,
        reason="",
    )
    if (new.models, new.state) != (old.models, old.state):
        shown = ", ".join(new.models) or "any model"
        _log.info("replica %s serves %s", old.replica_id, shown)
    return new


async def _scraped(
    scraper: Scraper, record: ReplicaRecord, listed: tuple[str, ...] | None
) -> ReplicaRecord:
    """Return `record` with what the engine says of itself now, if it says anything."""
    found = await scraper.read(record.engine)
    if found is None:
        return record
    kind, load = found
    restarts = record.restarts
    anew = record.load is None or scraper.was_down
    if record.load is not None and begun_anew(record.load, load):
        anew, restarts = True, restarts + 1  # with an empty cache, though nobody saw it go
    scraper.was_down = False
    record = msgspec.structs.replace(record, engine=kind, restarts=restarts)
    return with_load(record, load, listed, anew=anew)


def _apart_from_load(record: ReplicaRecord) -> ReplicaRecord:
    return msgspec.structs.replace(record, load=None)


def _tells_news(old: LoadSample | None, new: LoadSample | None) -> bool:
    """Whether a reading is worth a snapshot; `old` is the last one that was."""
    if old is None or new is None:
        return old is not new
    aged = new.at_s - old.at_s >= LOAD_REFRESH_S
    return aged or msgspec.structs.replace(new, at_s=old.at_s) != old


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
        self.heard_s = time.monotonic()

    def silence_s(self) -> float:
        """Return for how long nothing has been heard of the manager, not even its pulse."""
        return time.monotonic() - self.heard_s

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
        async for line in newest_lines(self._session, self._url, SNAPSHOT_BYTES_MAX):
            self.heard_s = time.monotonic()
            if line:
                yield decode_snapshot(line)


def check_urls(urls: Sequence[str]) -> None:
    """Raise `ValueError` naming the first URL that cannot be a replica's, or one given twice."""
    seen = set()
    for url in urls:
        authority = parse_url(url)
        if authority in seen:
            raise ValueError(f"replica URL {url!r} is given twice")
        seen.add(authority)
