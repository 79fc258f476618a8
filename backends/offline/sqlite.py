"""The store's tables in one SQLite file, made by itself, that nobody else may read.

One thread owns the connection that writes, two others one each that only read; in WAL mode these
do not wait for the writer. The event loop never touches the disk.

`synchronous` is FULL: a commit returns when the log is on the disk. With NORMAL the last commits
would survive a crash of the process but not the loss of power, and a result that the desk has
acknowledged is one that its worker has forgotten. What that costs is one flush for each report, and
a report holds many results.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

from typing_extensions import override

from backends.offline.database import Bell, Database, Row, Transaction, Value
from backends.offline.records import FullError, StoreError, UnavailableError

T = TypeVar("T")

_READERS = 2
_BUSY_S = 10.0  # that another process may hold the file
# Pages of 4 KiB are given back to the file system so many at a time, which takes a tenth of a
# second or so; what is left after so many steps is used again, or given back the next time.
_FREE_PAGES_AT_ONCE = 256
_TIDY_STEPS_MAX = 64
_WORDS = (
    (" FOR UPDATE SKIP LOCKED", ""),
    (" FOR UPDATE", ""),
    ("BIGSERIAL PRIMARY KEY", "INTEGER PRIMARY KEY AUTOINCREMENT"),
    ("BYTEA", "BLOB"),
    ("$", "?"),
)


@lru_cache(maxsize=512)
def translated(sql: str) -> str:
    """Say in SQLite's words what is written in PostgreSQL's."""
    for theirs, ours in _WORDS:
        sql = sql.replace(theirs, ours)
    return sql


class _Connection:
    """A connection and the only thread that uses it."""

    def __init__(self, path: Path, name: str) -> None:
        self._path = path
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)
        self._sqlite: sqlite3.Connection | None = None
        self._file: tuple[int, int] | None = None  # that it has open, whatever its path leads to

    async def run(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Do `work` in the thread, after all that was asked of it before, waited for or not."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._do, work)

    def _do(self, work: Callable[[sqlite3.Connection], T]) -> T:
        try:
            if self._sqlite is None:
                self._sqlite = _connected(self._path)
                self._file = _file_at(self._path)
            return work(self._sqlite)
        except sqlite3.Error as error:
            raise _told(error, self._path) from error
        except OSError as error:
            raise StoreError(f"cannot open {self._path}: {error.strerror}") from error

    def begin(self, sqlite: sqlite3.Connection) -> None:
        """Begin to write. What goes to a file that nobody finds again would be lost at the end."""
        if _file_at(self._path) != self._file:
            raise UnavailableError(
                f"{self._path} was removed or replaced while this service has it open: put it "
                "back, or start the service anew"
            )
        sqlite.execute("BEGIN IMMEDIATE")

    async def close(self) -> None:
        def close() -> None:
            if self._sqlite is not None:
                self._sqlite.close()

        await asyncio.get_running_loop().run_in_executor(self._thread, close)
        self._thread.shutdown(wait=False)


class _Statements(Transaction):
    def __init__(self, connection: _Connection) -> None:
        self._connection = connection

    @override
    async def fetch(self, sql: str, *values: Value) -> list[Row]:
        words = translated(sql)
        return await self._connection.run(lambda sqlite: sqlite.execute(words, values).fetchall())

    @override
    async def fetch_each(self, sql: str, rows: Sequence[Sequence[Value]]) -> list[Row]:
        if not rows:
            return []
        words = translated(sql)

        def work(sqlite: sqlite3.Connection) -> list[Row]:
            cursor, found = sqlite.cursor(), list[Row]()
            for row in rows:
                found += cursor.execute(words, row).fetchall()
            return found

        return await self._connection.run(work)

    @override
    async def execute(self, sql: str, *values: Value) -> None:
        words = translated(sql)
        await self._connection.run(lambda sqlite: sqlite.execute(words, values))

    @override
    async def execute_each(self, sql: str, rows: Sequence[Sequence[Value]]) -> None:
        words = translated(sql)
        if rows:
            await self._connection.run(lambda sqlite: sqlite.executemany(words, rows))


class Sqlite(Database):
    """One file; several processes may open it, one transaction at a time writes."""

    def __init__(self, path: Path, bell: Bell) -> None:
        self._bell = bell
        self._path = path
        self._writer = _Connection(path, "store-writer")
        self._one_writes = asyncio.Lock()
        self._readers = asyncio.Queue[_Connection]()
        for _ in range(_READERS):
            self._readers.put_nowait(_Connection(path, "store-reader"))
        self._topics: set[str] = set()  # to ring once this transaction has committed

    @override
    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Transaction]:
        async with self._one_writes:
            self._topics.clear()
            try:
                await self._writer.run(self._writer.begin)
                yield _Statements(self._writer)
                await self._writer.run(lambda sqlite: sqlite.execute("COMMIT"))
            except BaseException:
                # What was asked of the thread before, even by a task that is gone, comes first.
                await self._writer.run(_roll_back)
                raise
        for topic in tuple(self._topics):
            self._bell.ring(topic)

    @override
    @asynccontextmanager
    async def reading(self) -> AsyncIterator[Transaction]:
        reader = await self._readers.get()
        try:
            yield _Statements(reader)
        finally:
            self._readers.put_nowait(reader)

    @override
    async def migrate(self, steps: Sequence[Sequence[str]]) -> None:
        async with self.transaction() as transaction:
            found = await transaction.fetch("PRAGMA user_version")
            version = int(found[0][0])
            if version > len(steps):
                raise StoreError(
                    f"{self._path} was made by a newer release (schema {version}, this one knows "
                    f"{len(steps)}): use that release, or another file"
                )
            for step in steps[version:]:
                for sql in step:
                    await transaction.execute(sql)
            # The version is a number in the file's head; a pragma takes no placeholder.
            await transaction.execute(f"PRAGMA user_version = {len(steps):d}")

    @override
    async def tell(self, transaction: Transaction, topic: str) -> None:
        self._topics.add(topic)

    @override
    async def tidy(self) -> None:
        def vacuum(sqlite: sqlite3.Connection) -> int:
            sqlite.execute(f"PRAGMA incremental_vacuum({_FREE_PAGES_AT_ONCE:d})").fetchall()
            return int(sqlite.execute("PRAGMA freelist_count").fetchone()[0])

        for _ in range(_TIDY_STEPS_MAX):
            async with self._one_writes:  # let go each time: others write, too
                left = await self._writer.run(vacuum)
            if not left:
                return

    @override
    async def close(self) -> None:
        async with self._one_writes:
            for _ in range(_READERS):
                await (await self._readers.get()).close()
            await self._writer.close()


def _connected(path: Path) -> sqlite3.Connection:
    # Made before SQLite would, so that it is never readable by others; the log inherits its mode.
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    sqlite = sqlite3.connect(path, timeout=_BUSY_S, isolation_level=None, cached_statements=256)
    sqlite.execute("PRAGMA auto_vacuum = INCREMENTAL")  # counts for a file that has no tables yet
    sqlite.execute("PRAGMA journal_mode = WAL")
    sqlite.execute("PRAGMA synchronous = FULL")
    sqlite.execute("PRAGMA wal_autocheckpoint = 4000")  # pages: 16 MiB
    sqlite.execute("PRAGMA journal_size_limit = 67108864")
    sqlite.execute("PRAGMA cache_size = -8192")  # KiB
    return sqlite


def _file_at(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def _roll_back(sqlite: sqlite3.Connection) -> None:
    if sqlite.in_transaction:
        sqlite.execute("ROLLBACK")


def _told(error: sqlite3.Error, path: Path) -> StoreError:
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    if code == sqlite3.SQLITE_FULL:
        return FullError(f"no room for {path}: free some, then ask again")
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return UnavailableError(f"{path} is held by another process: ask again")
    if code == sqlite3.SQLITE_NOTADB:
        return StoreError(f"{path} is no SQLite file: name another one as offline.store")
    return StoreError(f"{path}: {error}")
