"""The control law: what each situation asks for, and what holds in all of them."""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Iterator

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backends.load_history import LoadHistory, Totals
from backends.load_trend import PARTS, line_through, rate_ahead, step_in
from backends.observation import Decision, Observation, ScalingPolicy
from backends.scaling import Scaler

POLICY = ScalingPolicy(min=0, max=40, target_inputs=8.0, max_inputs=12)
STAY_S = 4.0


def served(
    rate: float,
    first_s: int,
    last_s: int,
    *,
    ready: int = 1,
    before: int = 0,
    start_s: float = 15.0,
) -> Iterator[Observation]:
    """Yield a pool once a second that has `rate` requests a second, each for four seconds."""
    for second in range(first_s, last_s + 1):
        passed_s = second - first_s + 1
        yield Observation(
            at_s=float(second),
            in_flight=round(rate * min(STAY_S, passed_s)),
            arrivals_total=before + round(rate * passed_s),
            ready=ready,
            start_s=start_s,
        )


def last(scaler: Scaler, seen: Iterator[Observation]) -> Decision:
    decision = Decision(desired=-1)
    for observation in seen:
        decision = scaler.decide(observation)
    return decision


def known(policy: ScalingPolicy = POLICY, rate: float = 1.0) -> Scaler:
    """Return a law that has seen two minutes of this on one replica."""
    scaler = Scaler(policy)
    last(scaler, served(rate, 1, 120))
    return scaler


def flood(
    rate: float, seconds: int, *, ready: int = 1, coming_in_s: tuple[float, ...] = ()
) -> list[Observation]:
    """Return what comes after `known()` where nobody is added: the replica is full, others wait."""
    seen = []
    for second in range(1, seconds + 1):
        there = round(rate * second) - min(round(2.5 * ready * second), round(rate * second))
        in_flight = min(12 * ready, there)
        seen.append(
            Observation(
                at_s=120.0 + second,
                in_flight=in_flight,
                queued=there - in_flight,
                arrivals_total=120 + round(rate * second),
                ready=ready,
                coming_in_s=coming_in_s,
                start_s=60.0,
            )
        )
    return seen


# --- what is needed -------------------------------------------------------------------------------


@pytest.mark.parametrize(("rate", "replicas"), [(0.0, 0), (1.0, 1), (4.0, 2), (20.0, 10)])
def test_a_steady_load_has_what_it_needs(rate: float, replicas: int) -> None:
    decision = last(Scaler(POLICY), served(rate, 1, 120, ready=replicas))
    assert decision.desired == replicas
    assert not decision.panicking


def test_a_step_is_answered_within_two_seconds_and_not_beyond_its_need() -> None:
    scaler = known()
    asked = [scaler.decide(one).desired for one in served(10.0, 121, 180, before=120)]
    assert asked[1] >= 3
    assert asked[5] >= 4
    assert max(asked) <= 6


def test_what_piles_up_during_a_long_start_is_not_ordered_again() -> None:
    scaler = known()
    asked = [scaler.decide(one).desired for one in flood(10.0, 8)]
    ordered = max(asked)
    waiting = flood(10.0, 60, coming_in_s=(50.0,) * (ordered - 1))[8:]
    assert 4 <= ordered <= 7
    assert max(scaler.decide(one).desired for one in waiting) <= 8  # 450 wait: 57 times the target


def test_the_first_burst_from_nothing_is_taken_by_its_rate() -> None:
    scaler = Scaler(POLICY)
    for second in range(1, 31):
        scaler.decide(Observation(at_s=float(second), start_s=60.0))
    first = scaler.decide(Observation(at_s=30.2, queued=1, arrivals_total=1, start_s=60.0))
    assert (first.desired, first.reason) == (1, "a request is there, and no replica")
    many = [
        scaler.decide(
            Observation(
                at_s=30.0 + second, queued=10 * second, arrivals_total=10 * second, start_s=60.0
            )
        ).desired
        for second in range(1, 40)
    ]
    assert 6 <= max(many) <= 10  # ten a second, taken to stay a panic window of six


