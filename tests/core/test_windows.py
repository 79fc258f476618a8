"""What happened of late: differences of counters, and percentiles off buckets."""

from __future__ import annotations

import bisect
import random

import pytest

from proxy.core.windows import History, Totals, Window, percentiles

BY_A = (("replica", "a"), ("code", "200"))
BY_B = (("replica", "b"), ("code", "200"))


def totals(at_s: float, **values: float) -> Totals:
    made = Totals(at_s)
    for name, value in values.items():
        made.add("n_total", (("replica", name), ("code", "200")), value)
    return made


def test_growth_is_summed_over_other_labels_and_workers() -> None:
    before, after = totals(0.0, a=1, b=5), totals(10.0, a=4, b=5)
    after.add("n_total", (("replica", "a"), ("code", "500")), 2)
    after.add("n_total", BY_A, 1)  # another worker's
    window = Window(before, after)
    assert window.by("n_total", "replica") == {("a",): 6.0, ("b",): 0.0}
    assert window.by("n_total", "replica", "code")[("a", "500")] == 2.0
    assert window.rates("n_total", "replica") == {"a": 0.6}
    assert window.rates("n_total", "nothing") == {"": 0.6}
    assert window.by("unknown", "replica") == {}


def test_a_counter_that_began_anew_counts_from_its_beginning() -> None:
    window = Window(totals(0.0, a=100), totals(1.0, a=7, b=2))
    assert window.by("n_total", "replica") == {("a",): 7.0, ("b",): 2.0}


def test_buckets_that_began_anew_count_from_their_beginning() -> None:
    before, after = Totals(0.0), Totals(1.0)
    before.add("h", BY_A, 0.0, (5, 5))
    after.add("h", BY_A, 0.0, (6, 9))
    after.add("h", BY_B, 0.0, (1, 0))
    assert Window(before, after).buckets_by("h", "code") == {"200": [2, 4]}
    after = Totals(1.0)
    after.add("h", BY_A, 0.0, (0, 3))
    assert Window(before, after).buckets_by("h", "replica") == {"a": [0, 3]}


def test_no_time_is_no_rate() -> None:
    now = totals(1.0, a=1)
    assert Window(now, now).rates("n_total", "replica") == {}


def test_a_window_is_as_long_as_it_should_be_or_as_there_is_anything() -> None:
    history = History(window_s=10.0, interval_s=2.0)
    first = totals(0.0, a=1)
    assert history.due(0.0)
    assert history.window(first).seconds == 0.0
    history.keep(first)
    assert not history.due(1.0)
    assert history.due(1.95)
    assert history.window(totals(1.0, a=1)).seconds == 1.0
    for second in range(2, 100, 2):
        history.keep(totals(float(second), a=second))
        window = history.window(totals(second + 1.0, a=second + 1))
        assert window.seconds <= 11.0
        assert window.seconds == min(second + 1.0, 11.0)


def test_after_a_pause_the_window_tells_how_long_it_is() -> None:
    history = History(window_s=10.0, interval_s=2.0)
    history.keep(totals(0.0, a=0))
    history.keep(totals(100.0, a=50))
    assert history.window(totals(101.0, a=60)).seconds == 1.0
    assert history.window(totals(500.0, a=60)).seconds == 400.0  # nothing nearer is known


@pytest.mark.parametrize("seed", range(5))
def test_percentiles_lie_in_the_bucket_of_the_true_ones(seed: int) -> None:
    draw = random.Random(seed)
    edges = (0.01, 0.1, 0.5, 1.0, 5.0)
    values = sorted(draw.lognormvariate(-1.5, 1.2) for _ in range(draw.randrange(1, 500)))
    counts = [0] * (len(edges) + 1)
    for value in values:
        counts[bisect.bisect_left(edges, value)] += 1
    found = percentiles(edges, counts)
    assert found.count == len(values)
    for got, q in ((found.p50_s, 0.5), (found.p95_s, 0.95), (found.p99_s, 0.99)):
        assert got is not None
        true = values[max(0, -int(-q * len(values) // 1) - 1)]
        bucket = bisect.bisect_left(edges, true)
        low = edges[bucket - 1] if bucket else 0.0
        high = edges[bucket] if bucket < len(edges) else edges[-1]
        assert low <= got <= max(high, low)


def test_of_nothing_there_is_no_percentile() -> None:
    assert percentiles((1.0,), (0, 0)).p50_s is None
    assert percentiles((1.0,), (0, 0)).count == 0


def test_above_the_last_edge_is_at_it() -> None:
    assert percentiles((1.0, 2.0), (0, 0, 3)).p50_s == 2.0


def test_within_a_bucket_values_lie_evenly() -> None:
    found = percentiles((1.0, 2.0), (0, 100, 0))
    assert (found.p50_s, found.p95_s, found.p99_s) == (1.5, 1.95, 1.99)
