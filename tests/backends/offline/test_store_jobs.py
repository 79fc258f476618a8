"""Jobs of the store: from validation to their end, whichever it is."""

from __future__ import annotations

from collections import Counter

import msgspec
import pytest

from backends.offline.database import Row, Transaction
from backends.offline.outcomes import written
from backends.offline.records import (
    ClaimLostError,
    ConflictError,
    JobError,
    Limits,
    NotFoundError,
    StoreError,
)
from backends.offline.store import Store
from backends.offline.work import Result
from tests.fakes.provider import ManualClock
from tests.fakes.stored_jobs import (
    ANN,
    BOB,
    CHAT,
    bad,
    begun_job,
    body,
    content,
    given,
    input_file,
    outcome,
    read,
    report,
    stored_file,
)


async def test_a_job_completes_with_its_last_result_and_has_both_files(store_url: str) -> None:
    store = await Store.open(store_url)
    job = await begun_job(store, 5)
    assert (job.state, job.total, job.model, job.tokens) == ("in_progress", 5, "m", 50)
    chunk = await given(store)
    await report(store, chunk, chunk.lines[:3])
    await report(store, chunk, chunk.lines[3:], result=bad, done=True)
    job = await store.job(ANN, job.id)
    assert (job.state, job.completed, job.failed) == ("completed", 3, 2)
    assert None not in (job.in_progress_s, job.finalizing_s, job.completed_s)
    output, errors = (
        await content(store, job.output_file_id),
        await content(store, job.error_file_id),
    )
    given_order = [line.number for line in chunk.lines]
    assert [line.custom_id for line in read(output)] == [f"c{n}" for n in sorted(given_order[:3])]
    assert [line.custom_id for line in read(errors)] == [f"c{n}" for n in sorted(given_order[3:])]
    first = read(output)[0]
    assert first.id == f"batch_req_{job.id.removeprefix('batch_')}_{first.custom_id[1:]}"
    assert first.response is not None
    assert first.response.body == {"answer": int(first.custom_id[1:])}
    for start in (0, 1, len(output) // 2, len(output) - 1):
        assert await content(store, job.output_file_id, start=start) == output[start:]
    assert [f.purpose for f in (await store.files(ANN)).items] == ["batch_output"] * 2 + ["batch"]
    await store.close()


async def test_a_job_without_errors_has_no_error_file_and_one_without_lines_none_at_all(
    store_url: str,
) -> None:
    store = await Store.open(store_url)
    job = await begun_job(store, 1)
    chunk = await given(store)
    await report(store, chunk, chunk.lines, done=True)
    assert (await store.job(ANN, job.id)).error_file_id is None
    empty = await begun_job(store, 0)
    assert (empty.state, empty.output_file_id, empty.error_file_id) == ("completed", None, None)
    await store.close()


async def test_a_job_that_validation_refuses_tells_why(store_url: str) -> None:
    store = await Store.open(store_url)
    job = await store.create_job(ANN, await stored_file(store, b"no"), CHAT, window_s=60)
    assert job.state == "validating"
    assert await store.claim_validation("s") is not None
    errors = (JobError(code="invalid_json_line", message="This is no JSON.", line=1),)
    await store.fail_job("s", job.id, errors)
    job = await store.job(ANN, job.id)
    assert (job.state, job.errors, job.total) == ("failed", errors, 0)
    with pytest.raises(ConflictError, match="failed"):
        await store.cancel_job(ANN, job.id)
    await store.close()


async def test_validation_that_dies_is_begun_anew_by_another_service(store_url: str) -> None:
    clock = ManualClock()
    store = await Store.open(store_url, clock=clock, limits=Limits(hold_s=60.0))
    text, lines = input_file([body(n) for n in range(10)])
    job = await store.create_job(ANN, await stored_file(store, text), CHAT, window_s=9999)
    assert await store.claim_validation("first") is not None
    await store.add_lines("first", job.id, lines[:5])
    assert (await store.job(ANN, job.id)).total == 0  # nobody knows yet
    await clock.advance(50.0)
    await store.add_lines("first", job.id, lines[5:6])
    await clock.advance(50.0)
    assert await store.claim_validation("second") is None  # the last lines renewed the claim
    await clock.advance(11.0)
    assert await store.claim_validation("second") is not None
    with pytest.raises(ClaimLostError):
        await store.add_lines("first", job.id, lines[6:])
    await store.add_lines("second", job.id, lines)
    with pytest.raises(ClaimLostError):
        await store.begin_job("first", job.id, "m")
    await store.begin_job("second", job.id, "m")
    assert len((await given(store)).lines) == 10
    await store.close()


async def test_the_same_custom_id_twice_is_no_job(store_url: str) -> None:
    store = await Store.open(store_url)
    text, lines = input_file([body(0), body(1)])
    job = await store.create_job(ANN, await stored_file(store, text), CHAT, window_s=9999)
    await store.claim_validation("s")
    await store.add_lines("s", job.id, lines)
    with pytest.raises(StoreError):
        await store.add_lines("s", job.id, lines[:1])
    await store.begin_job("s", job.id, "m")  # the transaction that failed changed nothing
    assert (await store.job(ANN, job.id)).total == 2
    await store.close()


async def test_a_cancelled_job_keeps_what_was_done(store_url: str) -> None:
    store = await Store.open(store_url)
    job = await begun_job(store, 9)
    chunk = await given(store, lines_max=5)
    await report(store, chunk, chunk.lines[:2])
    assert (await store.cancel_job(ANN, job.id)).state == "cancelling"
    receipt = await report(store, chunk, chunk.lines[2:])
    assert (receipt.held, receipt.accepted, receipt.dropped) == (True, 0, (job.id,))
    assert await store.finish_due() == 1
    assert await store.finish_due() == 0
    job = await store.cancel_job(ANN, job.id)  # asked again, it says the same
    assert (job.state, job.total, job.completed, job.failed) == ("cancelled", 9, 2, 7)
    assert Counter((await outcome(store, job)).values()) == {"200": 2, "batch_cancelled": 7}
    with pytest.raises(NotFoundError):
        await store.cancel_job(BOB, job.id)
    await store.close()


async def test_an_expired_job_keeps_what_was_done(store_url: str) -> None:
    clock = ManualClock()
    store = await Store.open(store_url, clock=clock)
    job = await begun_job(store, 9, window_s=100.0)
    chunk = await given(store, lines_max=5)
    assert chunk.due_in_s == pytest.approx(100.0)
    await report(store, chunk, chunk.lines[:2])
    assert await store.finish_due() == 0
    await clock.advance(100.0)
    assert await store.finish_due() == 1
    assert (await report(store, chunk, chunk.lines[2:])).dropped == (job.id,)
    job = await store.job(ANN, job.id)
    assert (job.state, job.completed, job.failed) == ("expired", 2, 7)
    assert Counter((await outcome(store, job)).values()) == {"200": 2, "batch_expired": 7}
    with pytest.raises(ConflictError, match="expired"):
        await store.cancel_job(ANN, job.id)
    await store.close()


async def test_the_end_of_a_large_job_goes_in_slices(store_url: str) -> None:
    store = await Store.open(store_url)
    job = await begun_job(store, 4500, lines_at_once=1500)
    await store.cancel_job(ANN, job.id)
    assert await store.finish_due() == 1
    found = await outcome(store, job)
    assert len(found) == 4500
    assert set(found.values()) == {"batch_cancelled"}
    assert len(await store.results(ANN, job.id, after=4400, limit=1000)) == 100
    await store.close()


@pytest.mark.parametrize("end", ["cancelled", "expired"])
async def test_a_job_can_end_while_it_is_validated(store_url: str, end: str) -> None:
    clock = ManualClock()
    store = await Store.open(store_url, clock=clock)
    text, lines = input_file([body(n) for n in range(10)])
    job = await store.create_job(ANN, await stored_file(store, text), CHAT, window_s=100.0)
    await store.claim_validation("s")
    await store.add_lines("s", job.id, lines[:5])
    if end == "cancelled":
        await store.cancel_job(ANN, job.id)
    else:
        await clock.advance(101.0)
    await store.finish_due()
    job = await store.job(ANN, job.id)
    assert (job.state, job.total, job.failed, job.error_file_id) == (end, 0, 0, None)
    with pytest.raises(ClaimLostError):
        await store.add_lines("s", job.id, lines[5:])
    assert await store.claim_validation("t") is None
    await store.close()


async def test_results_that_come_with_the_end_of_the_job_are_not_missed(
    store_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = await Store.open(store_url)
    job = await begun_job(store, 2)
    chunk = await given(store)
    await report(store, chunk, chunk.lines[:1])
    really = store._bounded

    async def late(reading: Transaction, which: str, *values: int) -> list[Row]:
        found = await really(reading, which, *values)
        monkeypatch.setattr(store, "_bounded", really)
        await report(store, chunk, chunk.lines[1:], done=True)  # between one look and the next
        return found

    monkeypatch.setattr(store, "_bounded", late)
    (last,) = await store.results(ANN, job.id, after=1, wait_s=30.0)
    assert (last.sequence, last.custom_id) == (2, "c1")
    await store.close()


async def test_a_list_of_results_is_bounded_in_octets_too(store_url: str) -> None:
    store = await Store.open(store_url)
    job = await begun_job(store, 5)
    large = msgspec.Raw(b'{"a":"%b"}' % (b"x" * 600_000))
    chunk = await given(store)
    await report(
        store,
        chunk,
        chunk.lines,
        result=lambda line: Result(job_id=job.id, number=line.number, status=200, body=large),
    )
    for in_order in (False, True):
        seen, cursor = list[str](), -1
        while some := await store.results(ANN, job.id, after=cursor, limit=5, in_order=in_order):
            assert len(some) == 1  # two are more than a MiB
            cursor = some[-1].number if in_order else some[-1].sequence
            seen += [result.custom_id for result in some]
        assert sorted(seen) == [f"c{n}" for n in range(5)]
    await store.close()


async def test_jobs_are_listed_in_pages_newest_first(store_url: str) -> None:
    store = await Store.open(store_url)
    jobs = [await begun_job(store, 1) for _ in range(4)]
    page = await store.jobs(ANN, limit=3)
    assert ([job.id for job in page.items], page.more) == ([j.id for j in jobs[:0:-1]], True)
    page = await store.jobs(ANN, limit=3, after=jobs[1].id)
    assert ([job.id for job in page.items], page.more) == ([jobs[0].id], False)
    assert (await store.jobs(BOB)).items == ()
    with pytest.raises(NotFoundError):
        await store.jobs(BOB, after=jobs[1].id)
    await store.close()


def test_a_line_of_output_is_one_line_whatever_the_response_looks_like() -> None:
    layout = msgspec.Raw(b'{\n "a":\r\n "b\\n"\n}')
    line = written('q"\n\\', Result(job_id="batch_1", number=3, status=200, body=layout))
    assert line.count(b"\n") == 1
    (found,) = read(line)
    assert found.custom_id == 'q"\n\\'
    assert found.response is not None
    assert found.response.body == {"a": "b\n"}


async def test_results_in_the_order_of_lines_end_before_the_first_that_is_not_done(
    store_url: str,
) -> None:
    store = await Store.open(store_url)
    job = await begun_job(store, 6)
    chunk = await given(store)
    lines = {line.number: line for line in chunk.lines}

    async def numbers(after: int, limit: int = 100) -> list[int]:
        found = await store.results(ANN, job.id, after=after, limit=limit, in_order=True)
        return [result.number for result in found]

    assert await numbers(-1) == []
    await report(store, chunk, [lines[5], lines[1], lines[0], lines[3]])
    assert await numbers(-1) == [0, 1]
    assert await numbers(-1, limit=1) == [0]
    assert await numbers(1) == []
    assert await numbers(2) == [3], "who has passed a line does not wait for it"
    await store.cancel_job(ANN, job.id)
    await report(store, chunk, [], done=True)
    await store.finish_due()
    assert (await store.job(ANN, job.id)).state == "cancelled"
    assert await numbers(0, limit=4) == [1, 2, 3, 4]
    await store.close()


def test_an_answer_that_is_no_utf_8_spoils_no_file() -> None:
    faulty = Result(
        job_id="batch_1", number=0, status=200, body=msgspec.Raw(b'{"a":"\xff\xc3\xa4"}')
    )
    row = msgspec.json.decode(written("c", faulty))
    assert row["response"]["body"] == {"a": "\ufffdä"}