def test_a_load_between_target_and_maximum_does_not_panic() -> None:
    scaler = known(rate=2.0)
    seen = [scaler.decide(one) for one in served(2.7, 121, 130, before=240)]
    assert not any(decision.panicking for decision in seen)
    assert {decision.desired for decision in seen} == {1}


def test_a_steady_rise_is_ordered_before_it_is_there() -> None:
    scaler = Scaler(POLICY)
    total = 0.0
    asked = 0
    for second in range(1, 241):
        rate = 2.0 + second / 30
        total += rate
        decision = scaler.decide(
            Observation(
                at_s=float(second),
                in_flight=round(rate * STAY_S),
                arrivals_total=round(total),
                ready=5,
                start_s=60.0,
            )
        )
        asked = decision.desired
    assert "trend" in decision.reason
    assert asked >= 6  # five are needed now, six when a start that begins now serves


def test_a_queue_that_stands_asks_for_one_more() -> None:
    scaler = known(rate=2.0)
    seen = [msgspec.structs.replace(one, queued=2) for one in served(2.0, 121, 130, before=240)]
    asked = [scaler.decide(one) for one in seen]
    assert asked[0].desired == 1
    assert asked[-1].desired == 2
    assert "queue" in asked[-1].reason


def test_a_queue_that_is_worked_off_asks_for_nothing() -> None:
    scaler = known(rate=2.0)
    asked = [
        scaler.decide(
            Observation(
                at_s=120.0 + second,
                in_flight=8,
                queued=90 - 3 * second,  # five go in a second, two come
                arrivals_total=240 + 2 * second,
                ready=1,
                start_s=60.0,
            )
        )
        for second in range(1, 25)
    ]
    assert {decision.desired for decision in asked[14:]} == {1}
    assert not any("queue" in decision.terms for decision in asked[14:])


def test_full_caches_ask_for_more_long_before_the_request_count_does() -> None:
    def seen(kv_used_ratio: float, preemptions: int = 0) -> Iterator[Observation]:
        for one in served(1.0, 1, 120, ready=2):
            yield msgspec.structs.replace(
                one, kv_used_ratio=kv_used_ratio, preemptions_total=preemptions * int(one.at_s)
            )

    assert last(Scaler(POLICY), seen(0.25)).desired == 1
    assert last(Scaler(POLICY), seen(0.90)).desired == 3
    preempting = last(Scaler(POLICY), seen(0.25, preemptions=1))
    assert preempting.desired == 3
    assert "kv" in preempting.reason


def test_waiting_tokens_ask_for_more_and_old_ones_not_again() -> None:
    policy = msgspec.structs.replace(POLICY, target_tokens=10_000)

    def seen(arrivals_per_s: float) -> Iterator[Observation]:
        for second in range(1, 61):
            yield Observation(
                at_s=float(second), in_flight=4, in_flight_tokens=45_000, ready=5,
                arrivals_total=round(arrivals_per_s * second), start_s=30.0,
            )  # fmt: skip

    assert last(Scaler(policy), seen(1.0)).terms["tokens"] == pytest.approx(4.5)
    assert last(Scaler(policy), seen(1 / 12)).terms["tokens"] < 1.2


# --- down -----------------------------------------------------------------------------------------


def test_it_goes_down_one_at_a_time_when_the_rest_stay_under_their_share() -> None:
    assert last(Scaler(POLICY), served(4.0, 1, 120, ready=4)).desired == 3  # 2.0 of three
    assert last(Scaler(POLICY), served(4.0, 1, 120, ready=3)).desired == 3  # 2.0 of two


def test_what_has_not_been_seen_for_the_hold_takes_nothing_away() -> None:
    assert last(Scaler(POLICY), served(1.0, 1, 10, ready=4)).desired == 4
    assert last(Scaler(POLICY), served(1.0, 1, 40, ready=4, start_s=60.0)).desired == 4
    assert last(Scaler(POLICY), served(1.0, 1, 70, ready=4, start_s=60.0)).desired == 3


