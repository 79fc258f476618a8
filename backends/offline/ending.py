"""How jobs end: results are added, counted, and the last one makes the files, in one transaction.

What a job's row says (counts, sizes, sums, the next sequence) changes together with the results
that it counts, under a lock on that row; so the counts are right at every moment, and no moment
exists in which all lines are done and the job is not. Large work, such as an error for each of
50,000 lines that nobody did, goes in slices of a transaction each: after a crash the next one who
looks goes on where it ended.
"""

from __future__ import annotations

from collections.abc import Sequence

from backends.offline.database import Transaction
from backends.offline.outcomes import failed, written
from backends.offline.records import (
    CANCELLED_ERROR,
    CANCELLING,
    COMPLETED,
    EXPIRED_ERROR,
    FINALIZING,
    IN_PROGRESS,
    VALIDATING,
    FileRecord,
)
from backends.offline.rows import LOCK_JOB, Part, insert_file, new_id
from backends.offline.schema import DONE
from backends.offline.work import LineError, Result

_SLICE = 2000  # lines or pieces of one transaction
_PIECES_AT_ONCE = 64  # of one transaction that deletes


class Ender(Part):
    """The part of the store that ends what has to end."""

    async def _add_results(
        self,
        transaction: Transaction,
        job: int,
        results: Sequence[tuple[str, Result]],
        now_s: float,
    ) -> None:
        """Add results with their custom ids; the job's row is locked, and their lines are DONE."""
        lines = [(r.number, int(failed(r)), written(custom_id, r)) for custom_id, r in results]
        errors = sum(bad for _, bad, _ in lines)
        error_bytes = sum(len(content) for _, bad, content in lines if bad)
        rows = await transaction.fetch(
            "UPDATE jobs SET sequence = sequence + $2, completed = completed + $3, "
            "failed = failed + $4, output_bytes = output_bytes + $5, "
            "error_bytes = error_bytes + $6, prompt_tokens = prompt_tokens + $7, "
            "cached_tokens = cached_tokens + $8, completion_tokens = completion_tokens + $9 "
            "WHERE number = $1 RETURNING sequence, id, completed + failed = total",
            job,
            len(lines),
            len(lines) - errors,
            errors,
            sum(len(content) for _, _, content in lines) - error_bytes,
            error_bytes,
            sum(result.prompt_tokens for _, result in results),
            sum(result.cached_tokens for _, result in results),
            sum(result.completion_tokens for _, result in results),
        )
        sequence, job_id = int(rows[0][0]) - len(lines) + 1, str(rows[0][1])
        await transaction.execute_each(
            "INSERT INTO results (job, number, sequence, failed, bytes, content) "
            "VALUES ($1, $2, $3, $4, $5, $6)",
            [
                (job, number, sequence + index, bad, len(content), content)
                for index, (number, bad, content) in enumerate(lines)
            ],
        )
        if rows[0][2]:
            await self._complete_if_done(transaction, job, now_s)
        await self._database.tell(transaction, job_id)

    async def _complete_if_done(self, transaction: Transaction, job: int, now_s: float) -> None:
        rows = await transaction.fetch(
            "UPDATE jobs SET state = $2, finalizing_s = $3, completed_s = $3 "
            "WHERE number = $1 AND state = $4 AND completed + failed = total RETURNING number",
            job,
            COMPLETED,
            now_s,
            IN_PROGRESS,
        )
        if rows:
            await self._make_files(transaction, job, now_s)

    async def _make_files(self, transaction: Transaction, job: int, now_s: float) -> None:
        """Give a job that has ended the files that its results are; an empty one does not exist."""
        rows = await transaction.fetch(
            "SELECT id, owner, completed, failed, output_bytes, error_bytes, output_keep_s "
            "FROM jobs WHERE number = $1",
            job,
        )
        job_id, owner, completed, bad, output_bytes, error_bytes, keep_s = rows[0]
        ids: list[str | None] = []
        for kind, lines, size in (
            ("output", completed, output_bytes),
            ("errors", bad, error_bytes),
        ):
            if not lines:
                ids.append(None)
                continue
            record = FileRecord(
                id=new_id("file-"),
                owner=owner,
                filename=f"{job_id}_{kind.removesuffix('s')}.jsonl",
                purpose="batch_output",
                bytes=size,
                created_s=now_s,
                expires_s=now_s + (self._limits.keep_s if keep_s is None else keep_s),
                ready=True,
            )
            await insert_file(transaction, record, kind=kind, job=job)
            ids.append(record.id)
        await transaction.execute(
            "UPDATE jobs SET output_file_id = $2, error_file_id = $3, ended_s = $4, waiting = 0 "
            "WHERE number = $1",
            job,
            ids[0],
            ids[1],
            now_s,
        )
        await self._database.tell(transaction, job_id)

    async def finish_due(self) -> int:
        """Expire what is overdue, and end what is cancelled or expired; return how many ended."""
        now_s = self._clock.unix_s()
        async with self._database.reading() as reading:
            due = await reading.fetch(
                "SELECT number FROM jobs WHERE state IN ('cancelling', 'finalizing') OR "
                "(state IN ('validating', 'in_progress') AND expires_s <= $1) ORDER BY number",
                now_s,
            )
        ended = 0
        for row in due:
            while (more := await self._finish(int(row[0]), now_s)) is not None:
                if not more:
                    ended += 1
                    break
        return ended

    async def _finish(self, job: int, now_s: float) -> bool | None:
        """Do a slice of a job's end; True: there is more, None: it is somebody else's."""
        async with self._database.transaction() as transaction:
            rows = await transaction.fetch(LOCK_JOB + " SKIP LOCKED", job)
            if not rows:
                return None
            state = str(rows[0][2])
            if state in (VALIDATING, IN_PROGRESS):
                overdue = await transaction.fetch(
                    "UPDATE jobs SET state = $2, finalizing_s = $3 WHERE number = $1 "
                    "AND expires_s <= $3 RETURNING number",
                    job,
                    FINALIZING,
                    now_s,
                )
                return True if overdue else None
            if state not in (CANCELLING, FINALIZING):
                return None
            error = CANCELLED_ERROR if state == CANCELLING else EXPIRED_ERROR
            if await self._refuse_slice(transaction, job, str(rows[0][1]), error, now_s):
                return True
            await transaction.execute(
                "UPDATE jobs SET state = 'cancelled', cancelled_s = $2 WHERE number = $1"
                if state == CANCELLING
                else "UPDATE jobs SET state = 'expired', expired_s = $2 WHERE number = $1",
                job,
                now_s,
            )
            await self._make_files(transaction, job, now_s)
            return False

    async def _refuse_slice(
        self, transaction: Transaction, job: int, job_id: str, error: LineError, now_s: float
    ) -> bool:
        """Give some lines that have no result this error; False: there were none."""
        begun = await transaction.fetch(
            "SELECT number FROM jobs WHERE number = $1 AND in_progress_s IS NOT NULL", job
        )
        if not begun:  # its lines were never counted: nobody knows whether there are more
            await transaction.execute("DELETE FROM lines WHERE job = $1", job)
            await transaction.execute("UPDATE jobs SET total = 0 WHERE number = $1", job)
            return False
        rows = await transaction.fetch(
            "SELECT number, custom_id FROM lines WHERE job = $1 AND state <> $2 "
            "ORDER BY number LIMIT $3",
            job,
            DONE,
            _SLICE,
        )
        if not rows:
            return False
        await transaction.execute_each(
            "UPDATE lines SET state = $3, chunk = NULL WHERE job = $1 AND number = $2",
            [(job, row[0], DONE) for row in rows],
        )
        results = [(str(row[1]), Result(job_id=job_id, number=row[0], error=error)) for row in rows]
        await self._add_results(transaction, job, results, now_s)
        return True

    async def prune(self) -> int:
        """Let go of what is past its time, slice by slice; return how many rows went."""
        now_s = self._clock.unix_s()
        async with self._database.transaction() as transaction:
            old = await transaction.fetch(
                "SELECT number FROM files WHERE (state = 'ready' AND expires_s <= $1) "
                "OR (state = 'uploading' AND touched_s <= $2) FOR UPDATE SKIP LOCKED",
                now_s,
                now_s - _UPLOAD_SILENCE_S_MAX,
            )
            # A statement of its own, that sees jobs which were made while the lock was waited for.
            await transaction.execute_each(
                "UPDATE files SET state = 'gone' WHERE number = $1 AND NOT EXISTS (SELECT 1 "
                "FROM jobs WHERE jobs.input_file_id = files.id AND jobs.ended_s IS NULL)",
                [(row[0],) for row in old],
            )
            # As long as its files may be read, a job stays.
            await transaction.execute(
                "UPDATE jobs SET state = 'gone' WHERE ended_s + $2 <= $1 "
                "AND (output_keep_s IS NULL OR ended_s + output_keep_s <= $1)",
                now_s,
                self._limits.keep_s,
            )
        gone = 0
        gone += await self._prune_files()
        gone += await self._prune_jobs()
        await self._database.tidy()
        return gone

    async def _prune_files(self) -> int:
        gone = 0
        async with self._database.reading() as reading:
            files = await reading.fetch(
                "SELECT number, kind, job FROM files WHERE state = 'gone' ORDER BY number"
            )
        for number, kind, job in files:
            bad = kind == "errors"
            if kind == "stored":
                went, whole = await self._delete(_LOCK_FILE, number, _DELETE_PIECES, number)
            else:
                which = _DELETE_ERRORS if bad else _DELETE_OUTPUT
                went, whole = await self._delete(_LOCK_FILE, number, which, job)
            gone += went
            if not whole:
                continue
            async with self._database.transaction() as transaction:
                if kind != "stored":
                    await transaction.execute(_NO_ERRORS if bad else _NO_OUTPUT, job)
                await transaction.execute("DELETE FROM files WHERE number = $1", number)
        return gone

    async def _prune_jobs(self) -> int:
        gone = 0
        async with self._database.reading() as reading:
            jobs = await reading.fetch("SELECT number FROM jobs WHERE state = 'gone'")
        for (number,) in jobs:
            for sql in (_DELETE_OUTPUT, _DELETE_ERRORS, _DELETE_LINES):
                went, whole = await self._delete(LOCK_JOB + " SKIP LOCKED", number, sql, number)
                gone += went
                if not whole:
                    break
            else:
                async with self._database.transaction() as transaction:
                    await transaction.execute("DELETE FROM files WHERE job = $1", number)
                    await transaction.execute("DELETE FROM jobs WHERE number = $1", number)
        return gone

    async def _delete(self, lock: str, owner: int, sql: str, number: int) -> tuple[int, bool]:
        """Delete rows in slices, each under the lock of what owns them.

        Return how many went, and whether that was all: not when another service is at it.
        """
        gone, slice_rows = 0, _PIECES_AT_ONCE if sql == _DELETE_PIECES else _SLICE
        while True:
            async with self._database.transaction() as transaction:
                if not await transaction.fetch(lock, owner):
                    return gone, False
                rows = await transaction.fetch(sql, number, slice_rows)
            gone += len(rows)
            if len(rows) < slice_rows:
                return gone, True


