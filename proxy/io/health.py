"""Probes of suspect replicas. Runs in the supervisor, once for all workers.

Health is passive first: a worker that was refused or cut takes the replica out at once and says so;
here it is asked, at once and then ever more slowly up to a second, until it answers, and then
every worker takes it back. A replica that has long been silent is asked too, but stays in while
it answers: a busy engine is not a dead one. Nobody is probed who serves.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import aiohttp

from proxy.core import limits
from proxy.io.tasks import Tasks

_log = logging.getLogger("doherty.health")


class Prober:
    """One probe task per suspect replica."""

    _session: aiohttp.ClientSession
    _endpoint: str
    _interval_s: float
    _timeout: aiohttp.ClientTimeout

    def __init__(
        self,
        tasks: Tasks,
        *,
        on_cleared: Callable[[str], None],
        on_silent: Callable[[str], None],
    ) -> None:
        self._tasks = tasks
        self._on_cleared = on_cleared
        self._on_silent = on_silent
        self._urls: dict[str, str] = {}
        self._suspects: set[str] = set()
        self.suspicions_total = 0
        self._doubted: set[str] = set()

    @property
    def suspects(self) -> frozenset[str]:
        return frozenset(self._suspects)

    @property
    def busy(self) -> bool:
        """Whether any replica is being asked."""
        return bool(self._suspects or self._doubted)

    def ask_by(
        self, session: aiohttp.ClientSession, *, endpoint: str, interval_s: float, timeout_s: float
    ) -> None:
        """How to ask, from the next probe on."""
        self._session = session
        self._endpoint = endpoint
        self._interval_s = interval_s
        self._timeout = aiohttp.ClientTimeout(total=timeout_s)

    def know(self, urls: dict[str, str]) -> None:
        """The replicas that exist, by id; probes of others end by themselves."""
        self._urls = urls

    def suspect(self, replica_id: str, reason: str) -> None:
        if replica_id in self._suspects or replica_id not in self._urls:
            return
        _log.warning("replica %s is suspect: %s", replica_id, reason)
        self._suspects.add(replica_id)
        self.suspicions_total += 1
        self._tasks.start(f"probe {replica_id}", self._probe(replica_id))

    def doubt(self, replica_id: str) -> None:
        """Ask a replica once; if it does not answer, it becomes a suspect for every worker."""
        if replica_id in self._suspects | self._doubted or replica_id not in self._urls:
            return
        self._doubted.add(replica_id)
        self._tasks.start(f"doubt {replica_id}", self._ask_once(replica_id))

    async def _ask_once(self, replica_id: str) -> None:
        try:
            url = self._urls.get(replica_id)
            if url is not None and not await self._answers(url):
                self._on_silent(replica_id)
                self.suspect(replica_id, "silent, and no answer to a probe")
        finally:
            self._doubted.discard(replica_id)

    async def _probe(self, replica_id: str) -> None:
        pause_s = limits.SUSPECT_PROBE_FIRST_S
        try:
            while (url := self._urls.get(replica_id)) is not None:
                if await self._answers(url):
                    _log.info("replica %s answers again", replica_id)
                    return
                await asyncio.sleep(pause_s)
                pause_s = min(self._interval_s, pause_s * 2)
        finally:
            self._suspects.discard(replica_id)
            self._on_cleared(replica_id)

    async def _answers(self, url: str) -> bool:
        try:
            async with self._session.get(url + self._endpoint, timeout=self._timeout) as answer:
                return answer.status == 200
        except (aiohttp.ClientError, TimeoutError, OSError):
            return False
