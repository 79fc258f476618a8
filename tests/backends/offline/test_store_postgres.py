"""What only PostgreSQL has: several services that wake each other, connections that break."""

from __future__ import annotations

import asyncio
import re
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import pytest

from backends.offline.postgres import Postgres
from backends.offline.records import StoreError, UnavailableError
from backends.offline.rows import WORK
from backends.offline.store import Store
from proxy.contract.extras import install_command
from tests.fakes import postgres_server
from tests.fakes.stored_jobs import ANN, begun_job, given, outcome, report

T = TypeVar("T")


async def _listening(store: Store) -> asyncio.Task[None]:
    """Wait until `WORK` rings, and not by time."""

    async def wait() -> None:
        with store._bell.alarm(WORK) as alarm:
            await alarm.wait(None)

    task = asyncio.ensure_future(wait())
    await asyncio.sleep(0)
    return task


async def _patient(call: Callable[[], Awaitable[T]]) -> T:
    """Ask again, as the error says, as often as there may be broken connections."""
    for _ in range(20):
        try:
            return await call()
        except UnavailableError:
            pass
    return await call()


@pytest.mark.parametrize("store_url", ["postgresql"], indirect=True)
async def test_one_service_wakes_those_who_wait_at_another(store_url: str) -> None:
    here, there = await Store.open(store_url), await Store.open(store_url)
    woken = await _listening(there)
    await begun_job(here, 1)
    await asyncio.wait_for(woken, 30)
    await here.close()
    await there.close()


@pytest.mark.parametrize("store_url", ["postgresql"], indirect=True)
async def test_broken_connections_are_told_and_made_anew(store_url: str) -> None:
    import asyncpg

    store = await Store.open(store_url)
    await begun_job(store, 3)
    chunk = await given(store)
    direct = await asyncpg.connect(store_url)
    await direct.execute(
        "SELECT pg_terminate_backend(pid, 20000) FROM pg_stat_activity "
        "WHERE application_name = 'doherty' AND pid <> pg_backend_pid()"
    )
    await direct.close()
    receipt = await _patient(lambda: report(store, chunk, chunk.lines, done=True))
    assert receipt.accepted == 3
    await _patient(store.prune)  # which sees that somebody listens
    woken = await _listening(store)
    await begun_job(store, 1)
    await asyncio.wait_for(woken, 30)
    await store.close()


@pytest.mark.faults
async def test_a_server_that_crashes_is_waited_for_and_has_what_it_acknowledged(
    postgres_programs: Path,
) -> None:
    with postgres_server.running(postgres_programs) as server:
        store = await Store.open(server.url)
        job = await begun_job(store, 30)
        chunk = await given(store)
        await report(store, chunk, chunk.lines[:20])
        await asyncio.to_thread(server.stop, signal.SIGQUIT)
        for call in (store.job(ANN, job.id), report(store, chunk, chunk.lines), store.prune()):
            with pytest.raises(UnavailableError):
                await call
        await asyncio.to_thread(server.start)
        assert (await store.job(ANN, job.id)).completed == 20
        assert (await report(store, chunk, chunk.lines, done=True)).accepted == 10
        assert set((await outcome(store, job)).values()) == {"200"}
        await store.close()


@pytest.mark.parametrize("store_url", ["postgresql"], indirect=True)
async def test_what_is_wrong_with_the_address_is_told(store_url: str) -> None:
    with pytest.raises(StoreError, match='database "nowhere" does not exist'):
        await Store.open(store_url.replace("/postgres?", "/nowhere?"))
    with pytest.raises(UnavailableError, match="does not answer"):
        await Store.open("postgresql://doherty@/postgres?host=/nonexistent")
    with pytest.raises(StoreError, match="no PostgreSQL URL"):
        await Store.open("postgresql://doherty@127.0.0.1:nonsense/x")


@pytest.mark.parametrize("store_url", ["postgresql"], indirect=True)
async def test_tables_of_a_newer_release_are_refused_with_words(store_url: str) -> None:
    store = await Store.open(store_url)
    database = store._database
    assert isinstance(database, Postgres)
    with pytest.raises(StoreError, match="newer release"):
        await database.migrate(())
    await store.close()


async def test_a_missing_driver_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "asyncpg", None)
    with pytest.raises(StoreError, match=re.escape(install_command("postgres"))):
        await Store.open("postgresql://localhost/x")
