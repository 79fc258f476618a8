"""The SQLite file: whose it is, what it refuses, and a disk that is full."""

from __future__ import annotations

import asyncio
import re
import sqlite3
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from backends.offline import sqlite
from backends.offline.records import FullError, StoreError, UnavailableError
from backends.offline.store import Store
from backends.offline.work import Line, Result
from tests.fakes.stored_jobs import ANN, begun_job, content, given, outcome, report, stored_file


async def test_the_file_is_made_and_nobody_else_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "offline.db"
    store = await Store.open(path)
    await stored_file(store, b"x")
    modes = {file.name: file.stat().st_mode & 0o777 for file in tmp_path.iterdir()}
    assert modes.pop("offline.db") == 0o600
    assert set(modes.values()) == {0o600}  # its log, too
    await store.close()


async def test_a_file_of_a_newer_release_is_refused_with_words(tmp_path: Path) -> None:
    path = tmp_path / "offline.db"
    await (await Store.open(path)).close()
    with sqlite3.connect(path) as direct:
        direct.execute("PRAGMA user_version = 999")
    direct.close()
    with pytest.raises(StoreError, match="newer release"):
        await Store.open(path)


async def test_a_file_that_is_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "offline.db"
    path.write_bytes(b"a diary, no database " * 500)
    with pytest.raises(StoreError, match="no SQLite file"):
        await Store.open(path)
    assert path.read_bytes() == b"a diary, no database " * 500


async def test_a_folder_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="nowhere"):
        await Store.open(tmp_path / "nowhere" / "offline.db")


async def test_nothing_is_written_to_a_file_that_was_removed_or_replaced(tmp_path: Path) -> None:
    path, away = tmp_path / "offline.db", tmp_path / "away.db"
    store = await Store.open(path)
    file_id = await stored_file(store, b"kept")
    path.rename(away)
    for _ in range(2):  # gone, then another one in its place
        with pytest.raises(UnavailableError, match="removed or replaced"):
            await stored_file(store, b"lost")
        assert (await store.file(ANN, file_id)).bytes == 4  # what there is can still be fetched
        path.write_bytes(b"")
    away.rename(path)
    await stored_file(store, b"kept, too")
    await store.close()
    store = await Store.open(path)
    assert len((await store.files(ANN)).items) == 2
    await store.close()


async def test_a_commit_is_on_the_disk_before_it_is_acknowledged(tmp_path: Path) -> None:
    store = await Store.open(tmp_path / "offline.db")
    async with store._database.transaction() as transaction:
        (found,) = await transaction.fetch("PRAGMA synchronous")
        assert found[0] == 2  # FULL
        (found,) = await transaction.fetch("PRAGMA journal_mode")
        assert found[0] == "wal"
    await store.close()


async def test_a_task_that_is_cancelled_leaves_no_transaction_behind(tmp_path: Path) -> None:
    store = await Store.open(tmp_path / "offline.db")
    inside = asyncio.Event()

    async def stuck() -> None:
        async with store._database.transaction() as transaction:
            await transaction.execute("DELETE FROM files")
            inside.set()
            await asyncio.sleep(60)

    file_id = await stored_file(store, b"x")
    task = asyncio.ensure_future(stuck())
    await inside.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await content(store, file_id) == b"x"
    await store.close()


