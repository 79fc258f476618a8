"""What a worker holds and what it has to say of it, as values."""

from __future__ import annotations

import msgspec
import pytest

from backends.offline import doing
from backends.offline.doing import REPORT_S, RESULTS_MAX, HeldLine, Holdings
from backends.offline.work import Chunk, Line, Receipt, Result

HELD = Receipt(held=True, hold_s=60.0)


def chunk_of(lines: int, name: str = "c", hold_s: float = 60.0, size: int = 10) -> Chunk:
    """Return a chunk."""
    body = msgspec.Raw(b"x" * size)
    return Chunk(
        chunk_id=name,
        fence=1,
        hold_s=hold_s,
        due_in_s=100.0,
        lines=tuple(Line("job", number, "/v1/completions", body) for number in range(lines)),
    )


def done(line: HeldLine, size: int = 2) -> Result:
    """Return a result of a line."""
    body = msgspec.Raw(b"y" * size)
    return Result(job_id=line.line.job_id, number=line.line.number, status=200, body=body)


def test_more_is_wanted_below_the_mark_and_within_the_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    held = Holdings("w", ahead=3)
    assert held.wants_more()
    lines = held.take(chunk_of(4), 0.0)
    assert not held.wants_more()
    for line in lines[:2]:
        held.finish(line, done(line))
    assert held.wants_more()
    monkeypatch.setattr(doing, "HELD_BYTES_MAX", 20)
    assert held.undone_bytes == 20
    assert not held.wants_more()
    held.finish(lines[2], done(lines[2]))
    assert held.wants_more()


def test_nothing_is_wanted_beside_a_chunk_that_is_computed_alone() -> None:
    held = Holdings("w", ahead=300)
    (line,) = held.take(msgspec.structs.replace(chunk_of(1), alone=True), 0.0)
    assert not held.wants_more()
    held.finish(line, done(line))
    assert not held.wants_more(), "before its result is told, a death is still held against it"
    held.told(line.chunk, held.report(line.chunk, 0.0), HELD, 1.0)
    assert held.wants_more()


def test_a_report_is_due_every_second_at_the_end_and_to_renew() -> None:
    held = Holdings("w", ahead=3)
    first, second = held.take(chunk_of(2), 100.0)
    assert held.next_due_s() == 120.0, "a third of the hold"
    assert not held.finish(first, done(first))
    assert held.next_due_s() == 100.0 + REPORT_S
    assert held.finish(second, done(second)), "the chunk is done: tell at once"
    assert held.next_due_s() == 100.0


def test_a_short_hold_is_renewed_in_time() -> None:
    held = Holdings("w", ahead=3)
    (line, _) = held.take(chunk_of(2, hold_s=1.5), 0.0)
    held.finish(line, done(line))
    assert held.next_due_s() == 0.5


def test_results_stay_until_the_desk_has_taken_them() -> None:
    held = Holdings("w", ahead=3)
    first, second = held.take(chunk_of(2), 0.0)
    held.finish(first, done(first))
    (chunk,) = held.due(2.0)
    lost = held.report(chunk, 0.0)
    held.finish(second, done(second))
    again = held.report(chunk, 0.0)
    assert [result.number for result in lost.results] == [0]
    assert [result.number for result in again.results] == [0, 1]
    assert (lost.done, again.done) == (False, True)
    assert held.told(chunk, again, HELD, 3.0) == []
    assert len(held) == 0


def test_what_came_while_a_report_was_on_its_way_is_told_by_the_next() -> None:
    held = Holdings("w", ahead=3)
    first, second, _ = held.take(chunk_of(3), 0.0)
    held.finish(first, done(first))
    (chunk,) = held.all()
    report = held.report(chunk, 0.0)
    held.finish(second, done(second))
    held.told(chunk, report, HELD, 5.0)
    assert [result.number for result in held.report(chunk, 0.0).results] == [1]


def test_a_report_is_bounded_and_the_last_one_says_done() -> None:
    held = Holdings("w", ahead=3)
    for line in held.take(chunk_of(RESULTS_MAX + 5), 0.0):
        held.finish(line, done(line))
    (chunk,) = held.all()
    first = held.report(chunk, 0.0)
    assert (len(first.results), first.done) == (RESULTS_MAX, False)
    held.told(chunk, first, HELD, 1.0)
    last = held.report(chunk, 0.0)
    assert (len(last.results), last.done) == (5, True)


def test_large_answers_go_in_more_reports_but_each_has_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(doing, "REPORT_BYTES_MAX", 100)
    held = Holdings("w", ahead=3)
    sizes = (60, 30, 30, 500, 10)
    for line, size in zip(held.take(chunk_of(5), 0.0), sizes, strict=True):
        held.finish(line, done(line, size))
    told = []
    while held.all():
        (chunk,) = held.all()
        report = held.report(chunk, 0.0)
        told.append([len(bytes(result.body)) for result in report.results])
        held.told(chunk, report, HELD, 1.0)
    assert told == [[60, 30], [30], [500], [10]]


def test_results_are_kept_beyond_the_hold_until_the_desk_has_spoken() -> None:
    held = Holdings("w", ahead=3)
    first, second = held.take(chunk_of(2), 0.0)
    held.finish(first, done(first))
    (chunk,) = held.due(500.0)
    held.finish(second, done(second))
    late = held.report(chunk, 0.0)
    assert [result.number for result in late.results] == [0, 1]
    assert held.told(chunk, late, HELD, 500.0) == []
    (other, _) = held.take(chunk_of(2, "d"), 500.0)
    held.finish(other, done(other))
    held.told(other.chunk, held.report(other.chunk, 0.0), Receipt(held=False), 900.0)
    assert len(held) == 0
    assert not held.finish(other, done(other)), "it is nobody's"


def test_a_lost_fence_and_an_ended_job_leave_nothing_to_do() -> None:
    held = Holdings("w", ahead=3)
    lines = held.take(chunk_of(2), 0.0)
    (chunk,) = held.all()
    ended = Receipt(held=True, hold_s=60.0, dropped=("job",))
    assert held.told(chunk, held.report(chunk, 0.0), ended, 1.0) == lines
    assert held.report(chunk, 0.0).done
    assert held.undone_bytes == 0
    other = held.take(chunk_of(2, "d"), 0.0)
    assert held.told(
        other[0].chunk, held.report(other[0].chunk, 0.0), Receipt(held=False), 1.0
    ) == (other)


def test_the_chunk_that_lapses_first_is_told_first() -> None:
    held = Holdings("w", ahead=3)
    held.take(chunk_of(1, "late", hold_s=90.0), 0.0)
    held.take(chunk_of(1, "soon", hold_s=30.0), 0.0)
    assert [chunk.chunk_id for chunk in held.due(40.0)] == ["soon", "late"]
