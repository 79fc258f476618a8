"""Files, jobs, lines and results in one database, where each line counts exactly once.

`Store` is all of it, for a service, its dispatcher and tests; `Store.open` makes the tables where
there are none. What it offers, by part:

    store_files  create_file append_file finish_file discard_file file files delete_file read_file
    store_jobs   create_job job jobs cancel_job results result
                 claim_validation add_lines begin_job fail_job
    store_desk   ask report bury_silent needs rates
    store_once   rename_file
    store_figures  figures
    ending       finish_due prune

A service claims jobs to validate them, serves `ask` and `report` to workers, and calls `finish_due`
every second or so and `prune` now and then. Several services may do so on one PostgreSQL.
"""

from __future__ import annotations

from pathlib import Path

from backends.clock import Clock, SystemClock
from backends.offline.database import Bell, Database
from backends.offline.postgres import Postgres
from backends.offline.records import Limits
from backends.offline.schema import STEPS
from backends.offline.sqlite import Sqlite
from backends.offline.store_desk import DeskStore
from backends.offline.store_figures import FigureStore
from backends.offline.store_files import FileStore
from backends.offline.store_once import OnceStore


class Store(DeskStore, FileStore, FigureStore, OnceStore):
    """Everything that is kept of offline work."""

    @classmethod
    async def open(
        cls, url: str | Path, *, limits: Limits | None = None, clock: Clock | None = None
    ) -> Store:
        """Open a SQLite file, or a PostgreSQL database by its URL."""
        clock = SystemClock() if clock is None else clock
        bell = Bell(clock)
        database: Database
        if str(url).startswith(("postgresql://", "postgres://")):
            database = await Postgres.connected(str(url), bell)
        else:
            database = Sqlite(Path(url), bell)
        try:
            await database.migrate(STEPS)
        except BaseException:
            await database.close()
            raise
        return cls(database, clock, Limits() if limits is None else limits, bell)

    async def close(self) -> None:
        """Let go of the database; nothing that was acknowledged depends on it."""
        await self._database.close()