async def test_a_full_disk_refuses_loses_nothing_and_works_again(tmp_path: Path) -> None:
    store = await Store.open(tmp_path / "offline.db")
    job = await begun_job(store, 40)
    chunk = await given(store)
    await report(store, chunk, chunk.lines[:20])

    async def grant(pages: int) -> None:
        async with store._database.transaction() as transaction:
            await transaction.fetch(f"PRAGMA max_page_count = {pages}")

    await grant(1)  # it takes the size that there is
    record = await store.create_file(ANN, "large", "batch")
    with pytest.raises(FullError, match="no room"):
        await _repeated(lambda: store.append_file(record.id, b"x" * 2**20))
    line = chunk.lines[20:21]
    with pytest.raises(FullError, match="no room"):
        await report(store, chunk, line, result=_large)
    before = await store.job(ANN, job.id)
    assert before.completed == len(await store.results(ANN, job.id, limit=1000))
    assert before.state == "in_progress"
    await grant(2**30)
    await store.append_file(record.id, b"y" * 7)  # goes on where it stood
    assert (await store.finish_file(record.id)).bytes == len(await content(store, record.id))
    assert (await report(store, chunk, chunk.lines[20:], done=True)).held
    assert set((await outcome(store, job)).values()) == {"200"}
    await store.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[tuple[Path, Callable[[int], None]]]:
    """A file system of 6 MiB, and a way to make it larger."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", folder], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a file system here: {mounted.stderr.decode().strip()}")

    def grow(mib: int) -> None:
        subprocess.run(["mount", "-o", f"remount,size={mib}m", folder], check=True)

    try:
        yield folder, grow
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.faults
async def test_a_disk_that_is_really_full_refuses_loses_nothing_and_works_again(
    small_disk: tuple[Path, Callable[[int], None]],
) -> None:
    folder, grow = small_disk
    store = await Store.open(folder / "offline.db")
    job = await begun_job(store, 40)
    chunk = await given(store)
    await report(store, chunk, chunk.lines[:20])
    record = await store.create_file(ANN, "large", "batch")
    with pytest.raises(FullError, match="no room"):
        await _repeated(lambda: store.append_file(record.id, b"x" * 2**20))
    with pytest.raises(FullError, match="no room"):
        await report(store, chunk, chunk.lines[20:25], result=_large)
    assert (await store.job(ANN, job.id)).completed == 20
    grow(64)
    await store.discard_file(record.id)
    assert await store.prune() > 0
    assert (await report(store, chunk, chunk.lines[20:], done=True)).accepted == 20
    assert set((await outcome(store, job)).values()) == {"200"}
    await store.close()
    with sqlite3.connect(folder / "offline.db") as direct:
        assert direct.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    direct.close()


async def _repeated(call: Callable[[], Awaitable[None]]) -> None:
    for _ in range(100):
        await call()


def _large(line: Line) -> Result:
    text = msgspec.Raw(b'{"a":"%b"}' % (b"x" * 1_000_000))
    return Result(job_id=line.job_id, number=line.number, status=200, body=text)


async def test_every_statement_finds_its_rows_by_a_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[str] = set()
    monkeypatch.setattr(
        sqlite, "translated", lambda sql, real=sqlite.translated: seen.add(real(sql)) or real(sql)
    )
    store = await Store.open(tmp_path / "offline.db")
    job = await begun_job(store, 5)
    chunk = await given(store)
    await report(store, chunk, chunk.lines[:2], back=chunk.lines[2:3])
    await report(store, chunk, chunk.lines[3:], done=True)
    await store.results(ANN, job.id, after=1)
    await store.cancel_job(ANN, job.id)
    await store.finish_due()
    await outcome(store, job)
    await store.prune()
    await store.close()
    with sqlite3.connect(tmp_path / "offline.db") as direct:
        read_whole = []
        for sql in sorted(seen):
            if sql.lstrip().startswith(("SELECT", "UPDATE", "DELETE")):
                values = (1,) * max(map(int, re.findall(r"\?(\d+)", sql)), default=0)
                plan = direct.execute("EXPLAIN QUERY PLAN " + sql, values).fetchall()
                read_whole += [
                    (sql, step[3])
                    for step in plan
                    for table in ("lines", "results", "pieces", "chunks")
                    if f"SCAN {table}" in step[3]
                ]
    direct.close()
    assert len(seen) > 30
    assert read_whole == []


@pytest.mark.faults
def test_a_large_job_takes_no_more_memory_than_a_small_one(memory_folder: Path) -> None:
    def peak_mb(megabytes: int) -> int:
        command = [sys.executable, "-m", "tests.fakes.store_memory"]
        command += [str(memory_folder / f"{megabytes}.db"), str(megabytes)]
        root = Path(__file__).parents[3]
        run = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True)
        return int(run.stdout)

    small, large = peak_mb(20), peak_mb(70)
    assert large - small < 25, (small, large)
