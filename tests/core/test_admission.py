"""Limits of tenants: exact over several workers, settled once, and told in OpenAI's words."""

from __future__ import annotations

import random
from bisect import bisect_left
from itertools import accumulate
from typing import Any

import pytest

from proxy.config_access import AccessConfig, ModelAccess, TenantConfig
from proxy.core import admission, quota
from proxy.core.admission import Allowance, Claim, Prices, Refused, admit, allowances, settle, told
from proxy.core.quota import Account
from proxy.core.usage import Usage
from tests.core.test_quota import memory

DAY = 86_400.0 * 20_000


class Stage:
    """A tenant at several workers."""

    def __init__(self, workers: int = 1, **tenant: Any) -> None:
        cells = memory(workers)
        self.allowed = Allowance(TenantConfig(name="t", **tenant))
        self.accounts = [Account(cells, workers, 0, place) for place in range(workers)]
        self.now_s = 1000.0
        self.unix_s = DAY

    def ask(
        self, tokens: int = 1, cost: int = 0, place: int = 0, *, rated: bool = True
    ) -> Claim | Refused:
        claim = Claim(tokens, cost, rated=rated)
        account = self.accounts[place]
        return admit(account, self.allowed, claim, self.now_s, self.unix_s) or claim

    def end(
        self, claim: Claim | Refused, tokens: int = 0, cost: int = 0, place: int = 0,
        *, begun: bool = True,
    ) -> None:  # fmt: skip
        assert isinstance(claim, Claim)
        usage = Usage(tokens, 0, None) if tokens else None
        settle(self.accounts[place], claim, usage, cost, self.now_s, self.unix_s, begun=begun)

    def wait(self, seconds: float) -> None:
        """Time goes by, and every worker sweeps."""
        self.now_s += seconds
        for account in self.accounts:
            account.advance(quota.bucket_at(self.now_s))

    def refused(self, *args: Any, **words: Any) -> Refused:
        answer = self.ask(*args, **words)
        assert isinstance(answer, Refused)
        return answer


def assert_empty(stage: Stage) -> None:
    for kind in (quota.CONCURRENT, quota.HELD_TOKENS, quota.HELD_COST):
        assert stage.accounts[0].sum(kind) == 0


def test_requests_of_any_minute() -> None:
    stage = Stage(2, requests_per_min=3)
    for place in (0, 1, 0):
        stage.end(stage.ask(place=place), 1, place=place)
        stage.wait(10.0)
    refused = stage.refused(place=1)
    assert (refused.kind, refused.limit, refused.used, refused.requested) == ("requests", 3, 3, 1)
    assert refused.wait_s == pytest.approx(30.1)
    stage.wait(refused.wait_s)
    stage.end(stage.ask(place=1), 1, place=1)
    assert stage.refused().kind == "requests"
    assert_empty(stage)


def test_tokens_are_reserved_and_then_settled() -> None:
    stage = Stage(tokens_per_min=100)
    first = stage.ask(70)
    assert (refused := stage.refused(40)).kind == "tokens"
    assert "Limit 100, Used 70, Requested 40. Please try again in" in refused.message("t")
    stage.end(first, 20)
    second = stage.ask(80)
    assert isinstance(second, Claim)
    stage.end(second, 95)  # more than was reserved
    assert stage.refused(1).used == 115
    assert_empty(stage)


def test_what_no_replica_has_had_does_not_count() -> None:
    stage = Stage(tokens_per_min=100, requests_per_min=1)
    stage.end(stage.ask(100), begun=False)
    stage.end(stage.ask(100), begun=True)  # one that the engine has refused
    assert stage.accounts[0].sum(quota.TOKENS) == 0
    assert stage.refused(1).kind == "requests"
    assert_empty(stage)


def test_what_can_never_fit_is_told_so() -> None:
    stage = Stage(tokens_per_min=100)
    refused = stage.refused(101)
    assert refused.wait_s < 0.0
    assert not refused.over
    assert "can never be let in" in refused.message("t")
    assert stage.accounts[0].sum(quota.TOKENS) == 0


def test_requests_at_a_time_over_all_workers() -> None:
    stage = Stage(4, max_concurrent=3)
    running = [stage.ask(place=place) for place in range(3)]
    refused = stage.refused(place=3)
    assert (refused.kind, refused.wait_s) == ("concurrent", 1.0)
    stage.end(running[1], 5, place=1)
    assert isinstance(stage.ask(place=3), Claim)
    assert stage.refused(place=0).kind == "concurrent"


def test_the_tokens_of_a_day() -> None:
    stage = Stage(2, tokens_per_day=100)
    stage.end(stage.ask(60), 60)
    running = stage.ask(30, place=1)
    blocked = stage.refused(20)  # what runs may need less
    assert (blocked.kind, blocked.wait_s, blocked.over) == ("tokens_per_day", 1.0, False)
    assert stage.refused(50).over  # that cannot fit any more
    stage.end(running, 10, place=1)
    stage.end(stage.ask(30), 30)
    spent = stage.refused(1)
    assert spent.over
    assert "begins anew at midnight UTC" in spent.message("t")
    stage.unix_s += 86_400.0
    assert isinstance(stage.ask(100), Claim)


def test_a_budget_ends() -> None:
    stage = Stage(budget_per_day=0.002)
    stage.end(stage.ask(10, 1_500_000), 10, 1_500_000)
    refused = stage.refused(10, 600_000)
    assert (refused.kind, refused.over) == ("budget_per_day", True)
    assert "Limit 0.002, Used 0.0015, Requested 0.0006" in refused.message("t")
    stage.end(stage.ask(10, 400_000), 10, 500_000)
    assert stage.refused(0, 0).over  # even what costs nothing
    assert Stage(budget_per_day=0.0).refused(0, 0).over


