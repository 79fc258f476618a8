"""What the lines of tenants' jobs have used that engine workers compute: as proxies write it.

Lines that go to replicas pass a proxy, which writes their records. Engine workers get theirs from
the desk, so the desk writes them: a record for each result that counts, in the same form and, where
nothing else is said, in the same file (whole lines are appended, by whoever appends). It is written
a moment after the result is kept; a service that is killed between the two loses the records of
that moment and no result.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping, Sequence

import msgspec

from backends.clock import Clock
from backends.log import Log
from backends.offline.work import SPARE_PREFIX, Result
from proxy.config_access import ModelAccess
from proxy.contract.usage import UsageRecord

FLUSH_S = 0.5
RECORDS_MAX = 100_000  # that wait to be written; more are dropped and counted
KEY_ID = "internal"  # as of the lines that pass a proxy
_TOKENS_PRICED = 1_000_000

Taken = Sequence[tuple[str, str, Result]]  # tenant and model of each result that counts


class UsageLog:
    """One file, appended to."""

    def __init__(
        self, path: str, region: str, models: Mapping[str, ModelAccess], clock: Clock, log: Log
    ) -> None:
        """`path` is that of a file; 'off' and '-' are none that this service writes."""
        self.dropped = 0
        self._path = "" if path in {"off", "-"} else path
        self._region, self._models = region, models
        self._clock, self._log = clock, log
        self._waiting: list[UsageRecord] = []
        self._troubled = ""
        self._torn = False  # the file ends in half a line

    def configure(self, models: Mapping[str, ModelAccess]) -> None:
        """Go by these prices from now on."""
        self._models = models

    def take(self, worker_id: str, taken: Taken) -> None:
        """Note results; those of a dispatcher are written by the proxy that they passed."""
        if not self._path or worker_id.startswith(SPARE_PREFIX):
            return
        now_s = round(self._clock.unix_s(), 3)
        for tenant, model, result in taken:
            if len(self._waiting) >= RECORDS_MAX:
                self.dropped += 1
            elif result.prompt_tokens or result.completion_tokens:
                self._waiting.append(self._record(tenant, model, result, now_s))

    def _record(self, tenant: str, model: str, result: Result, now_s: float) -> UsageRecord:
        price = self._models.get(model, ModelAccess())
        fresh = result.prompt_tokens - result.cached_tokens
        cost = (
            fresh * price.prompt_price
            + result.cached_tokens * price.cached_price
            + result.completion_tokens * price.completion_price
        )
        return UsageRecord(
            at=now_s,
            request_id=result.request_id,
            tenant=tenant,
            key_id=KEY_ID,
            model=model,
            work_class="offline",
            region=self._region,
            status=result.status,
            prompt_tokens=result.prompt_tokens,
            cached_tokens=result.cached_tokens,
            completion_tokens=result.completion_tokens,
            estimated=False,
            cost=cost / _TOKENS_PRICED,
            stream=False,
        )

    async def run(self) -> None:
        """Write what waits, again and again, and what is left when cancelled."""
        try:
            while True:
                await asyncio.sleep(FLUSH_S)
                if self._waiting:
                    await asyncio.to_thread(self.flush)
        finally:
            self.flush()

    def flush(self) -> None:
        """Append what waits; where that fails, it goes on waiting."""
        records, self._waiting = self._waiting, []
        if not records:
            return
        lines = b"".join(msgspec.json.encode(record) + b"\n" for record in records)
        written = 0
        try:
            fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o640)
            try:
                # After half a line the next one begins anew; an empty line is none.
                written = os.write(fd, b"\n" * self._torn + lines) - self._torn
            finally:
                os.close(fd)
            self._troubled = ""
        except OSError as error:
            if str(error) != self._troubled:
                self._troubled = str(error)
                self._log.fault("usage_not_written", path=self._path, reason=self._troubled)
        if written < len(lines):  # a disk that is full may take a part
            self._torn = bool(written and lines[written - 1 : written] != b"\n") or self._torn
            left = records[lines[: max(0, written)].count(b"\n") :]
            self._waiting = [*left, *self._waiting][:RECORDS_MAX]
        else:
            self._torn = False
