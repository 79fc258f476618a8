"""The desk of the store: chunks, fences, deaths, turns, waits."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest

from backends.offline.records import Limits, NotFoundError
from backends.offline.schema import PIECE_BYTES
from backends.offline.store import Store
from backends.offline.work import Ask, Chunk, Report, Result
from tests.fakes.provider import ManualClock
from tests.fakes.stored_jobs import (
    ANN,
    BOB,
    CHAT,
    ask,
    bad,
    begun_job,
    body,
    given,
    good,
    numbers,
    outcome,
    report,
)

HOLD_S = 60.0


async def _opened(url: str, **limits: float) -> tuple[Store, ManualClock]:
    """A store whose first `hold_s`, in which it buries nobody, are over."""
    clock = ManualClock()
    store = await Store.open(url, clock=clock, limits=Limits(hold_s=HOLD_S, **limits))  # type: ignore[arg-type]
    await clock.advance(HOLD_S)
    return store, clock


async def test_lines_go_out_in_prefix_order_with_the_bodies_that_were_sent(store_url: str) -> None:
    store, _ = await _opened(store_url)
    await begun_job(store, 30, padding=PIECE_BYTES * 2 // 3)  # so that bodies cross pieces
    first, second = await given(store, lines_max=12), await given(store, lines_max=100)
    in_order = sorted(range(30), key=lambda number: (number % 3, number))
    assert numbers(first) + numbers(second) == in_order
    assert first.fence < second.fence
    for line in first.lines + second.lines:
        assert bytes(line.body) == body(line.number, PIECE_BYTES * 2 // 3)
        assert line.url == CHAT
    assert await ask(store) is None
    await store.close()


async def test_a_chunk_ends_where_its_octets_do(store_url: str) -> None:
    store, _ = await _opened(store_url, chunk_lines=4)
    await begun_job(store, 10, padding=100)
    assert len((await given(store, bytes_max=1)).lines) == 1
    assert len((await given(store, bytes_max=300)).lines) == 2
    assert len((await given(store)).lines) == 4  # the most that the configuration grants
    await store.close()


async def test_only_those_get_lines_who_can_do_them(store_url: str) -> None:
    store, _ = await _opened(store_url)
    await begun_job(store, 2)
    for models, urls in ((("other",), (CHAT,)), (("m",), ("/v1/embeddings",))):
        wish = Ask(worker_id="w", models=models, urls=urls, lines_max=9)
        assert await store.ask(wish) is None
    await store.close()


async def test_results_count_once_however_often_they_are_brought(store_url: str) -> None:
    store, _ = await _opened(store_url)
    job = await begun_job(store, 4)
    chunk = await given(store)
    first = chunk.lines[:2]
    assert (await report(store, chunk, (*first, first[0]))).accepted == 2
    again = await report(store, chunk, first, result=bad)
    assert (again.held, again.accepted) == (True, 0)
    stranger = await report(store, chunk, chunk.lines, worker_id="somebody")
    assert (stranger.held, stranger.accepted) == (False, 0)
    assert (await report(store, chunk, chunk.lines[2:], done=True)).accepted == 2
    assert not (await report(store, chunk, chunk.lines[2:], done=True)).held
    job = await store.job(ANN, job.id)
    assert (job.state, job.total, job.completed, job.failed) == ("completed", 4, 4, 0)
    assert (job.prompt_tokens, job.cached_tokens, job.completion_tokens) == (28, 8, 12)
    assert await outcome(store, job) == dict.fromkeys(("c0", "c1", "c2", "c3"), "200")
    await store.close()


async def test_results_of_lines_that_are_not_the_chunks_do_not_count(store_url: str) -> None:
    store, _ = await _opened(store_url)
    job = await begun_job(store, 4)
    mine, theirs = await given(store, lines_max=2), await given(store, "v", lines_max=2)
    other_job = Result(job_id="batch_unknown", number=0, status=200)
    beyond = Result(job_id=job.id, number=99, status=200)
    receipt = await store.report(
        Report(
            worker_id="w",
            chunk_id=mine.chunk_id,
            fence=mine.fence,
            results=(good(theirs.lines[0]), other_job, beyond),
        )
    )
    assert (receipt.held, receipt.accepted) == (True, 0)
    assert (await store.job(ANN, job.id)).completed == 0
    await store.close()


async def test_lines_of_a_silent_worker_go_to_another_and_its_results_come_too_late(
    store_url: str,
) -> None:
    store, clock = await _opened(store_url)
    job = await begun_job(store, 3)
    silent = await given(store)
    await report(store, silent, silent.lines[:1])
    await clock.advance(HOLD_S - 1)
    await report(store, silent)  # each report renews
    await clock.advance(HOLD_S - 1)
    assert await ask(store, "v") is None
    await clock.advance(2.0)
    heir = await given(store, "v")
    assert heir.fence > silent.fence
    late = await report(store, silent, silent.lines[1:])
    assert (late.held, late.accepted) == (False, 0)
    rest = [heir.lines[0]]
    while (more := await ask(store, "v")) is not None:
        rest += more.lines
        await report(store, more, more.lines, worker_id="v", result=bad, done=True)
    await report(store, heir, heir.lines, worker_id="v", result=bad, done=True)
    assert Counter((await outcome(store, job)).values()) == {"200": 1, "400": 2}
    await store.close()


async def test_who_was_late_goes_on_as_long_as_nobody_took_its_place(store_url: str) -> None:
    store, clock = await _opened(store_url)
    await begun_job(store, 1)
    chunk = await given(store)
    await clock.advance(HOLD_S * 3)
    assert (await report(store, chunk, chunk.lines)).accepted == 1
    await store.close()


async def test_lines_that_are_given_back_are_nobodys_fault(store_url: str) -> None:
    store, _ = await _opened(store_url, attempts_max=1)
    job = await begun_job(store, 3)
    for _ in range(5):
        chunk = await given(store)
        await report(store, chunk, back=chunk.lines[:1])
        assert numbers(await given(store, "v")) == [0]
        await report(store, await _same(chunk, 1), worker_id="v", done=True)
        await report(store, chunk, done=True)
    chunk = await given(store)
    assert len(chunk.lines) == 3
    await report(store, chunk, chunk.lines, done=True)
    assert (await store.job(ANN, job.id)).completed == 3
    await store.close()


async def _same(chunk: Chunk, later: int) -> Chunk:
    """The chunk given out that much later: a fence is a number that grows by one."""
    fence = chunk.fence + later
    return Chunk(
        chunk_id=f"chunk_{fence}", fence=fence, hold_s=HOLD_S, due_in_s=0.0, lines=chunk.lines
    )


async def test_a_line_that_kills_workers_gets_an_error_and_its_neighbours_answers(
    store_url: str,
) -> None:
    store, clock = await _opened(store_url)
    job = await begun_job(store, 100)
    deaths = 0
    while (await store.job(ANN, job.id)).state == "in_progress":
        chunk = await ask(store, f"w{deaths}")
        if chunk is None:
            await clock.advance(HOLD_S + 1)
            continue
        assert chunk.alone is (deaths > 0), "its lines are to be computed with no others"
        if 37 in numbers(chunk):
            deaths += 1  # it reports nothing, and is gone
        else:
            await report(store, chunk, chunk.lines, worker_id=f"w{deaths}", done=True)
    found = await outcome(store, job)
    assert found.pop("c37") == "worker_died"
    assert found == {f"c{n}": "200" for n in range(100) if n != 37}
    assert deaths == 3 + 3  # chunks of 100, 13 and 2; then alone as often as is allowed
    await store.close()


async def test_a_store_that_was_just_opened_buries_nobody(store_url: str) -> None:
    first, clock = await _opened(store_url)
    await begun_job(first, 1)
    chunk = await given(first)
    await first.close()
    await clock.advance(HOLD_S * 10)  # no service: its worker can tell nobody that it lives
    store = await Store.open(store_url, clock=clock, limits=Limits(hold_s=HOLD_S))
    assert await ask(store, "v") is None
    assert (await report(store, chunk, chunk.lines)).accepted == 1
    await store.close()


async def test_what_a_worker_held_goes_out_at_once_when_it_begins_anew(store_url: str) -> None:
    clock = ManualClock()
    store = await Store.open(store_url, clock=clock, limits=Limits(hold_s=HOLD_S))
    await begun_job(store, 20)  # in a store that buries nobody yet
    held, others = await given(store, "w", lines_max=8), await given(store, "v", lines_max=4)
    first = Ask(worker_id="w", models=("m",), urls=(CHAT,), lines_max=20, first=True)
    again = await store.ask(first)
    assert again is not None
    assert again.alone  # it may have died over these
    assert len(again.lines) == 1  # an eighth of what it held
    assert numbers(again)[0] in numbers(held)
    assert not (await report(store, held, held.lines)).held
    assert (await report(store, others, others.lines, worker_id="v")).accepted == 4
    await store.close()


async def test_what_a_dispatcher_held_is_nobodys_fault(store_url: str) -> None:
    store, _ = await _opened(store_url)
    await begun_job(store, 20)
    held = await given(store, "spare-1:m", lines_max=8)
    again = await store.ask(
        Ask(
            worker_id="spare-1:m", models=("m",), urls=(CHAT,), lines_max=20, spare=True, first=True
        )
    )
    assert again is not None
    assert len(again.lines) == 20
    assert not again.alone
    assert not (await report(store, held, held.lines, worker_id="spare-1:m")).held
    await store.close()


async def test_no_job_shuts_others_out_and_the_first_due_comes_first(store_url: str) -> None:
    store, _ = await _opened(store_url, chunk_lines=10)
    large = await begun_job(store, 200, owner=ANN, window_s=1000.0)
    await begun_job(store, 200, owner=ANN, window_s=1500.0)
    small = await begun_job(store, 10, owner=BOB, window_s=2000.0)
    owners = [(await given(store, f"w{n}")).lines[0].job_id for n in range(4)]
    assert owners == [large.id, large.id, large.id, small.id]
    await store.close()


async def test_a_chunk_is_filled_from_the_next_job_of_the_model(store_url: str) -> None:
    store, _ = await _opened(store_url)
    jobs = [await begun_job(store, 3, owner=owner) for owner in (ANN, BOB)]
    await begun_job(store, 3, model="another")
    chunk = await given(store, lines_max=5)
    assert [line.job_id for line in chunk.lines] == [jobs[0].id] * 3 + [jobs[1].id] * 2
    receipt = await report(store, chunk, chunk.lines, done=True, busy_s=10.0)
    assert receipt.accepted == 5
    busy_s = [(await store.job(job.owner, job.id)).busy_s for job in jobs]
    assert busy_s == [pytest.approx(6.0), pytest.approx(4.0)]
    await store.close()


async def test_one_who_waits_gets_lines_as_soon_as_there_are_any(store_url: str) -> None:
    store = await Store.open(store_url)
    wish = Ask(worker_id="w", models=("m",), urls=(CHAT,), lines_max=9, wait_s=30.0)
    waiting = asyncio.ensure_future(store.ask(wish))
    await asyncio.sleep(0)
    job = await begun_job(store, 2)
    chunk = await waiting
    assert chunk is not None
    results = asyncio.ensure_future(store.results(ANN, job.id, after=1, wait_s=30.0))
    await report(store, chunk, chunk.lines[:1])
    assert not results.done()
    await report(store, chunk, chunk.lines[1:], done=True)
    assert [(r.sequence, r.custom_id) for r in await results] == [(2, "c1")]
    assert await store.results(ANN, job.id, after=2, wait_s=30.0) == ()  # nothing more can come
    await store.close()


async def test_two_services_on_one_store_give_no_line_twice(store_url: str) -> None:
    stores = [await Store.open(store_url) for _ in range(2)]
    jobs = [await begun_job(stores[0], 150, owner=owner) for owner in (ANN, BOB)]

    async def work(worker_id: str, store: Store) -> int:
        accepted = 0
        while (chunk := await ask(store, worker_id, lines_max=7)) is not None:
            assert (await report(store, chunk, chunk.lines[:3], worker_id=worker_id)).held
            receipt = await report(store, chunk, chunk.lines, worker_id=worker_id, done=True)
            accepted += min(len(chunk.lines), 3)
            accepted += receipt.accepted
        return accepted

    accepted = await asyncio.gather(*(work(f"w{n}", stores[n % 2]) for n in range(6)))
    assert sum(accepted) == 300
    for job in jobs:
        assert (await store_job(stores[1], job.owner, job.id)) == ("completed", 150, 0)
        assert set((await outcome(stores[0], job)).values()) == {"200"}
    for store in stores:
        await store.close()


async def store_job(store: Store, owner: str, job_id: str) -> tuple[str, int, int]:
    job = await store.job(owner, job_id)
    return job.state, job.completed, job.failed


async def test_those_who_ask_at_once_for_the_same_lines_all_get_some(store_url: str) -> None:
    store, _ = await _opened(store_url)
    jobs = [await begun_job(store, 1) for _ in range(6)]
    chunks = await asyncio.gather(*(ask(store, f"w{n}", lines_max=1) for n in range(6)))
    assert {line.job_id for chunk in chunks if chunk for line in chunk.lines} == {
        job.id for job in jobs
    }
    assert await ask(store) is None
    await store.close()


async def test_what_is_left_is_told_by_model_and_deadline(store_url: str) -> None:
    store, clock = await _opened(store_url)
    await begun_job(store, 200, window_s=2000.0)
    await begun_job(store, 10, window_s=1000.0)
    await begun_job(store, 5, model="n", window_s=500.0)
    needs = await store.needs()
    assert [(need.due_in_s, need.lines, need.tokens) for need in needs["m"]] == [
        (pytest.approx(1000.0), 10, 100),
        (pytest.approx(2000.0), 200, 2000),
    ]
    assert [need.lines for need in needs["n"]] == [5]
    chunk = await given(store, lines_max=110)
    await report(store, chunk, chunk.lines, done=True)
    await clock.advance(10.0)
    needs = await store.needs()
    # A hundred lines of the longer job took 10 tokens each, as was thought; the short one is done.
    assert [(need.lines, need.tokens) for need in needs["m"]] == [(100, 1000)]
    assert store.rates() == {"w": pytest.approx(110 * 10 / 10.0, rel=0.5)}
    await clock.advance(100.0)
    assert store.rates() == {}
    await store.close()


async def test_a_result_is_found_by_number_and_by_custom_id_and_only_by_its_owner(
    store_url: str,
) -> None:
    store, _ = await _opened(store_url)
    job = await begun_job(store, 3)
    chunk = await given(store)
    await report(store, chunk, chunk.lines[:1])
    assert await store.result(ANN, job.id, 0) == await store.result(ANN, job.id, "c0")
    for owner, line in ((ANN, 1), (ANN, "c1"), (ANN, "nonsense"), (BOB, 0)):
        with pytest.raises(NotFoundError):
            await store.result(owner, job.id, line)
    with pytest.raises(NotFoundError):
        await store.results(BOB, job.id)
    await store.close()