@pytest.mark.parametrize(("queued", "kept"), [(200, 6), (10, 5)])
def test_what_is_coming_is_kept_while_requests_would_still_wait_for_it(
    queued: int, kept: int
) -> None:
    scaler = known()
    decision = last(
        scaler,
        (
            Observation(
                at_s=120.0 + second,
                in_flight=8,
                queued=queued + 2 * (40 - second),  # two a second are done, none comes
                arrivals_total=120 + queued + 88,
                ready=1,
                coming_in_s=(30.0,) * 5,
                start_s=60.0,
            )
            for second in range(8, 41)
        ),
    )
    assert decision.desired == kept


def test_to_nothing_only_when_the_whole_window_saw_nothing() -> None:
    scaler = known()
    idle = [
        scaler.decide(Observation(at_s=120.0 + second, arrivals_total=120, ready=1, start_s=2.0))
        for second in range(1, 70)
    ]
    assert {decision.desired for decision in idle[:58]} == {1}
    assert idle[-1].desired == 0
    kept = msgspec.structs.replace(POLICY, min=1)
    assert last(Scaler(kept), served(0.0, 1, 120)).desired == 1


def test_the_buffer_is_there_while_there_is_work_and_no_longer() -> None:
    policy = msgspec.structs.replace(POLICY, buffer=2)
    assert last(Scaler(policy), served(4.0, 1, 120, ready=4)).desired == 4
    assert last(Scaler(policy), served(0.0, 1, 120, ready=1)).desired == 0


def test_gpus_and_the_configured_bounds_come_last() -> None:
    scaler = known()
    few = [msgspec.structs.replace(one, gpu_limit=3) for one in flood(10.0, 8)]
    decision = last(scaler, iter(few))
    assert decision.desired == 3
    assert "limited to 3 by the GPUs" in decision.reason


# --- what holds always ----------------------------------------------------------------------------

SECOND = st.tuples(st.integers(0, 40), st.integers(0, 60), st.floats(0, 1), st.integers(0, 6))


def observed(rows: list[tuple[int, int, float, int]]) -> Iterator[Observation]:
    """Yield any pool: arrivals come, some end, replicas are there or not."""
    arrivals = stock = 0
    for second, (came, ended, kv_used_ratio, ready) in enumerate(rows):
        arrivals += came
        stock = max(0, stock + came - ended)
        in_flight = min(stock, 12 * ready)
        yield Observation(
            at_s=second * 1.0,
            in_flight=in_flight,
            queued=stock - in_flight,
            arrivals_total=arrivals,
            kv_used_ratio=kv_used_ratio,
            ready=ready,
            start_s=15.0,
        )


@settings(max_examples=60, deadline=None)
@given(st.lists(SECOND, max_size=120), st.integers(0, 3), st.integers(3, 9), st.integers(0, 2))
def test_bounds_hold_and_panic_takes_nothing_and_down_is_by_one(
    rows: list[tuple[int, int, float, int]], least: int, most: int, buffer: int
) -> None:
    policy = msgspec.structs.replace(POLICY, min=least, max=most, buffer=buffer)
    scaler, again = Scaler(policy), Scaler(policy)
    for seen in observed(rows):
        decision = scaler.decide(seen)
        assert decision == again.decide(seen)
        assert least <= decision.desired <= most
        assert decision.reason
        if decision.panicking:
            assert decision.desired >= min(seen.ready, most)
        assert decision.desired >= min(seen.ready - 1, most)
        if seen.in_flight + seen.queued:
            assert decision.desired >= 1


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 60), st.integers(0, 60), st.integers(1, 12), st.floats(1, 120))
def test_more_demand_never_asks_for_fewer(came: int, more: int, ready: int, start_s: float) -> None:
    def asked(arrivals: int) -> int:
        one = Observation(
            at_s=121.0, in_flight=4, queued=arrivals, arrivals_total=120 + arrivals,
            ready=ready, start_s=start_s,
        )  # fmt: skip
        return copy.deepcopy(_KNOWN).decide(one).desired

    assert asked(came + more) >= asked(came)