def test_lines_of_jobs_count_for_the_day_alone() -> None:
    stage = Stage(requests_per_min=1, tokens_per_min=10, max_concurrent=1, tokens_per_day=100)
    lines = [stage.ask(40, rated=False) for _ in range(2)]
    assert stage.refused(40, rated=False).kind == "tokens_per_day"
    person = stage.ask(5)
    for claim, used in zip((*lines, person), (50, 40, 5), strict=True):
        stage.end(claim, used)
    assert stage.accounts[0].sum(quota.TOKENS) == 5
    assert stage.accounts[0].of_day(quota.DAY_TOKENS, 20_000) == 95
    assert_empty(stage)


def test_nothing_is_settled_twice() -> None:
    stage = Stage(tokens_per_min=10)
    claim = stage.ask(5)
    stage.end(claim, 5)
    with pytest.raises(AssertionError):
        stage.end(claim, 5)


@pytest.mark.sweep
@pytest.mark.parametrize("even", [True, False])
def test_no_minute_has_more_than_its_limit_and_a_busy_one_has_nearly_all(even: bool) -> None:
    """Four workers, 200 clients that come again at once, answers shorter than reserved.

    Who begins with a burst has it again each minute, and a tenth of a second: a minute that
    begins right after one misses most of it. With an even first minute, all minutes are full.
    """
    draw = random.Random(8)
    stage, limit = Stage(4, tokens_per_min=100_000), 100_000
    ends: list[tuple[float, Claim, int, int]] = []
    used: list[tuple[float, int]] = []
    total = 0
    while stage.now_s < 1181.0:
        stage.wait(0.1)
        for end in [end for end in ends if end[0] <= stage.now_s]:
            ends.remove(end)
            stage.end(end[1], end[2], place=end[3])
        refused = 0
        due = limit * (stage.now_s - 1000.0) / 60.0
        while len(ends) < 200 and refused < 3:
            if even and stage.now_s < 1060.0 and total >= due:
                break
            place, tokens = draw.randrange(4), draw.randrange(100, 500)
            claim = stage.ask(tokens, place=place)
            if isinstance(claim, Refused):
                refused += 1
                continue
            really = int(tokens * draw.uniform(0.95, 1.0))
            ends.append((stage.now_s + draw.uniform(0.05, 1.0), claim, really, place))
            used.append((stage.now_s, really))
            total += really
    begins = [1000.0 + 0.5 * step for step in range(241)]
    at_s, sums = [at_s for at_s, _ in used], list(accumulate((n for _, n in used), initial=0))
    edges = [(bisect_left(at_s, begin), bisect_left(at_s, begin + 60.0)) for begin in begins]
    minutes = [sums[end] - sums[begin] for begin, end in edges]
    assert max(minutes) <= limit
    assert sum(minutes[::120]) / 3 >= 0.99 * limit
    if even:
        assert min(minutes) >= 0.99 * limit
    for _, claim, really, place in ends:
        stage.end(claim, really, place=place)
    assert_empty(stage)


def test_who_has_limits() -> None:
    tenants = (
        TenantConfig(name="z", tokens_per_min=1),
        TenantConfig(name="free", weight=3.0),
        TenantConfig(name="b", budget_per_day=0.0),
    )
    assert list(allowances(AccessConfig(tenants=tenants))) == ["b", "z"]


def test_what_tokens_cost() -> None:
    prices = Prices(ModelAccess(prompt_price=2.0, cached_price=0.5, completion_price=8.0))
    assert prices.of(Usage(100, 10, None)) == 200_000 + 80_000
    assert prices.of(Usage(100, 10, 60)) == 80_000 + 30_000 + 80_000
    assert prices.of(Usage(100, 0, 300)) == 50_000  # no more than there is can have been cached
    assert admission.FREE.of(Usage(10**9, 10**9, None)) == 0


def test_what_clients_are_told() -> None:
    stage = Stage(requests_per_min=5, tokens_per_min=100)
    assert dict(told(stage.accounts[0], stage.allowed, stage.now_s)) == {
        b"x-ratelimit-limit-requests": b"5",
        b"x-ratelimit-remaining-requests": b"5",
        b"x-ratelimit-reset-requests": b"0ms",
        b"x-ratelimit-limit-tokens": b"100",
        b"x-ratelimit-remaining-tokens": b"100",
        b"x-ratelimit-reset-tokens": b"0ms",
    }
    stage.end(stage.ask(30), 30)
    stage.wait(59.5)
    fields = dict(told(stage.accounts[0], stage.allowed, stage.now_s))
    assert fields[b"x-ratelimit-remaining-requests"] == b"4"
    assert fields[b"x-ratelimit-remaining-tokens"] == b"70"
    assert fields[b"x-ratelimit-reset-tokens"] == b"600ms"
    assert told(stage.accounts[0], Stage(max_concurrent=1).allowed, 0.0) == []


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0ms"), (0.0201, "21ms"), (0.9999, "1s"), (1.0, "1s"), (1.5, "1.5s"),
        (59.25, "59.25s"), (60.0, "1m0s"), (119.5, "2m0s"), (360.0, "6m0s"), (3725.0, "1h2m5s"),
    ],
)  # fmt: skip
def test_durations_are_written_as_openai_does(seconds: float, text: str) -> None:
    assert admission.duration(seconds) == text
