"""Validates the input of new jobs, one pass over each file, in flat memory.

A job is claimed, so that of several services only one reads its file; a service that dies with it
loses the claim by time, and another begins anew. Lines go to the store as they are found good, and
count only when the whole file was. The reading is done in threads, a piece at a time, because a
file of 200 MB is a second of work which nobody else should wait for.

Ids are compared by hashes of 128 bits: two ids of one job that collide by chance are less likely
than a fault of the memory. They are what is kept per line, some 100 octets, bounded by `lines_max`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from xxhash import xxh3_128_digest

from backends.log import Log
from backends.offline.fleet_models import KnownModels
from backends.offline.records import (
    ClaimLostError,
    JobError,
    JobRecord,
    NewLine,
    NotFoundError,
    StoreError,
)
from backends.offline.store import Store
from backends.offline.tenants import Rights
from backends.offline.validation import FileCheck, LineReader, check_line, duplicate
from backends.tasks import place_of

CLAIM_WAIT_S = 10.0
PAUSE_S = 1.0  # after a failure of the store
LINES_AT_ONCE = 2_000  # of one transaction


class FilePass:
    """One pass over one file. `feed` runs in a thread, one call at a time."""

    def __init__(self, endpoint: str, lines_max: int, line_bytes_max: int) -> None:
        self._endpoint = endpoint
        self._line_bytes_max = line_bytes_max
        self._reader = LineReader(line_bytes_max)
        self._ids: set[bytes] = set()
        self.check = FileCheck(lines_max)
        self._number = 0

    def feed(self, octets: bytes | None) -> list[NewLine]:
        """Take the next octets, None for the end; return the lines of the job that ended."""
        pieces = self._reader.end() if octets is None else self._reader.feed(octets)
        found: list[NewLine] = []
        for piece in pieces:
            checked = check_line(piece, self._endpoint, self._line_bytes_max)
            if not isinstance(checked, JobError):
                digest = xxh3_128_digest(checked.custom_id.encode())
                if digest in self._ids:
                    checked = duplicate(piece.line, checked.custom_id)
                self._ids.add(digest)
            if self.check.add(checked) and not isinstance(checked, JobError):
                found.append(
                    NewLine(
                        number=self._number,
                        custom_id=checked.custom_id,
                        offset=checked.offset,
                        length=checked.length,
                        sort_key=checked.sort_key,
                        tokens=checked.tokens,
                    )
                )
                self._number += 1
            if self.check.full:
                break
        return found


class Validator:
    """Validates whatever job there is to validate, one after another."""

    def __init__(
        self,
        store: Store,
        models: KnownModels,
        rights: Rights,
        log: Log,
        *,
        service_id: str,
        lines_max: int,
        line_bytes_max: int,
    ) -> None:
        self._store, self._models, self._rights, self._log = store, models, rights, log
        self._service_id = service_id
        self._lines_max, self._line_bytes_max = lines_max, line_bytes_max

    async def run(self) -> None:
        troubled = ""  # told once, however long a store is away
        while True:
            try:
                job = await self._store.claim_validation(self._service_id, CLAIM_WAIT_S)
                troubled = ""
                if job is not None:
                    await self._validate(job)
            except ClaimLostError:
                continue  # cancelled, expired, or another service's by now
            except StoreError as error:
                if str(error) != troubled:
                    troubled = str(error)
                    self._log.caution("validation_interrupted", reason=troubled)
                await asyncio.sleep(PAUSE_S)

    async def _validate(self, job: JobRecord) -> None:
        try:
            errors, model, lines = await self._read(job)
        except NotFoundError:
            gone = JobError(code="file_not_found", message="The input file is gone.")
            errors, model, lines = (gone,), "", 0
        except StoreError:
            raise
        except Exception as error:  # noqa: BLE001  # one file must not end the validation of others
            what = f"{type(error).__name__}: {error}"
            self._log.fault("validation_failed", job=job.id, error=what, where=place_of(error))
            message = "The service failed at this file; its log has the cause."
            errors, model, lines = (JobError(code="server_error", message=message),), "", 0
        if errors:
            await self._store.fail_job(self._service_id, job.id, errors)
            self._log.tell("batch_refused", batch=job.id, errors=len(errors), first=errors[0].code)
        else:
            await self._store.begin_job(self._service_id, job.id, model)
            self._log.tell("batch_begun", batch=job.id, model=model, lines=lines)

    async def _read(self, job: JobRecord) -> tuple[Sequence[JobError], str, int]:
        whole = FilePass(job.endpoint, self._lines_max, self._line_bytes_max)
        async for octets in self._store.read_file(job.owner, job.input_file_id):
            await self._add(job, whole, await asyncio.to_thread(whole.feed, octets))
            if whole.check.full:
                break
        await self._add(job, whole, whole.feed(None))
        model = whole.check.model or ""
        known = self._models.knows(model) and self._rights.may_ask(job.tenant, model)
        errors = whole.check.end(model_known=known)
        return errors, model, whole.check.lines

    async def _add(self, job: JobRecord, whole: FilePass, lines: list[NewLine]) -> None:
        """Add lines to the job; once it cannot begin any more, only renew the claim."""
        if whole.check.problems or whole.check.full:
            lines = []
        for start in range(0, max(1, len(lines)), LINES_AT_ONCE):
            some = lines[start : start + LINES_AT_ONCE]
            await self._store.add_lines(self._service_id, job.id, some)