_KNOWN = known()


@pytest.mark.parametrize("seed", range(3))
def test_half_an_hour_of_noise_changes_the_size_now_and_then_at_most(seed: int) -> None:
    chance = random.Random(seed)
    scaler = Scaler(POLICY)
    ready, arrivals, sizes = 5, 0, []
    leaving: list[float] = []
    for second in range(1800):
        rate = 9.0 * (chance.uniform(0.8, 1.2) if second % 10 == 0 else 1.0)
        came = sum(chance.random() < rate / 40 for _ in range(40))
        arrivals += came
        leaving = [at for at in leaving if at > second]
        leaving += [second + chance.gammavariate(4, 1) for _ in range(came)]
        decision = scaler.decide(
            Observation(
                at_s=float(second),
                in_flight=len(leaving),
                arrivals_total=arrivals,
                ready=ready,
                start_s=15.0,
            )
        )
        ready = decision.desired
        sizes.append(ready)
    changes = sum(a != b for a, b in itertools.pairwise(sizes))
    assert changes <= 10
    assert max(sizes[60:]) - min(sizes[60:]) <= 2


def test_a_new_policy_holds_from_the_next_decision_on() -> None:
    scaler = known(rate=4.0)
    scaler.policy = msgspec.structs.replace(POLICY, target_inputs=2.0, stable_window_s=90.0)
    assert last(scaler, served(4.0, 121, 125, ready=2, before=480)).desired >= 6


# --- the history and the line ---------------------------------------------------------------------


def test_the_history_is_bounded_and_windows_are_differences() -> None:
    history = LoadHistory(1.0, 60.0)
    for half in range(1, 2001):
        history.add(Totals(at_s=half / 2, span_s=0.5, flight_s=1.0, arrivals=3))
    window = history.window(990.0)
    assert window.span_s == pytest.approx(10.0, abs=1.0)
    assert window.rate == pytest.approx(6.0)
    assert history.window(0.0).span_s < 64
    assert history.window(985.0, 990.0).arrivals == pytest.approx(30, abs=6)
    history.keep(10.0)
    assert history.window(0.0).span_s < 14


def test_observations_within_one_row_are_one_row() -> None:
    history = LoadHistory(1.0, 60.0)
    for tenth in range(1, 10):
        history.add(Totals(at_s=tenth / 10, span_s=0.1, arrivals=1))
    window = history.window(-1.0)
    assert window.arrivals == 8  # the first says when the history begins
    assert window.span_s == pytest.approx(0.8)


def test_a_line_is_found_and_a_step_is_none() -> None:
    slope, chance, mean = line_through([1.0, 2.1, 2.9, 4.0, 5.1, 5.9])
    assert slope == pytest.approx(1.0, abs=0.05)
    assert chance < 0.1
    assert mean == pytest.approx(3.5)
    assert step_in([1.0, 1.1, 0.9, 5.0, 5.1, 4.9]) == 3
    assert step_in([1.0, 2.1, 2.9, 4.0, 5.1, 5.9]) == 0


def test_what_rises_again_after_a_fall_is_followed_from_there() -> None:
    teeth = [float(k) for k in range(6, 12)] + [float(k) for k in range(6)]
    assert len(teeth) == PARTS
    assert rate_ahead(teeth, 4.0) == pytest.approx(9.5)  # 5.0 in the middle of the last part
    assert rate_ahead(teeth[6:], 4.0) == pytest.approx(9.5)  # nothing else is known
    assert rate_ahead(teeth[8:], 4.0) == 0.0  # too little to tell
    assert rate_ahead([1.0, 1.1, 0.9, 1.0, 1.1, 0.9, 5.0, 5.1, 4.9, 5.0, 5.1, 4.9], 4.0) == 0.0
