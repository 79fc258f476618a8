"""Files of the store: uploads, lists, parts, deletion, retention."""

from __future__ import annotations

import asyncio
import random

import pytest

from backends.offline.records import ConflictError, FullError, Limits, NotFoundError
from backends.offline.schema import PIECE_BYTES
from backends.offline.store import Store
from tests.fakes.provider import ManualClock
from tests.fakes.stored_jobs import (
    ANN,
    BOB,
    CHAT,
    begun_job,
    body,
    content,
    given,
    input_file,
    report,
    stored_file,
)


async def test_a_file_is_what_was_uploaded_from_wherever_it_is_read(store_url: str) -> None:
    store = await Store.open(store_url)
    octets = random.Random(1).randbytes(PIECE_BYTES * 130 + 17)
    record = await store.create_file(ANN, "a.jsonl", "batch")
    for start in range(0, len(octets), 70_001):
        await store.append_file(record.id, octets[start : start + 70_001])
    with pytest.raises(NotFoundError):  # nobody sees half a file
        await store.file(ANN, record.id)
    done = await store.finish_file(record.id)
    assert (done.bytes, done.filename, done.purpose, done.ready) == (
        len(octets),
        "a.jsonl",
        "batch",
        True,
    )
    for start in (0, 1, PIECE_BYTES, PIECE_BYTES * 64 - 1, len(octets) - 1, len(octets)):
        assert await content(store, record.id, start=start) == octets[start:]
    await store.close()


async def test_files_are_listed_in_pages_and_only_their_owners(store_url: str) -> None:
    store = await Store.open(store_url)
    ids = [await stored_file(store, b"x") for _ in range(5)]
    others = await stored_file(store, b"y", BOB)
    page = await store.files(ANN, limit=2)
    assert ([file.id for file in page.items], page.more) == ([ids[4], ids[3]], True)
    page = await store.files(ANN, limit=3, after=ids[3])
    assert ([file.id for file in page.items], page.more) == ([ids[2], ids[1], ids[0]], False)
    page = await store.files(ANN, newest_first=False, after=ids[3])
    assert [file.id for file in page.items] == [ids[4]]
    assert (await store.files(ANN, purpose="batch_output")).items == ()
    for attempt in (store.file(ANN, others), store.delete_file(ANN, others)):
        with pytest.raises(NotFoundError):
            await attempt
    with pytest.raises(NotFoundError):
        await store.files(ANN, after=others)
    with pytest.raises(NotFoundError):
        await store.create_job(ANN, others, CHAT, window_s=60)
    await store.close()


async def test_the_input_of_a_running_job_stays(store_url: str) -> None:
    clock = ManualClock()
    store = await Store.open(store_url, clock=clock, limits=Limits(keep_s=100.0))
    job = await begun_job(store, 3)
    with pytest.raises(ConflictError, match=job.id):
        await store.delete_file(ANN, job.input_file_id)
    with pytest.raises(NotFoundError):  # of somebody else's file nothing is said
        await store.delete_file(BOB, job.input_file_id)
    await clock.advance(200.0)
    await store.prune()
    assert (await store.file(ANN, job.input_file_id)).id == job.input_file_id
    chunk = await given(store)
    await report(store, chunk, chunk.lines, done=True)
    await store.delete_file(ANN, job.input_file_id)
    with pytest.raises(NotFoundError):
        await store.file(ANN, job.input_file_id)
    await store.close()


async def test_a_deleted_output_file_takes_its_results_along(store_url: str) -> None:
    store = await Store.open(store_url)
    job = await begun_job(store, 5)
    chunk = await given(store)
    await report(store, chunk, chunk.lines, done=True)
    job = await store.job(ANN, job.id)
    assert job.output_file_id is not None
    await store.delete_file(ANN, job.output_file_id)
    with pytest.raises(NotFoundError):
        await content(store, job.output_file_id)
    assert await store.prune() == 5
    assert await store.results(ANN, job.id) == ()
    assert (await store.job(ANN, job.id)).completed == 5
    await store.close()


