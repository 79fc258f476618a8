"""What was sent to other regions is counted as long as no summary can have it, and not longer."""

from __future__ import annotations

import random

from proxy.contract.regions import SUMMARY_INTERVAL_S, ModelSummary
from proxy.core.lease import Lease
from proxy.core.outlook import Outlook, Outlooks, Sent
from tests.core.regions_bench import NOW_S, state


def _lease(slot: int, now_s: float, tokens: int) -> Lease:
    lease = Lease(slot, "us#0/m", prefill_tokens=tokens, prompt_tokens=tokens)
    lease.started_s = now_s
    return lease


def test_the_count_is_that_of_a_slow_reader_whatever_comes_in_which_order() -> None:
    chance = random.Random(5)
    for _ in range(60):
        outlooks = Outlooks()
        for slot in (0, 1):
            outlooks.open(slot, "us", "m")
        under_way: list[Lease] = []
        seen_s = [0.0, 0.0]
        now_s = NOW_S
        for _ in range(120):
            now_s += chance.random() * 0.1
            slot = chance.randrange(2)
            what = chance.random()
            if what < 0.5:
                under_way.append(_lease(slot, now_s, chance.randrange(1, 999)))
                outlooks.dispatched(under_way[-1])
            elif what < 0.75 and under_way:
                one = under_way.pop(chance.randrange(len(under_way)))
                outlooks.released(one, now_s, refused=False)
            else:
                seen_s[slot] = now_s
                said = ModelSummary(awake=1, free=9)
                outlooks.of[slot].know(
                    state(f"us#{slot}", at_s=now_s, linked=chance.random() < 0.9), said
                )
            for each in [each for each in (0, 1) if outlooks.of[each].linked]:
                shown_s = seen_s[each] - 2 * outlooks.of[each].round_trip_s - SUMMARY_INTERVAL_S
                unseen = [one for one in under_way if one.started_s >= shown_s]
                assert outlooks.of[each].unseen == len(unseen)
                assert outlooks.of[each].unseen_tokens == sum(u.prefill_tokens for u in unseen)
        for lease in under_way:
            assert outlooks.released(lease, now_s, refused=False)
        assert not outlooks.of[0].sent.leases


def test_waiting_passes_with_the_age_of_the_summary_and_grows_with_what_was_sent() -> None:
    outlook = Outlook(Sent())
    said = ModelSummary(awake=2, free=9, wait_s=0.5, s_per_token=0.001)
    outlook.know(state("us#0", at_s=NOW_S), said)
    assert outlook.wait_s(NOW_S + 0.25) == 0.25
    assert outlook.wait_s(NOW_S + 9.0) == 0.0
    outlook.sent.add(_lease(0, NOW_S, 1000))
    assert outlook.wait_s(NOW_S + 9.0) == 0.5  # two replicas share a second of work


def test_when_something_serves_that_is_on_its_way() -> None:
    outlook = Outlook(Sent())
    outlook.know(state("us#0"), ModelSummary(coming=1, ready_in_s=4.0, start_s=30.0))
    assert outlook.start_s(NOW_S + 1.0) == 3.0
    assert outlook.start_s(NOW_S + 9.0) == 0.0
    outlook.know(state("us#0"), ModelSummary(wakes=True, start_s=30.0))
    assert outlook.start_s(NOW_S) == 30.0
    outlook.know(state("us#0"), ModelSummary(awake=1, wakes=True, start_s=30.0))
    assert outlook.start_s(NOW_S) == 0.0
