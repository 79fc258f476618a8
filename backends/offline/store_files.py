"""Files: what clients upload, kept in pieces, and the results of jobs, kept as results.

An upload is seen by nobody until it is finished; one that stays silent is discarded by `prune`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

from backends.clock import Clock
from backends.offline.database import Bell, Database
from backends.offline.records import (
    ConflictError,
    FileRecord,
    Limits,
    NotFoundError,
    Page,
    StoreError,
)
from backends.offline.rows import SELECT_FILE, Part, file_record, insert_file, new_id, run_of
from backends.offline.schema import PIECE_BYTES

_PIECES_AT_ONCE = 64  # written in one transaction, read in one go: 1 MiB
_RESULTS_AT_ONCE = 1000


class FileStore(Part):
    """The half of the store that knows files."""

    def __init__(self, database: Database, clock: Clock, limits: Limits, bell: Bell) -> None:
        super().__init__(database, clock, limits, bell)
        self._uploads: dict[str, _Upload] = {}  # by file id; as many as clients are uploading

    async def create_file(
        self, owner: str, filename: str, purpose: str, expires_after_s: float | None = None
    ) -> FileRecord:
        """Begin an upload; `append_file` adds to it, and `finish_file` makes it a file."""
        now_s = self._clock.unix_s()
        keep_s = self._limits.keep_s if expires_after_s is None else expires_after_s
        await self._require_room()
        record = FileRecord(
            id=new_id("file-"),
            owner=owner,
            filename=filename,
            purpose=purpose,
            bytes=0,
            created_s=now_s,
            expires_s=now_s + keep_s,
            ready=False,
        )
        async with self._database.transaction() as transaction:
            number = await insert_file(transaction, record, kind="stored")
        self._uploads[record.id] = _Upload(number)
        return record

    async def append_file(self, file_id: str, content: bytes) -> None:
        """Add to an upload; it is in the store once a MiB has come together."""
        upload = self._upload(file_id)
        upload.rest += content
        whole = len(upload.rest) // PIECE_BYTES
        if whole >= _PIECES_AT_ONCE:
            await self._write(upload, whole * PIECE_BYTES)

    async def finish_file(self, file_id: str) -> FileRecord:
        """Make an upload a file."""
        upload = self._upload(file_id)
        await self._write(upload, len(upload.rest), ready=True)
        del self._uploads[file_id]
        async with self._database.reading() as reading:
            rows = await reading.fetch(SELECT_FILE + " WHERE id = $1", file_id)
        return file_record(rows[0])

    async def discard_file(self, file_id: str) -> None:
        """Forget an upload."""
        upload = self._uploads.pop(file_id, None)
        if upload is not None:
            async with self._database.transaction() as transaction:
                await transaction.execute(
                    "UPDATE files SET state = 'gone' WHERE number = $1", upload.number
                )

    async def file(self, owner: str, file_id: str) -> FileRecord:
        """Return one file."""
        return file_record(await self._file_row(owner, file_id))

    async def files(
        self,
        owner: str,
        *,
        purpose: str | None = None,
        after: str | None = None,
        limit: int = 100,
        newest_first: bool = True,
    ) -> Page[FileRecord]:
        """Return the files that come after the one with the id `after`."""
        async with self._database.reading() as reading:
            start = 2**62 if newest_first else 0
            if after is not None:
                found = await reading.fetch(
                    "SELECT number FROM files WHERE owner = $1 AND id = $2", owner, after
                )
                if not found:
                    raise NotFoundError(f"no file {after} to list from")
                start = int(found[0][0])
            rows = await reading.fetch(
                SELECT_FILE + _BEFORE if newest_first else SELECT_FILE + _AFTER,
                owner,
                start,
                purpose or "",
                limit + 1,
            )
        return Page(tuple(file_record(row) for row in rows[:limit]), len(rows) > limit)

    async def delete_file(self, owner: str, file_id: str) -> None:
        """Delete a file; its content goes piece by piece when the store is pruned."""
        async with self._database.transaction() as transaction:
            found = await transaction.fetch(
                "SELECT number FROM files WHERE id = $1 AND owner = $2 AND state = 'ready' "
                "FOR UPDATE",
                file_id,
                owner,
            )
            if not found:
                raise NotFoundError(f"no file {file_id}")
            busy = await transaction.fetch(
                "SELECT id FROM jobs WHERE input_file_id = $1 AND ended_s IS NULL", file_id
            )
            if busy:
                raise ConflictError(
                    f"file {file_id} is the input of {busy[0][0]}: cancel that batch or wait for it"
                )
            await transaction.execute(
                "UPDATE files SET state = 'gone' WHERE number = $1", found[0][0]
            )

    async def read_file(self, owner: str, file_id: str, start: int = 0) -> AsyncIterator[bytes]:
        """Give a file's content from octet `start` on, a MiB or so at a time."""
        row = await self._file_row(owner, file_id)
        kind, job, number = str(row[9]), row[10], int(row[8])
        parts = (
            self._pieces(number, start)
            if kind == "stored"
            else self._results(int(job), failed=kind == "errors", skip=start)
        )
        left = int(row[4]) - start
        async for part in parts:
            left -= len(part)
            yield part
        if left > 0:
            raise NotFoundError(f"file {file_id} was deleted while it was read")

    async def _pieces(self, number: int, start: int) -> AsyncIterator[bytes]:
        piece, skip = divmod(start, PIECE_BYTES)
        while True:
            async with self._database.reading() as reading:
                rows = await reading.fetch(
                    "SELECT content FROM pieces WHERE file = $1 AND piece >= $2 "
                    "ORDER BY piece LIMIT $3",
                    number,
                    piece,
                    _PIECES_AT_ONCE,
                )
            content = b"".join(row[0] for row in rows)[skip:]
            if content:
                yield content
            if len(rows) < _PIECES_AT_ONCE:
                return
            piece, skip = piece + len(rows), 0

    async def _results(self, job: int, *, failed: bool, skip: int) -> AsyncIterator[bytes]:
        last = -1
        while True:
            async with self._database.reading() as reading:
                sizes = await reading.fetch(
                    "SELECT number, bytes FROM results "
                    "WHERE job = $1 AND failed = $2 AND number > $3 ORDER BY number LIMIT $4",
                    job,
                    int(failed),
                    last,
                    _RESULTS_AT_ONCE,
                )
                if not sizes:
                    return
                run = sizes[: run_of([int(row[1]) for row in sizes])]
                start, last, size = last, int(run[-1][0]), sum(int(row[1]) for row in run)
                rows = []
                if size > skip:
                    rows = await reading.fetch(
                        "SELECT content FROM results WHERE job = $1 AND failed = $2 "
                        "AND number > $3 AND number <= $4 ORDER BY number",
                        job,
                        int(failed),
                        start,
                        last,
                    )
            content = b"".join(row[0] for row in rows)[skip:]
            if content:
                yield content
            skip = max(0, skip - size)

    def _upload(self, file_id: str) -> _Upload:
        try:
            return self._uploads[file_id]
        except KeyError:
            raise NotFoundError(f"no upload {file_id}") from None

    async def _write(self, upload: _Upload, size: int, *, ready: bool = False) -> None:
        """Store the first `size` octets of what has come; they are kept until that is certain."""
        now_s = self._clock.unix_s()
        await self._require_room(size)
        rest = memoryview(upload.rest)[:size]
        pieces = [
            (upload.number, upload.pieces + index, bytes(rest[start : start + PIECE_BYTES]))
            for index, start in enumerate(range(0, size, PIECE_BYTES))
        ]
        rest.release()
        async with self._database.transaction() as transaction:
            await transaction.execute_each(
                "INSERT INTO pieces (file, piece, content) VALUES ($1, $2, $3)", pieces
            )
            kept = await transaction.fetch(
                "UPDATE files SET bytes = bytes + $2, touched_s = $3, state = $4 "
                "WHERE number = $1 AND state = 'uploading' RETURNING number",
                upload.number,
                size,
                now_s,
                "ready" if ready else "uploading",
            )
            if not kept:
                raise StoreError("the upload was silent for too long and has been discarded")
        del upload.rest[:size]
        upload.pieces += len(pieces)


_BEFORE = (
    " WHERE owner = $1 AND number < $2 AND state = 'ready' AND ($3 = '' OR purpose = $3) "
    "ORDER BY number DESC LIMIT $4"
)
_AFTER = (
    " WHERE owner = $1 AND number > $2 AND state = 'ready' AND ($3 = '' OR purpose = $3) "
    "ORDER BY number LIMIT $4"
)


class _Upload:
    """What of a file has come and is not stored yet."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.pieces = 0  # stored
        self.rest = bytearray()
