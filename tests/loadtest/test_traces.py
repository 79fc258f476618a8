"""Which requests of a trace are replayed: the same ones for the same arguments."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadtest.traces import (
    Arrival,
    Selection,
    Trace,
    TraceError,
    in_sending_order,
    join_runs,
    reusable_share,
    select,
    shared_blocks,
)


def arrival(at_s: float, input_tokens: int = 100, output_tokens: int = 10) -> Arrival:
    return Arrival(
        at_s=at_s,
        think_s=at_s,
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        runs=((int(at_s), 1),),
    )


OPEN = Trace(source="open", kind="mooncake", arrivals=tuple(arrival(i) for i in range(10)))
CLOSED = Trace(
    source="closed",
    kind="agent",
    sessions=tuple(tuple(arrival(t) for t in range(n)) for n in (4, 1, 3, 2)),
)


def times(selection: Selection) -> list[float]:
    return [a.at_s for a in select(OPEN, selection).arrivals]


def lengths(selection: Selection) -> list[int]:
    return [len(turns) for turns in select(CLOSED, selection).sessions]


def test_open_loop_is_cut_by_place_and_time() -> None:
    assert times(Selection()) == [float(i) for i in range(10)]
    assert times(Selection(limit=3)) == [0.0, 1.0, 2.0]
    assert times(Selection(offset=4, limit=3)) == [0.0, 1.0, 2.0]  # from its own beginning
    assert times(Selection(duration_s=2.0)) == [0.0, 1.0, 2.0]
    assert times(Selection(duration_s=2.0, speed=2.0)) == [0.0, 1.0, 2.0, 3.0, 4.0]


def test_closed_loop_limit_takes_turns_among_the_users() -> None:
    assert lengths(Selection(users=2)) == [4, 1, 3, 2]
    assert lengths(Selection(users=2, limit=3)) == [2, 1]
    assert lengths(Selection(users=2, limit=7)) == [4, 1, 1, 1]
    assert lengths(Selection(users=4, limit=7)) == [2, 1, 2, 2]
    assert lengths(Selection(users=1, limit=2)) == [2]
    assert lengths(Selection(users=1, offset=1)) == [1, 3, 2]


def test_long_prompts_are_left_out_and_long_answers_cut() -> None:
    rows = (arrival(0, 50, 10), arrival(1, 500, 10), arrival(2, 60, 100))
    trace = Trace(source="t", kind="azure", arrivals=rows)
    chosen = select(trace, Selection(input_tokens_max=100, output_tokens_max=40)).arrivals
    assert [a.input_tokens for a in chosen] == [50, 60]
    assert [a.output_tokens for a in chosen] == [10, 40]
    scaled = select(trace, Selection(output_tokens_scale=0.01)).arrivals
    assert [a.output_tokens for a in scaled] == [1, 1, 1]


def test_long_pauses_are_cut() -> None:
    (turns, *_) = select(CLOSED, Selection(think_s_max=2.0)).sessions
    assert [t.think_s for t in turns] == [0.0, 1.0, 2.0, 2.0]


@pytest.mark.parametrize(
    "selection", [Selection(offset=10), Selection(input_tokens_max=5)], ids=["offset", "length"]
)
def test_an_empty_choice_is_an_error(selection: Selection) -> None:
    with pytest.raises(TraceError, match="none of its 10 requests is left"):
        select(OPEN, selection)


def test_sessions_are_counted_side_by_side() -> None:
    assert [a.at_s for a in in_sending_order(CLOSED)] == [0, 0, 0, 0, 1, 1, 1, 2, 2, 3]
    assert CLOSED.request_count == 10


ids = st.lists(st.integers(0, 8), max_size=8)


def prompt(block_ids: list[int]) -> Arrival:
    runs = join_runs((block_id, 1) for block_id in block_ids)
    return Arrival(input_tokens=512 * len(block_ids), output_tokens=1, runs=runs)


@settings(derandomize=True, max_examples=200, deadline=None)
@given(ids, ids, ids)
def test_shared_blocks_of_runs_are_those_of_ids(
    head: list[int], left: list[int], right: list[int]
) -> None:
    a, b = head + left, head + right
    expected = next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )
    assert shared_blocks(prompt(a), prompt(b)) == expected


def test_the_bound_counts_whole_prefixes_after_the_warmup() -> None:
    rows = tuple(prompt(blocks) for blocks in ([0, 1], [0, 1, 2], [0, 3], [9, 1]))
    assert reusable_share(rows, 0) == (0 + 2 + 1 + 0) / 9
    assert reusable_share(rows, 2) == 1 / 4
    assert reusable_share(rows, 4) is None
