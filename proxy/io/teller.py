"""What this proxy tells its manager of its work, summed over its workers. Runs in the supervisor.

A report is the whole, so none is repeated: one that fails is made good by the next. A manager that
is away, or one that takes no reports, is told of in the log once, and once when it is back.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence

import aiohttp
import msgspec

from proxy.contract.demand import DEMAND_INTERVAL_S, DEMAND_PATH, Demand, encode_demand
from proxy.contract.regions import SUMMARY_AGE_S_MAX, ModelSummary
from proxy.core import limits
from proxy.core.demand import counted, sum_models, sum_replicas
from proxy.core.summary import merge
from proxy.core.wanting import Between
from proxy.io.control import Demanded, Summarised
from proxy.io.tasks import beat
from proxy.io.telemetry import Sample

_log = logging.getLogger("doherty.demand")


class Teller:
    """All workers' demand, by the origin of each, and the one who posts it."""

    def __init__(self, session: Callable[[], aiohttp.ClientSession]) -> None:
        """`session()` returns the client by which managers are asked now."""
        self._session = session
        self._url: str | None = None
        self._of: dict[int, Demanded | None] = {}  # by origin; None: it has said nothing yet
        # For other regions, by origin, and when it was said.
        self._seen: dict[int, tuple[float, Mapping[str, ModelSummary]]] = {}
        self.between: Callable[[Sequence[Demanded]], Between] = lambda _: ({}, {})
        self._departed = Demanded({}, {})
        self._urgent = asyncio.Event()
        self._proxy_id = os.urandom(8).hex()
        self._sequence = 0
        self._posting = asyncio.Lock()  # no report overtakes the last one
        self._ended = False
        self._sent_total = 0
        self._failed_total = 0
        self._refused = ""  # why the last one was not taken

    def tell(self, manager_url: str | None) -> None:
        """Report there from now on; None: nowhere."""
        self._url = manager_url.rstrip("/") + DEMAND_PATH if manager_url else None

    # --- the workers -------------------------------------------------------------------------

    def join(self, origin: int) -> None:
        """A worker has been started, and may choose before it has told anything."""
        self._of[origin] = None

    def hear(self, origin: int, said: Demanded | Summarised) -> None:
        if origin not in self._of:
            return
        if isinstance(said, Summarised):
            self._seen[origin] = (time.monotonic(), said.models)
            return
        self._of[origin] = said
        if said.at_once:
            self._urgent.set()

    def hurry(self) -> None:
        """Report at once: somebody may wait for what there is to say."""
        self._urgent.set()

    def summary(self) -> dict[str, ModelSummary] | None:
        """Return what other regions are told of this one's models.

        None: no worker has said anything for long, so that nobody would be served here.
        """
        since_s = time.monotonic() - SUMMARY_AGE_S_MAX
        fresh = [models for at_s, models in self._seen.values() if at_s >= since_s]
        return merge(fresh) if fresh else None

    def leave(self, origin: int) -> None:
        """It is no more, and neither is what it had in hand."""
        self._seen.pop(origin, None)
        last = self._of.pop(origin, None)
        if last is not None:
            models = sum_models((self._departed.models, counted(last.models)))
            self._departed = Demanded(models, {})

    def demand(self) -> Demand:
        """Return the next report."""
        self._sequence += 1
        told = [one for one in self._of.values() if one is not None]
        epochs = {one.epoch for one in told}
        # One that has said nothing may still do anything: then nothing is known of any fleet.
        known = len(epochs) == 1 and len(told) == len(self._of)
        elsewhere, wanted = self.between(told)
        return Demand(
            proxy_id=self._proxy_id,
            sequence=self._sequence,
            models=sum_models((self._departed.models, *(one.models for one in told))),
            replicas=sum_replicas(one.replicas for one in told),
            fleet_epoch=epochs.pop() if known else "",
            fleet_version=min(one.version for one in told) if known else 0,
            elsewhere=elsewhere,
            wanted=wanted,
        )

    # --- the manager -------------------------------------------------------------------------

    async def run(self) -> None:
        """Report until cancelled."""
        while True:
            if self._url is None:
                await beat(DEMAND_INTERVAL_S)
            else:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(DEMAND_INTERVAL_S):
                        await self._urgent.wait()
            self._urgent.clear()
            async with self._posting:
                if self._url is not None and not self._ended:
                    await self._report(self._url, self.demand())
                    await asyncio.sleep(limits.DEMAND_PUSH_S)

    async def farewell(self) -> None:
        """All workers have ended: say so, and report no more."""
        self._ended = True
        for origin in list(self._of):
            self.leave(origin)
        async with self._posting:
            if self._url is not None:
                last = msgspec.structs.replace(self.demand(), last=True)
                await self._report(self._url, last)

    async def _report(self, url: str, demand: Demand) -> None:
        try:
            timeout = aiohttp.ClientTimeout(total=limits.DEMAND_TIMEOUT_S)
            async with self._session().post(
                url,
                data=encode_demand(demand),
                headers={"Content-Type": "application/json"},
                timeout=timeout,
                allow_redirects=False,
            ) as answer:
                refused = f"it answers {answer.status}" if answer.status >= 300 else ""
        except (aiohttp.ClientError, OSError, RuntimeError) as error:  # a session may be closed
            refused = str(error) or type(error).__name__
        if refused:
            self._failed_total += 1
            if not self._refused:
                _log.warning("the manager takes no reports of demand: %s", refused)
        else:
            self._sent_total += 1
            if self._refused:
                _log.info("the manager takes reports of demand again")
        self._refused = refused

    def samples(self) -> list[Sample]:
        """Return counters."""
        return [
            Sample("demand_reports_total", (("outcome", "sent"),), self._sent_total),
            Sample("demand_reports_total", (("outcome", "failed"),), self._failed_total),
        ]
