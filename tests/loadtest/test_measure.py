"""Figures from outcomes: quantiles, rates, shares, and what is left out."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadtest.measure import (
    Outcome,
    Spread,
    intervals,
    quantile,
    spread,
    summarise,
    warmup_count,
)

floats = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=40)


@settings(derandomize=True, max_examples=200, deadline=None)
@given(floats, st.floats(0.001, 1.0))
def test_a_quantile_is_the_least_value_that_covers_its_share(
    values: list[float], share: float
) -> None:
    found = quantile(values, share)
    assert found in values
    covered = sum(v <= found for v in values)
    assert covered >= share * len(values) - 1e-9
    smaller = [v for v in values if v < found]
    assert len(smaller) < share * len(values)


def test_nothing_has_no_quantile_and_no_spread() -> None:
    assert quantile([], 0.5) is None
    assert spread([]) is None
    assert spread([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0)
    assert spread([4.0, 1.0]) == Spread(2.5, 1.0, 4.0)


@pytest.mark.parametrize(
    ("text", "count"), [("0", 0), ("0.1", 20), ("10%", 20), ("1", 1), ("50", 50), ("0%", 0)]
)
def test_warmup_is_a_number_or_a_share(text: str, count: int) -> None:
    assert warmup_count(text, 200) == count


@pytest.mark.parametrize("text", ["", "x", "-1", "1.5", "100%", "nan", "inf"])
def test_other_warmups_are_errors(text: str) -> None:
    with pytest.raises(ValueError, match="expected a number of requests, or a share"):
        warmup_count(text, 200)


def outcome(index: int, **changes: object) -> Outcome:
    values: dict[str, object] = {
        "index": index,
        "scheduled_s": float(index),
        "sent_s": index + 0.25,
        "first_content_s": index + 0.75,
        "last_content_s": index + 1.75,
        "ended_s": index + 2.25,
        "prompt_tokens": 100,
        "cached_tokens": 40,
        "output_tokens": 11,
        "replica": f"r{index % 2}",
    }
    return Outcome(**{**values, **changes})  # type: ignore[arg-type]


def test_the_figures_of_a_replay() -> None:
    outcomes = [
        outcome(0, prompt_tokens=99999),  # warm-up
        outcome(1),
        outcome(2, cached_tokens=100),
        outcome(3, first_content_s=5.25),
        outcome(4, error="cut", detail="torn"),
    ]
    summary = summarise(reversed(outcomes), 1, hit_rate_bound=0.7)
    assert (summary.requests, summary.succeeded, summary.warmup_requests) == (4, 3, 1)
    assert summary.errors == {"cut": 1}
    assert summary.error_example == "torn"
    assert summary.duration_s == 5.0  # from 1.25, when the first was sent, to 6.25
    assert (summary.prompt_tokens, summary.cached_tokens) == (300, 180)
    assert summary.hit_rate == 0.6
    assert summary.hit_rate_bound == 0.7
    assert (summary.ttft_p50_s, summary.ttft_p99_s) == (0.5, 2.0)
    assert summary.tpot_p50_s == 0.1
    assert summary.total_p50_s == 2.0
    assert summary.output_tokens_per_s == 33 / 5.0
    assert (summary.lateness_p99_s, summary.lateness_max_s) == (0.25, 0.25)
    assert {name: f.requests for name, f in summary.replicas.items()} == {"r0": 1, "r1": 2}
    assert summary.replicas["r1"].prompt_token_share == 2 / 3
    assert summary.replicas["r1"].work_tokens == 120
    assert summary.work_max_over_mean == 2.0  # 120 and 0
    assert summarise(outcomes, 1, replica_count=4).work_max_over_mean == 4.0


def test_what_cannot_be_known_is_none() -> None:
    unknown = [outcome(i, cached_tokens=None, replica="unknown") for i in range(3)]
    summary = summarise(unknown, 0)
    assert summary.cached_tokens is None
    assert summary.hit_rate is None
    assert summary.work_max_over_mean is None
    assert summary.replicas["unknown"].requests == 3
    nothing = summarise([], 0)
    assert nothing.requests == 0
    assert nothing.ttft_p50_s is None
    single = outcome(0, output_tokens=1)
    assert single.tpot_s is None
    assert outcome(0, first_content_s=0.0).ttft_s is None
    assert outcome(0, sent_s=-0.001).lateness_s == 0.0


def test_intervals_split_the_replay_evenly() -> None:
    outcomes = [outcome(i, cached_tokens=10 * i) for i in range(10)]
    pieces = intervals([*outcomes, outcome(40, error="cut")], 3)
    assert [round(p.at_s - 0.25, 2) for p in pieces] == [1.5, 4.5, 7.5]
    assert [round(p.hit_rate or 0, 3) for p in pieces] == [0.1, 0.4, 0.75]
    assert all(p.ttft_p50_s == 0.5 for p in pieces)
    assert intervals([], 3) == []
    assert len(intervals([outcome(0)], 3)) == 1
