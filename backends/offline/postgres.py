"""The store's tables in a PostgreSQL, for several services on one queue.

The driver is asyncpg, which takes `$1` as it is written. Who waits is woken by NOTIFY, on one
connection that only listens; should that break, waiters still look by themselves every second.
"""

from __future__ import annotations

import importlib
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any

from typing_extensions import override

from backends.offline.database import Bell, Database, Row, Transaction, Value
from backends.offline.records import FullError, StoreError, UnavailableError
from proxy.contract.extras import install_command

_CONNECTIONS_MAX = 8
_STATEMENT_S_MAX = 60.0
# Every statement finds its rows by a key. A planner that saw these tables while they were empty
# would read them whole, and keep that plan for what they hold an hour later.
_SETTINGS = {
    "enable_seqscan": "off",
    "jit": "off",
    "application_name": "doherty",
    # A service that stands still within a transaction must not hold the locks of all others.
    "idle_in_transaction_session_timeout": "30s",
}
_CHANNEL = "doherty_offline"
_SCHEMA_LOCK = 0x646F6865727479  # "doherty": one service at a time makes the tables


class _Statements(Transaction):
    def __init__(self, connection: Any) -> None:
        self._connection = connection

    @override
    async def fetch(self, sql: str, *values: Value) -> list[Row]:
        rows: list[Row] = await self._connection.fetch(sql, *values)
        return rows

    @override
    async def fetch_each(self, sql: str, rows: Sequence[Sequence[Value]]) -> list[Row]:
        found: list[Row] = await self._connection.fetchmany(sql, rows) if rows else []
        return found

    @override
    async def execute(self, sql: str, *values: Value) -> None:
        await self._connection.execute(sql, *values)

    @override
    async def execute_each(self, sql: str, rows: Sequence[Sequence[Value]]) -> None:
        if rows:
            await self._connection.executemany(sql, rows)


class Postgres(Database):
    """A database of its own, or a schema chosen by the URL's `search_path`."""

    def __init__(self, driver: Any, pool: Any, url: str, bell: Bell) -> None:
        self._driver = driver
        self._pool = pool
        self._url = url
        self._bell = bell
        self._listener: Any = None

    @classmethod
    async def connected(cls, url: str, bell: Bell) -> Postgres:
        """Connect; an error says what is missing or wrong."""
        try:
            driver: Any = importlib.import_module("asyncpg")
        except ImportError:
            raise StoreError(
                f"a PostgreSQL store needs the package asyncpg: {install_command('postgres')}"
            ) from None
        try:
            with _told(driver):
                pool = await driver.create_pool(
                    url,
                    min_size=1,
                    max_size=_CONNECTIONS_MAX,
                    command_timeout=_STATEMENT_S_MAX,
                    server_settings=_SETTINGS,
                )
        except ValueError as error:
            raise StoreError(f"offline.store is no PostgreSQL URL: {error}") from error
        self = cls(driver, pool, url, bell)
        await self.tidy()
        return self

    def _heard(self, _connection: object, _pid: int, _channel: str, topic: str) -> None:
        self._bell.ring(topic)

    @override
    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Transaction]:
        with _told(self._driver):
            async with self._pool.acquire() as connection, connection.transaction():
                yield _Statements(connection)

    @override
    @asynccontextmanager
    async def reading(self) -> AsyncIterator[Transaction]:
        with _told(self._driver):
            async with self._pool.acquire() as connection:
                yield _Statements(connection)

    @override
    async def migrate(self, steps: Sequence[Sequence[str]]) -> None:
        async with self.transaction() as transaction:
            await transaction.execute("SELECT pg_advisory_xact_lock($1)", _SCHEMA_LOCK)
            await transaction.execute(
                "CREATE TABLE IF NOT EXISTS doherty_schema (version BIGINT NOT NULL)"
            )
            found = await transaction.fetch("SELECT coalesce(max(version), 0) FROM doherty_schema")
            version = int(found[0][0])
            if version > len(steps):
                raise StoreError(
                    f"the database was made by a newer release (schema {version}, this one knows "
                    f"{len(steps)}): use that release, or another database"
                )
            for step in steps[version:]:
                for sql in step:
                    await transaction.execute(sql)
            if version < len(steps):
                await transaction.execute(
                    "INSERT INTO doherty_schema (version) VALUES ($1)", len(steps)
                )

    @override
    async def tell(self, transaction: Transaction, topic: str) -> None:
        await transaction.fetch("SELECT pg_notify($1, $2)", _CHANNEL, topic)

    @override
    async def tidy(self) -> None:
        """See that somebody listens; the server vacuums by itself."""
        if self._listener is None or self._listener.is_closed():
            with _told(self._driver):
                self._listener = await self._driver.connect(self._url, server_settings=_SETTINGS)
                await self._listener.add_listener(_CHANNEL, self._heard)

    @override
    async def close(self) -> None:
        if self._listener is not None:
            await self._listener.close()
        await self._pool.close()


@contextmanager
def _told(driver: Any) -> Iterator[None]:
    """Say in the store's words what the server refuses."""
    try:
        yield
    except (driver.DiskFullError, driver.OutOfMemoryError) as error:
        raise FullError(f"PostgreSQL has no room: {error}; free some, then ask again") from error
    except (
        driver.PostgresConnectionError,
        driver.InsufficientResourcesError,
        driver.OperatorInterventionError,
        driver.TransactionRollbackError,
        driver.InterfaceError,
        OSError,
        TimeoutError,
    ) as error:
        problem = str(error) or type(error).__name__  # a timeout has no words
        raise UnavailableError(f"PostgreSQL does not answer ({problem}): ask again") from error
    except driver.PostgresError as error:
        raise StoreError(f"PostgreSQL: {error}") from error
