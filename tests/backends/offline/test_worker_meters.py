"""What a worker counts."""

from __future__ import annotations

import pytest

from backends.offline.line_engine import Gauges
from backends.offline.work import Result
from backends.offline.worker_meters import RATE_S, Meters, render


def _result(tokens: int, status: int = 200) -> Result:
    return Result(
        job_id="j", number=0, status=status, prompt_tokens=tokens, completion_tokens=tokens
    )


def test_a_rate_is_of_the_last_seconds_only() -> None:
    meters = Meters()
    for second in range(20):
        meters.finish(_result(50), float(second))
    assert meters.tokens_per_s(19.0) == pytest.approx(110.0), "11 lines of 100 in 10 s"
    assert meters.tokens_per_s(19.0 + RATE_S + 1) == 0.0


def test_many_results_of_a_moment_take_no_room() -> None:
    meters = Meters()
    for number in range(10_000):
        meters.finish(_result(1), number / 10_000)
    assert len(meters._recent) <= RATE_S
    assert meters.tokens_per_s(1.0) == pytest.approx(20_000.0)


def test_busy_time_is_of_all_gpus_and_told_once() -> None:
    meters = Meters()
    meters.note_busy(busy=True, gpus=2, now_s=10.0)
    meters.note_busy(busy=True, gpus=2, now_s=11.0)
    meters.note_busy(busy=False, gpus=2, now_s=12.5)
    meters.note_busy(busy=True, gpus=2, now_s=20.0)
    told_s = meters.take_busy_s()
    assert told_s == 5.0
    assert meters.take_busy_s() == 0.0
    meters.untake_busy_s(told_s)
    meters.note_busy(busy=False, gpus=2, now_s=21.0)
    assert meters.take_busy_s() == 7.0
    assert meters.busy_s == 7.0


def test_the_page_has_each_type_once_and_no_cache_where_it_is_not_known() -> None:
    meters = Meters()
    meters.finish(_result(3), 1.0)
    meters.finish(_result(0, status=400), 1.0)
    page = render(meters, Gauges(4, 5), 2, 1.0)
    assert page.count("# TYPE doherty_worker_lines_total counter") == 1
    assert 'doherty_worker_lines_total{outcome="failed"} 1\n' in page
    assert "doherty_worker_lines_running 5\n" in page
    assert "kv_cache" not in page
    assert "doherty_worker_kv_cache_usage_ratio 0.25\n" in render(meters, Gauges(0, 0, 0.25), 0, 1)
