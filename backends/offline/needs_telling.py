"""Tells the manager, again and again, what is left to do: so it knows how many workers to keep.

The whole is told each time, never a difference; a manager that has just started knows all after
one interval, and one that hears nothing for `NEEDS_AGE_S_MAX` takes it that nothing is to be done
for this service. A manager of a release that does not know of jobs answers 404, which is no fault.
"""

from __future__ import annotations

import asyncio

import aiohttp
import msgspec

from backends.log import Log
from backends.offline.records import StoreError
from backends.offline.store import Store
from backends.offline.work import NEEDS_INTERVAL_S, NEEDS_PATH, JobNeeds

ANSWER_S_MAX = 5.0
WORKERS_TOLD_MAX = 1_000


class NeedsTeller:
    """One service that tells one manager."""

    def __init__(self, store: Store, service_id: str, log: Log) -> None:
        self._store, self._service_id, self._log = store, service_id, log
        self._sequence = 0
        self._said = ""  # what the manager answered last, so that a change is told once

    async def run(self, manager_url: str) -> None:
        timeout = aiohttp.ClientTimeout(total=ANSWER_S_MAX)
        async with aiohttp.ClientSession(timeout=timeout) as session:
            while True:
                said = await self._tell(session, manager_url + NEEDS_PATH)
                if said != self._said:
                    self._log.tell("needs_told", answer=said)
                    self._said = said
                await asyncio.sleep(NEEDS_INTERVAL_S)

    async def needs(self, _at_s: float = 0.0) -> JobNeeds:
        """Return what is to be told now."""
        return JobNeeds(
            service_id=self._service_id,
            sequence=self._sequence,
            models=await self._store.needs(),
            rates=dict(sorted(self._store.rates().items())[:WORKERS_TOLD_MAX]),
        )

    async def _tell(self, session: aiohttp.ClientSession, url: str) -> str:
        self._sequence += 1
        headers = {"content-type": "application/json"}
        try:
            told = msgspec.json.encode(await self.needs())
            async with session.post(url, data=told, headers=headers) as answer:
                return str(answer.status)
        except (aiohttp.ClientError, OSError, TimeoutError, StoreError) as error:
            return type(error).__name__
