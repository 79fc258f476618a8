"""A suspender and reports of proxies that a test holds in its hand."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from backends.snapshots.base import Capability


class FakeSuspender:
    """Remembers what it was asked; raises `failure`; waits while `free` is not set."""

    def __init__(self) -> None:
        self.capability = Capability(works=True)
        self.asked: list[tuple[str, int, Mapping[str, str] | None]] = []
        self.failure: Exception | None = None
        self.free = asyncio.Event()
        self.free.set()

    @property
    def words(self) -> list[str]:
        return [word for word, _, _ in self.asked]

    def probe(self) -> Capability:
        return self.capability

    async def suspend(self, pid: int) -> int:
        await self._do("suspend", pid, None)
        return 1000

    async def resume(self, pid: int, devices: Mapping[str, str] | None = None) -> None:
        await self._do("resume", pid, devices)

    async def _do(self, word: str, pid: int, devices: Mapping[str, str] | None) -> None:
        self.asked.append((word, pid, devices))
        await self.free.wait()
        if self.failure is not None:
            raise self.failure


class FakeDemand:
    """What the proxies say that they have."""

    def __init__(self) -> None:
        self.on: dict[str, int] = {}

    def in_flight(self, replica_id: str) -> int | None:
        return self.on.get(replica_id)

    def expire(self, now_s: float) -> None:
        return None