_UPLOAD_SILENCE_S_MAX = 3600.0  # after which an upload is taken for abandoned

# Up to the last of the first so many: a range of the key, which no planner reads more of.
_DELETE_PIECES = (
    "DELETE FROM pieces WHERE file = $1 AND piece <= (SELECT max(piece) FROM "
    "(SELECT piece FROM pieces WHERE file = $1 ORDER BY piece LIMIT $2) AS few) RETURNING piece"
)
_DELETE_OUTPUT = (
    "DELETE FROM results WHERE job = $1 AND failed = 0 AND number <= (SELECT max(number) FROM "
    "(SELECT number FROM results WHERE job = $1 AND failed = 0 ORDER BY number LIMIT $2) AS few) "
    "RETURNING number"
)
_DELETE_ERRORS = (
    "DELETE FROM results WHERE job = $1 AND failed = 1 AND number <= (SELECT max(number) FROM "
    "(SELECT number FROM results WHERE job = $1 AND failed = 1 ORDER BY number LIMIT $2) AS few) "
    "RETURNING number"
)
_LOCK_FILE = "SELECT number FROM files WHERE number = $1 FOR UPDATE SKIP LOCKED"
_NO_OUTPUT = "UPDATE jobs SET output_bytes = 0 WHERE number = $1"
_NO_ERRORS = "UPDATE jobs SET error_bytes = 0 WHERE number = $1"
_DELETE_LINES = (
    "DELETE FROM lines WHERE job = $1 AND number <= (SELECT max(number) FROM "
    "(SELECT number FROM lines WHERE job = $1 ORDER BY number LIMIT $2) AS few) RETURNING number"
)
