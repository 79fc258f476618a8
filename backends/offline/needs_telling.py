"""Tells the manager, again and again, what is left to do: so it knows how many workers to keep.

The whole is told each time, never a difference; a manager that has just started knows all after
one interval, and one that hears nothing for `NEEDS_AGE_S_MAX` takes it that nothing is to be done
for this service. A manager of a release that does not know of jobs answers 404, which is no fault.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable

import aiohttp
import msgspec

from backends.clock import Clock
from backends.log import Log
from backends.offline.abilities import Abilities, problem_of
from backends.offline.records import StoreError
from backends.offline.store import Store
from backends.offline.work import NEEDS_INTERVAL_S, NEEDS_PATH, JobNeed, JobNeeds, name_of

ANSWER_S_MAX = 5.0
WORKERS_TOLD_MAX = 1_000


class NeedsTeller:
    """One service that tells one manager."""

    def __init__(
        self,
        store: Store,
        service_id: str,
        abilities: Abilities,
        has_replicas: Callable[[str], bool],
        clock: Clock,
        log: Log,
    ) -> None:
        """`has_replicas(model)` says whether others than engine workers do its lines."""
        self._store, self._service_id, self._clock, self._log = store, service_id, clock, log
        self._abilities, self._has_replicas = abilities, has_replicas
        self._in_vain: set[tuple[str, str]] = set()  # models and paths, each told once
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
        models = await self._store.needs()
        self._look_for_vain(models)
        rates = defaultdict[str, float](float)
        for worker_id, rate in self._store.rates().items():
            rates[name_of(worker_id)] += rate
        return JobNeeds(
            service_id=self._service_id,
            sequence=self._sequence,
            models=models,
            urls=self._abilities.urls(self._clock.unix_s()),
            rates=dict(sorted(rates.items())[:WORKERS_TOLD_MAX]),
        )

    def _look_for_vain(self, models: dict[str, tuple[JobNeed, ...]]) -> None:
        """Tell of what nobody understands."""
        wanted = {(model, need.url) for model, needs in models.items() for need in needs}
        in_vain = {pair for pair in wanted if pair[1] and self.nobody(*pair)}
        for model, url in sorted(in_vain - self._in_vain):
            self._log.caution("lines_in_vain", model=model, url=url, why=problem_of(model, url))
        self._in_vain = in_vain

    def nobody(self, model: str, url: str) -> bool:
        """Say whether nobody is known who could do such lines."""
        lacking = self._abilities.lacks(model, url, self._clock.unix_s())
        return lacking and not self._has_replicas(model)

    async def _tell(self, session: aiohttp.ClientSession, url: str) -> str:
        self._sequence += 1
        headers = {"content-type": "application/json"}
        try:
            told = msgspec.json.encode(await self.needs())
            async with session.post(url, data=told, headers=headers) as answer:
                return str(answer.status)
        except (aiohttp.ClientError, OSError, TimeoutError, StoreError) as error:
            return type(error).__name__
