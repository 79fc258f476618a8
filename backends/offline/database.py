"""The little that the store asks of a database, so that SQLite and PostgreSQL are one to it.

SQL is written in PostgreSQL's words, with `$1, $2` for values; what SQLite has other words for
(`FOR UPDATE`, which it needs none for: only one transaction writes at a time; and three column
types) its side translates. Transactions that write lock rows in one order, jobs by number before
their chunk before its lines, so that no two wait for each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager
from typing import Any, Protocol, TypeAlias

from backends.clock import Alarm, Clock

Value: TypeAlias = str | bytes | int | float | None
# Columns have the types of their table; a row is a sequence of them.
Row: TypeAlias = Sequence[Any]


class Transaction(Protocol):
    """Statements that all count, or none does."""

    async def fetch(self, sql: str, *values: Value) -> list[Row]:
        """Return what one statement finds or returns."""

    async def fetch_each(self, sql: str, rows: Sequence[Sequence[Value]]) -> list[Row]:
        """Do a statement with each of `rows`; return everything it returns, in that order."""

    async def execute(self, sql: str, *values: Value) -> None: ...

    async def execute_each(self, sql: str, rows: Sequence[Sequence[Value]]) -> None: ...


class Database(Protocol):
    """Where the tables are."""

    def transaction(self) -> AbstractAsyncContextManager[Transaction]:
        """Begin one that may write; it commits at the end, or rolls back when anything is raised.

        Once it has ended without an error, what it wrote survives the loss of power.
        """

    def reading(self) -> AbstractAsyncContextManager[Transaction]:
        """Lend a connection for statements that only read, each for itself."""

    async def migrate(self, steps: Sequence[Sequence[str]]) -> None:
        """Bring the tables up to the last of `steps`; refuse those that a newer release made."""

    async def tell(self, transaction: Transaction, topic: str) -> None:
        """Ring `topic` for whoever waits, in other services too, when the transaction commits."""

    async def tidy(self) -> None:
        """Give back the room of what has been deleted, a little at a time."""

    async def close(self) -> None: ...


class Bell:
    """Wakes those who wait for something to change: no busy polling."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._alarms: dict[str, set[Alarm]] = {}

    def ring(self, topic: str) -> None:
        for alarm in self._alarms.get(topic, ()):
            alarm.ring()

    @contextmanager
    def alarm(self, topic: str) -> Iterator[Alarm]:
        """Lend an alarm that rings with `topic`; get it before looking, so that no ring is lost."""
        alarm = Alarm(self._clock)
        alarms = self._alarms.setdefault(topic, set())
        alarms.add(alarm)
        try:
            yield alarm
        finally:
            alarms.discard(alarm)
            if not alarms:
                self._alarms.pop(topic, None)
