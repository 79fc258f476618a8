"""The fleet as the proxies see it: numbered snapshots, one for many changes.

Changes arrive together (a scrape of every replica, a pool that comes up), so the first is published
at once and those of the next `PUBLISH_PAUSE_S` in one snapshot. Each snapshot is encoded once,
whatever the number of watchers, and a slow watcher skips to the newest: snapshots are whole,
so nothing is lost by it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import NamedTuple

from backends.clock import Clock, Timer
from proxy.contract import FleetSnapshot, PoolRecord, ReplicaRecord, encode_snapshot

PUBLISH_PAUSE_S = 0.05


class Told(NamedTuple):
    """What a snapshot is made of."""

    replicas: tuple[ReplicaRecord, ...]
    pools: tuple[PoolRecord, ...]
    workers: tuple[ReplicaRecord, ...] = ()


class Feed:
    """One writer, any number of readers."""

    def __init__(
        self,
        epoch: str,
        region: str,
        collect: Callable[[], Told],
        clock: Clock,
        told: Callable[[FleetSnapshot], None] = lambda _snapshot: None,
    ) -> None:
        """`told` hears of each snapshot, before anybody who waits for it."""
        self._collect = collect
        self._told = told
        self._clock = clock
        self._timer: Timer | None = None
        self._published_s = float("-inf")
        self._news = asyncio.Event()
        self.snapshot = FleetSnapshot(epoch=epoch, version=0, region=region)
        self.line = encode_snapshot(self.snapshot)

    @property
    def version(self) -> int:
        return self.snapshot.version

    def mark(self) -> None:
        """Something changed; publish now or, shortly after the last one, in a moment."""
        if self._timer is None:
            due_s = self._published_s + PUBLISH_PAUSE_S - self._clock.now_s()
            self._timer = self._clock.call_later(max(0.0, due_s), self._publish)

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._news.set()

    async def newer(self, version: int, wait_s: float) -> bool:
        """Wait until there is a snapshot after `version`; say whether there is."""
        if self.snapshot.version <= version:
            try:
                async with asyncio.timeout(wait_s):
                    await self._news.wait()
            except TimeoutError:
                return False
        return self.snapshot.version > version

    def _publish(self) -> None:
        self._timer = None
        told, before = self._collect(), self.snapshot
        if told == (before.replicas, before.pools, before.workers) and before.version:
            return
        self._published_s = self._clock.now_s()
        self.snapshot = FleetSnapshot(
            epoch=self.snapshot.epoch,
            version=self.snapshot.version + 1,
            region=self.snapshot.region,
            replicas=told.replicas,
            pools=told.pools,
            workers=told.workers,
        )
        self.line = encode_snapshot(self.snapshot)
        self._told(self.snapshot)
        self._news.set()
        self._news = asyncio.Event()
