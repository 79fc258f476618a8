"""Whose turn it is, and where a chunk ends."""

from __future__ import annotations

from backends.offline.giving import Candidate, Offer, Taking, chosen, span_after_death


def _job(number: int, owner: str = "a", expires_s: float = 100.0, turn: int = 0) -> Candidate:
    return Candidate(number, owner, expires_s, waiting=10, turn=turn)


def _line(number: int, size: int = 1, span: int = 0) -> Offer:
    return Offer(1, number, 0, size, span)


def _taken(taking: Taking) -> list[int]:
    return [line.number for line in taking.lines]


def test_the_earliest_deadline_comes_first_and_then_the_earlier_job() -> None:
    jobs = [_job(1), _job(2), _job(3, expires_s=50.0)]
    assert chosen(jobs, shared=False, lines_max=30) == (3, 1, 2)


def test_later_jobs_only_fill_what_the_first_leaves() -> None:
    assert chosen([_job(1), _job(2), _job(3)], shared=False, lines_max=11) == (1, 2)


def test_a_shared_turn_is_the_longest_waiting_tenants() -> None:
    # Tenant a was served at turn 9, however many jobs it has that never were.
    jobs = [
        _job(1, "a", 1.0, turn=9),
        _job(2, "a", 2.0),
        _job(3, "b", 90.0, 8),
        _job(4, "b", 95.0, 7),
    ]
    assert chosen(jobs, shared=True, lines_max=10) == (4,)


def test_a_chunk_ends_where_its_octets_do_but_one_line_always_fits() -> None:
    taking = Taking(lines_max=10, bytes_max=5)
    taking.fill([_line(1, 9), _line(2, 1)])
    assert _taken(taking) == [1]
    taking = Taking(lines_max=10, bytes_max=5)
    taking.fill([_line(1, 3), _line(2, 2), _line(3, 1)])
    assert _taken(taking) == [1, 2]


def test_lines_over_which_a_worker_died_go_into_smaller_chunks_only() -> None:
    taking = Taking(lines_max=10, bytes_max=100)
    taking.fill([_line(1, span=2), _line(2, span=1), _line(3), _line(4)])
    assert _taken(taking) == [1, 3]
    taking = Taking(lines_max=10, bytes_max=100)
    taking.fill([_line(1), _line(2, span=2), _line(3)])
    assert _taken(taking) == [1, 3]


def test_a_deadly_line_is_alone_after_four_deaths() -> None:
    spans = [2000]
    while spans[-1] > 1:
        spans.append(span_after_death(spans[-1]))
    assert spans == [2000, 250, 32, 4, 1]
