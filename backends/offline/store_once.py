"""What is made once, however often it is asked for: a file under an id that a client's key names.

An upload gets that id when it is complete and not before, so that one which was cut stands in
nobody's way. (Batches have theirs from the beginning, see `create_job`.)
"""

from __future__ import annotations

from backends.offline.records import FileRecord
from backends.offline.rows import SELECT_FILE, Part, file_record


class OnceStore(Part):
    """The part of the store that gives files their second id."""

    async def rename_file(self, owner: str, file_id: str, new_id: str) -> FileRecord:
        """Call a file `new_id`. Where that exists already, it is the one: the other goes."""
        async with self._database.transaction() as transaction:
            there = await transaction.fetch(
                SELECT_FILE + " WHERE id = $1 AND owner = $2 AND state = 'ready'", new_id, owner
            )
            if there:
                await transaction.execute("UPDATE files SET state = 'gone' WHERE id = $1", file_id)
                return file_record(there[0])
            await transaction.execute(
                "UPDATE files SET id = $2 WHERE id = $1 AND owner = $3 "
                # A deleted one keeps its id until its content has gone.
                "AND NOT EXISTS (SELECT 1 FROM files AS others WHERE others.id = $2)",
                file_id,
                new_id,
                owner,
            )
            rows = await transaction.fetch(
                SELECT_FILE + " WHERE id IN ($1, $2) AND owner = $3 AND state = 'ready'",
                file_id,
                new_id,
                owner,
            )
        return file_record(rows[0])
