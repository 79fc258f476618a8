"""Jobs: made, validated by one service at a time, begun, cancelled, and their results read.

A service that validates a job holds a claim on it, which each `add_lines` renews. When the service
dies the claim runs out, or its next life claims the same again under the same name; whoever has it
then starts anew, with what the first had added removed.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from backends.offline.database import Row, Transaction
from backends.offline.ending import Ender
from backends.offline.records import (
    CANCELLED,
    CANCELLING,
    IN_PROGRESS,
    VALIDATING,
    ClaimLostError,
    ConflictError,
    JobError,
    JobRecord,
    NewLine,
    NotFoundError,
    Page,
    ResultRecord,
)
from backends.offline.rows import CHECK, SELECT_FILE, SELECT_JOB, WORK, job_record, new_id, run_of
from backends.offline.schema import DONE

_WAIT_SLICE_S = 1.0  # between looks of one who waits for what another service may have stored


class JobStore(Ender):
    """The part of the store that knows jobs."""

    async def create_job(
        self,
        owner: str,
        input_file_id: str,
        endpoint: str,
        *,
        window_s: float,
        metadata: dict[str, str] | None = None,
        output_expires_after_s: float | None = None,
        job_id: str | None = None,
        tenant: str = "",
    ) -> JobRecord:
        """Make a job that is to be validated; with a `job_id` that exists, it is that one."""
        await self._require_room()
        now_s, job_id = self._clock.unix_s(), job_id or new_id("batch_")
        async with self._database.transaction() as transaction:
            found = await transaction.fetch(
                SELECT_FILE + " WHERE id = $1 AND owner = $2 AND state = 'ready' FOR UPDATE",
                input_file_id,
                owner,
            )
            if not found:
                raise NotFoundError(f"no file {input_file_id}")
            await transaction.execute(
                "INSERT INTO jobs (id, owner, endpoint, input_file_id, window_s, metadata, state, "
                "created_s, expires_s, output_keep_s, tenant) "
                "VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11) ON CONFLICT (id) DO NOTHING",
                job_id,
                owner,
                endpoint,
                input_file_id,
                window_s,
                msgspec.json.encode(metadata or {}).decode(),
                VALIDATING,
                now_s,
                now_s + window_s,
                output_expires_after_s,
                tenant,
            )
            await self._database.tell(transaction, CHECK)
        return await self.job(owner, job_id)

    async def job(self, owner: str, job_id: str) -> JobRecord:
        """Return one job."""
        return job_record(await self._job_row(owner, job_id))

    async def jobs(
        self, owner: str, *, after: str | None = None, limit: int = 20
    ) -> Page[JobRecord]:
        """Return the jobs made before the one with the id `after`, newest first."""
        before = 2**62 if after is None else int((await self._job_row(owner, after))[-1])
        async with self._database.reading() as reading:
            rows = await reading.fetch(
                SELECT_JOB + " WHERE owner = $1 AND number < $2 AND state <> 'gone' "
                "ORDER BY number DESC LIMIT $3",
                owner,
                before,
                limit + 1,
            )
        return Page(tuple(job_record(row) for row in rows[:limit]), len(rows) > limit)

    async def cancel_job(self, owner: str, job_id: str) -> JobRecord:
        """Stop a job; its lines that have no result get the error `batch_cancelled`."""
        async with self._database.transaction() as transaction:
            rows = await transaction.fetch(
                SELECT_JOB + " WHERE id = $1 AND owner = $2 AND state <> 'gone' FOR UPDATE",
                job_id,
                owner,
            )
            if not rows:
                raise NotFoundError(f"no batch {job_id}")
            job = job_record(rows[0])
            if job.state in (VALIDATING, IN_PROGRESS):
                await transaction.execute(
                    "UPDATE jobs SET state = $2, cancelling_s = $3 WHERE id = $1",
                    job_id,
                    CANCELLING,
                    self._clock.unix_s(),
                )
                await self._database.tell(transaction, CHECK)
            elif job.state not in (CANCELLING, CANCELLED):
                raise ConflictError(f"cannot cancel a batch with status '{job.state}'")
        return await self.job(owner, job_id)

    async def claim_validation(self, service_id: str, wait_s: float = 0.0) -> JobRecord | None:
        """Give a job to validate, the oldest first, for `hold_s`; `add_lines` renews the claim."""
        until_s = self._clock.now_s() + wait_s
        with self._bell.alarm(CHECK) as alarm:
            while True:
                job = await self._claim(service_id)
                left_s = until_s - self._clock.now_s()
                if job is not None or left_s <= 0:
                    return job
                await alarm.wait(min(left_s, _WAIT_SLICE_S))

    async def _claim(self, service_id: str) -> JobRecord | None:
        now_s = self._clock.unix_s()
        async with self._database.reading() as reading:
            if not await reading.fetch(_TO_CLAIM, VALIDATING, now_s, service_id):
                return None
        async with self._database.transaction() as transaction:
            found = await transaction.fetch(
                _TO_CLAIM + " FOR UPDATE SKIP LOCKED", VALIDATING, now_s, service_id
            )
            if not found:
                return None
            number = int(found[0][0])
            await transaction.execute(
                "UPDATE jobs SET claimed_by = $2, claimed_until_s = $3, total = 0, waiting = 0, "
                "tokens = 0 WHERE number = $1",
                number,
                service_id,
                now_s + self._limits.hold_s,
            )
            await transaction.execute("DELETE FROM lines WHERE job = $1", number)
            rows = await transaction.fetch(SELECT_JOB + " WHERE number = $1", number)
        return job_record(rows[0])

    async def add_lines(self, service_id: str, job_id: str, lines: Sequence[NewLine]) -> None:
        """Add lines to a job that this service validates; none counts before `begin_job`."""
        async with self._database.transaction() as transaction:
            number = await self._claimed(transaction, service_id, job_id)
            await transaction.execute_each(
                "INSERT INTO lines (job, number, custom_id, start, bytes, sort_key) "
                "VALUES ($1, $2, $3, $4, $5, $6)",
                [
                    (number, line.number, line.custom_id, line.offset, line.length, line.sort_key)
                    for line in lines
                ],
            )
            await transaction.execute(
                "UPDATE jobs SET total = total + $2, waiting = waiting + $2, tokens = tokens + $3, "
                "claimed_until_s = $4 WHERE number = $1",
                number,
                len(lines),
                sum(line.tokens for line in lines),
                self._clock.unix_s() + self._limits.hold_s,
            )

    async def begin_job(self, service_id: str, job_id: str, model: str) -> None:
        """Have the lines done that were added; all are of `model`."""
        now_s = self._clock.unix_s()
        async with self._database.transaction() as transaction:
            number = await self._claimed(transaction, service_id, job_id)
            # Whoever comes anew has waited no longer than its other jobs have.
            await transaction.execute(
                "UPDATE jobs SET state = $2, model = $3, in_progress_s = $4, claimed_by = '', "
                "turn = (SELECT max(turn) FROM jobs AS others WHERE others.owner = jobs.owner) "
                "WHERE number = $1",
                number,
                IN_PROGRESS,
                model,
                now_s,
            )
            await self._complete_if_done(transaction, number, now_s)
            await self._database.tell(transaction, WORK)

    async def fail_job(self, service_id: str, job_id: str, errors: Sequence[JobError]) -> None:
        """End a job that this service validates: nothing of it will be done."""
        now_s = self._clock.unix_s()
        async with self._database.transaction() as transaction:
            number = await self._claimed(transaction, service_id, job_id)
            await transaction.execute("DELETE FROM lines WHERE job = $1", number)
            await transaction.execute(
                "UPDATE jobs SET state = 'failed', failed_s = $2, ended_s = $2, errors = $3, "
                "total = 0, waiting = 0, claimed_by = '' WHERE number = $1",
                number,
                now_s,
                msgspec.json.encode(errors).decode(),
            )
            await self._database.tell(transaction, job_id)

    async def _claimed(self, transaction: Transaction, service_id: str, job_id: str) -> int:
        rows = await transaction.fetch(
            "SELECT number FROM jobs WHERE id = $1 AND state = $2 AND claimed_by = $3 FOR UPDATE",
            job_id,
            VALIDATING,
            service_id,
        )
        if not rows:
            raise ClaimLostError(f"{job_id} is not {service_id}'s to validate")
        return int(rows[0][0])

    async def results(
        self,
        owner: str,
        job_id: str,
        *,
        after: int = 0,
        limit: int = 100,
        wait_s: float = 0.0,
        in_order: bool = False,
    ) -> tuple[ResultRecord, ...]:
        """Return results as they came, those with a sequence above `after`.

        `in_order`: in the order of the lines, those with a number above `after`, up to the first
        line that is not done. There may be fewer than `limit`, so that they are not more than a MiB
        or so. When there are none it waits, at most `wait_s` and no longer than the job runs.
        """
        job = int((await self._job_row(owner, job_id))[-1])
        which = _IN_ORDER if in_order else _AS_COMPLETED
        return await self._awaited(job_id, wait_s, which, job, after, limit)

    async def result(
        self, owner: str, job_id: str, line: int | str, *, wait_s: float = 0.0
    ) -> ResultRecord:
        """Return the result of the line with this number or custom id, if there is one yet.

        When there is none it waits as `results` does.
        """
        job = int((await self._job_row(owner, job_id))[-1])
        which = _BY_NUMBER if isinstance(line, int) else _BY_CUSTOM_ID
        found = await self._awaited(job_id, wait_s, which, job, line)
        if not found:
            raise NotFoundError(f"{job_id} has no result of line {line}")
        return found[0]

    async def _awaited(
        self, job_id: str, wait_s: float, which: str, job: int, *values: int | str
    ) -> tuple[ResultRecord, ...]:
        """Return the results that there are, as soon as there are some; none after `wait_s`."""
        until_s = self._clock.now_s() + wait_s
        with self._bell.alarm(job_id) as alarm:
            while True:
                async with self._database.reading() as reading:
                    # First, so that what comes with the job's end is found.
                    ended = await reading.fetch(_HAS_ENDED, job)
                    rows = await self._bounded(reading, which, job, *values)
                left_s = until_s - self._clock.now_s()
                if rows or ended or left_s <= 0:
                    return tuple(map(_result, rows))
                await alarm.wait(min(left_s, _WAIT_SLICE_S))

    async def _bounded(
        self, reading: Transaction, which: str, job: int, *values: int | str
    ) -> list[Row]:
        """Read results; of a list no more at once than memory is granted for."""
        if which in (_AS_COMPLETED, _IN_ORDER):
            sizes = await reading.fetch(_SELECT_SIZE + which, job, *values)
            values = (values[0], run_of([int(row[0]) for row in sizes]))
        return await reading.fetch(_SELECT_RESULT + which, job, *values)


_TO_CLAIM = (
    "SELECT number FROM jobs WHERE state = $1 AND (claimed_until_s < $2 OR claimed_by = $3) "
    "ORDER BY number LIMIT 1"
)
_HAS_ENDED = "SELECT number FROM jobs WHERE number = $1 AND ended_s IS NOT NULL"
_SELECT_RESULT = (
    "SELECT results.number, results.sequence, lines.custom_id, results.failed, results.content "
    "FROM results JOIN lines ON lines.job = results.job AND lines.number = results.number "
)
_AS_COMPLETED = (
    "WHERE results.job = $1 AND results.sequence > $2 ORDER BY results.sequence LIMIT $3"
)
# The first line that is not done is looked for among as many as are wanted, and no further.
_IN_ORDER = (
    "WHERE results.job = $1 AND results.number > $2 AND results.number < COALESCE("  # noqa: S608
    "(SELECT undone.number FROM lines AS undone WHERE undone.job = $1 AND undone.number > $2 "
    f"AND undone.number <= $2 + $3 AND undone.state <> {DONE} ORDER BY undone.number LIMIT 1), "
    f"{2**62}) ORDER BY results.number LIMIT $3"
)
_SELECT_SIZE = "SELECT results.bytes FROM results "
_BY_NUMBER = "WHERE results.job = $1 AND results.number = $2"
_BY_CUSTOM_ID = "WHERE lines.job = $1 AND lines.custom_id = $2"


def _result(row: Row) -> ResultRecord:
    return ResultRecord(
        number=row[0], sequence=row[1], custom_id=row[2], failed=bool(row[3]), content=row[4]
    )