async def test_a_reader_is_told_that_the_file_went_away_under_it(store_url: str) -> None:
    store = await Store.open(store_url)
    file_id = await stored_file(store, b"x" * (PIECE_BYTES * 200))
    parts = store.read_file(ANN, file_id)
    await anext(parts)
    await store.delete_file(ANN, file_id)
    await store.prune()
    with pytest.raises(NotFoundError, match="deleted while"):
        async for _ in parts:
            pass
    await store.close()


async def test_files_and_jobs_go_when_their_time_is_over_and_leave_nothing(store_url: str) -> None:
    clock = ManualClock()
    store = await Store.open(store_url, clock=clock, limits=Limits(keep_s=1000.0))
    brief = await store.create_file(ANN, "b", "batch", expires_after_s=10.0)
    await store.append_file(brief.id, b"b")
    await store.finish_file(brief.id)
    await store.create_file(ANN, "c", "batch")  # and then silence
    job = await begun_job(store, 4)
    chunk = await given(store)
    await report(store, chunk, chunk.lines, done=True)
    await clock.advance(11.0)
    await store.prune()
    assert brief.id not in [file.id for file in (await store.files(ANN)).items]
    assert len(await store.results(ANN, job.id)) == 4
    await clock.advance(4000.0)
    await store.prune()
    with pytest.raises(NotFoundError):
        await store.job(ANN, job.id)
    async with store._database.reading() as reading:
        for table in ("files", "pieces", "jobs", "lines", "results", "chunks"):
            assert [tuple(r) for r in await reading.fetch(f"SELECT count(*) FROM {table}")] == [
                (0,)
            ], table
    await store.close()


async def test_two_services_that_prune_at_once_leave_nothing_either(store_url: str) -> None:
    clock = ManualClock()
    limits = Limits(keep_s=100.0)
    stores = [await Store.open(store_url, clock=clock, limits=limits) for _ in range(2)]
    job = await begun_job(stores[0], 2100, lines_at_once=1050)
    await stores[0].cancel_job(ANN, job.id)
    await stores[0].finish_due()
    await stored_file(stores[0], b"x" * PIECE_BYTES * 200)
    await clock.advance(4000.0)
    gone = await asyncio.gather(*(store.prune() for store in stores))
    gone.append(await stores[0].prune())  # what one left because the other was at it
    # Its errors and its lines, the pieces of both files: each went once.
    assert sum(gone) == 2100 * 2 + 200 + -(-_content_bytes(2100) // PIECE_BYTES)
    async with stores[1]._database.reading() as reading:
        for table in ("files", "pieces", "jobs", "lines", "results"):
            (found,) = await reading.fetch(f"SELECT count(*) FROM {table}")
            assert found[0] == 0, table
    for store in stores:
        await store.close()


def _content_bytes(lines: int) -> int:
    return len(input_file([body(number) for number in range(lines)])[0])


async def test_what_goes_beyond_the_granted_room_is_refused_until_something_goes(
    store_url: str,
) -> None:
    clock = ManualClock()
    limits = Limits(bytes_max=3 * PIECE_BYTES)
    store = await Store.open(store_url, clock=clock, limits=limits)
    kept = await stored_file(store, b"x" * PIECE_BYTES * 2)
    with pytest.raises(FullError, match="store_bytes_max"):
        await stored_file(store, b"x" * PIECE_BYTES * 2)
    await store.delete_file(ANN, kept)
    await clock.advance(4000.0)  # the refused upload counts as long as it could go on
    await store.prune()
    await stored_file(store, b"x" * PIECE_BYTES * 2)
    await store.close()


async def test_a_discarded_upload_is_no_file(store_url: str) -> None:
    store = await Store.open(store_url)
    record = await store.create_file(ANN, "a", "batch")
    await store.append_file(record.id, b"x" * PIECE_BYTES * 100)
    await store.discard_file(record.id)
    with pytest.raises(NotFoundError):
        await store.finish_file(record.id)
    assert await store.prune() == 100
    assert (await store.files(ANN)).items == ()
    await store.close()
