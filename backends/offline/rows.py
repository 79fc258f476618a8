"""How files and jobs stand in their tables, and what every part of the store has in hand."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import msgspec

from backends.clock import Clock
from backends.offline.database import Bell, Database, Row, Transaction
from backends.offline.records import (
    FileRecord,
    FullError,
    JobError,
    JobRecord,
    Limits,
    NotFoundError,
)

WORK = "work"  # topic: there may be lines to give
CHECK = "check"  # topic: there is a job to validate
# In this order, and before chunks and lines, so that no two transactions wait for each other.
LOCK_JOB = "SELECT number, id, state, tenant, model FROM jobs WHERE number = $1 FOR UPDATE"
_RUN_BYTES = 1024 * 1024  # of results that are in memory at once, or one that is larger
_ROOM_AGE_S_MAX = 5.0  # of a sum over all files, before it is made anew

SELECT_FILE = (
    "SELECT id, owner, filename, purpose, bytes, created_s, expires_s, state, number, kind, job "
    "FROM files"
)
SELECT_JOB = (
    "SELECT id, owner, endpoint, input_file_id, window_s, metadata, state, model, errors, "
    "created_s, expires_s, in_progress_s, finalizing_s, completed_s, failed_s, expired_s, "
    "cancelling_s, cancelled_s, output_file_id, error_file_id, total, completed, failed, "
    "prompt_tokens, cached_tokens, completion_tokens, busy_s, tokens, tenant, number FROM jobs"
)
_JOB_FIELDS = JobRecord.__struct_fields__


class Part:
    """What each part of the store is made of."""

    def __init__(self, database: Database, clock: Clock, limits: Limits, bell: Bell) -> None:
        self._database = database
        self._clock = clock
        self._limits = limits
        self._bell = bell
        self._bytes_used = 0
        self._bytes_counted_s = float("-inf")

    async def _require_room(self, more_bytes: int = 0) -> None:
        """Refuse what would go beyond the room that is granted; exact to a few seconds."""
        now_s = self._clock.unix_s()
        if now_s - self._bytes_counted_s > _ROOM_AGE_S_MAX:
            async with self._database.reading() as reading:
                rows = await reading.fetch(
                    "SELECT coalesce(sum(bytes), 0) FROM files WHERE kind = 'stored' UNION ALL "
                    "SELECT coalesce(sum(output_bytes + error_bytes), 0) FROM jobs"
                )
            self._bytes_used = sum(int(row[0]) for row in rows)
            self._bytes_counted_s = now_s
        if self._bytes_used + more_bytes > self._limits.bytes_max:
            raise FullError(
                f"the store holds {self._bytes_used} of {self._limits.bytes_max} octets: delete "
                "files, or grant it more (offline.store_bytes_max)"
            )
        self._bytes_used += more_bytes

    async def _file_row(self, owner: str, file_id: str) -> Row:
        async with self._database.reading() as reading:
            rows = await reading.fetch(
                SELECT_FILE + " WHERE id = $1 AND owner = $2 AND state = 'ready'", file_id, owner
            )
        if not rows:
            raise NotFoundError(f"no file {file_id}")
        return rows[0]

    async def _job_row(self, owner: str, job_id: str) -> Row:
        async with self._database.reading() as reading:
            rows = await reading.fetch(
                SELECT_JOB + " WHERE id = $1 AND owner = $2 AND state <> 'gone'", job_id, owner
            )
        if not rows:
            raise NotFoundError(f"no batch {job_id}")
        return rows[0]


def new_id(kind: str) -> str:
    """Make a name that nobody can guess."""
    return kind + os.urandom(12).hex()


async def insert_file(
    transaction: Transaction, record: FileRecord, *, kind: str, job: int | None = None
) -> int:
    """Add a file; return its number. `kind` is stored, output or errors."""
    rows = await transaction.fetch(
        "INSERT INTO files (id, owner, filename, purpose, state, kind, job, bytes, created_s, "
        "touched_s, expires_s) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $9, $10) "
        "RETURNING number",
        record.id,
        record.owner,
        record.filename,
        record.purpose,
        "ready" if record.ready else "uploading",
        kind,
        job,
        record.bytes,
        record.created_s,
        record.expires_s,
    )
    return int(rows[0][0])


def file_record(row: Row) -> FileRecord:
    """Read a row of SELECT_FILE."""
    return FileRecord(
        id=row[0],
        owner=row[1],
        filename=row[2],
        purpose=row[3],
        bytes=row[4],
        created_s=row[5],
        expires_s=row[6],
        ready=row[7] == "ready",
    )


def job_record(row: Row) -> JobRecord:
    """Read a row of SELECT_JOB."""
    fields: dict[str, Any] = dict(zip(_JOB_FIELDS, row, strict=False))
    fields["metadata"] = msgspec.json.decode(fields["metadata"], type=dict[str, str])
    fields["errors"] = msgspec.json.decode(fields["errors"], type=tuple[JobError, ...])
    if fields["in_progress_s"] is None:
        fields["total"] = 0  # some lines may be there, but whether they will count is not known
    return JobRecord(**fields)


def run_of(sizes: Sequence[int]) -> int:
    """Return how many results of these sizes to read in one go: one at least."""
    total = 0
    for count, size in enumerate(sizes):
        total += size
        if count and total > _RUN_BYTES:
            return count
    return len(sizes)
