"""Load: counted at dispatch, in one line a replica, let go of once; and speeds, learned from it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.core import limits
from proxy.core.classes import OFFLINE, ONLINE
from proxy.core.lease import Lease
from proxy.core.loads import Loads

_RATE = limits.PREFILL_TOKENS_PER_S_DEFAULT


def _loads(slots: int = 1, *, group: str = "g", **bounds: int) -> Loads:
    loads = Loads()
    for slot in range(slots):
        loads.open(slot, group, capacity_tokens=100_000, **bounds)
    return loads


def _send(
    loads: Loads, tokens: int, now_s: float = 0.0, *, slot: int = 0, streamed: bool = True
) -> Lease:
    lease = Lease(slot, "r", prefill_tokens=tokens, prompt_tokens=tokens, streamed=streamed)
    loads.acquire(lease, now_s)
    return lease


def _seconds(tokens: float) -> float:
    return tokens / _RATE


def test_work_is_counted_when_it_goes_out_and_what_must_be_done_by_now_is_not() -> None:
    loads = _loads()
    first, second = _send(loads, 3000), _send(loads, 6000)
    assert loads.prefilling.queued_tokens(0) == 9000
    assert loads.wait_s(0, 0.0) == pytest.approx(_seconds(9000))
    assert loads.wait_s(0, _seconds(1000)) == pytest.approx(_seconds(8000))
    # The first should be over, but its first octet is out: the later it is, the longer it takes.
    assert loads.wait_s(0, _seconds(3000)) == pytest.approx(_seconds(6000))
    assert loads.wait_s(0, _seconds(4000)) == pytest.approx(_seconds(7000))
    loads.prefilling.ended(first, 10.0)
    assert loads.wait_s(0, 10.0) == pytest.approx(_seconds(6000))
    loads.prefilling.ended(second, 10.0 + _seconds(6000))
    assert loads.wait_s(0, 10.0 + _seconds(6000)) == 0.0
    assert loads.inflight[0] == 2
    loads.release(first, 11.0)
    loads.release(second, 11.0)
    assert (loads.inflight[0], loads.held_tokens[0], loads.decoding(0)) == (0, 0, 0.0)


def test_an_answer_that_is_not_streamed_leaves_the_line_when_it_should_be_computed() -> None:
    loads = _loads()
    _send(loads, 3000, streamed=False)
    _send(loads, 3000, streamed=False)
    later = _send(loads, 3000)
    half = _seconds(4500)
    assert loads.waits_s([0], half) == [pytest.approx(_seconds(4500))]
    assert loads.waits_s([0], _seconds(9000)) == [pytest.approx(0.0)]
    assert loads.decoding(0) == 2.0
    loads.prefilling.ended(later, 101.0)
    assert loads.prefilling.queued_tokens(0) == 0


def test_a_first_octet_ends_all_that_stood_before_it_unseen() -> None:
    loads = _loads()
    unseen = [_send(loads, 30_000, streamed=False) for _ in range(3)]
    seen = _send(loads, 100)
    loads.prefilling.ended(seen, 0.5)
    assert loads.prefilling.queued_tokens(0) == 0
    assert not any(lease.pending for lease in unseen)


def test_one_that_overtakes_leaves_the_rest_as_it_was() -> None:
    loads = _loads()
    first, second, third = (_send(loads, tokens) for tokens in (1000, 2000, 3000))
    loads.prefilling.ended(second, 0.0)
    assert loads.prefilling.queued_tokens(0) == 4000
    loads.release(first, 0.0)  # cancelled at the head
    assert loads.prefilling.queued_tokens(0) == 3000
    loads.release(third, 0.0)
    loads.release(second, 0.0)
    assert loads.prefilling.queued_tokens(0) == 0


_PLACES = st.lists(
    st.tuples(
        st.sampled_from(["send", "release", "limit", "reserve", "close"]),
        st.integers(0, 3),
        st.integers(0, 3),
    ),
    max_size=60,
)


@given(_PLACES)
def test_full_are_those_that_have_as_many_requests_as_they_may(
    steps: list[tuple[str, int, int]],
) -> None:
    loads = _loads()
    open_leases: list[Lease] = []
    for what, most, running_max in steps:
        if what == "send":
            open_leases.append(_send(loads, 100))
        elif what == "release" and open_leases:
            loads.release(open_leases.pop(), 0.0)
        elif what == "limit":
            loads.limit(0, 100_000, most, running_max)
        elif what == "reserve":
            loads.reserve_online(most / 4)
        elif what == "close":
            loads.close(0)
            for lease in open_leases:
                loads.release(lease, 0.0)
            open_leases.clear()
            loads.open(0, "g", capacity_tokens=100_000, inflight_max=most, running_max=running_max)
        for work_class, limit in ((ONLINE, loads.inflight_max[0]), (OFFLINE, loads.lower_max[0])):
            assert loads.is_full(0, work_class) == bool(limit and len(open_leases) >= limit)


_STEPS = st.lists(
    st.tuples(
        st.sampled_from(["send", "first", "release", "settle", "reconcile"]),
        st.integers(0, 2),
        st.integers(0, 5000),
        st.booleans(),
        st.floats(0, 0.2),
    ),
    max_size=80,
)


@given(_STEPS)
def test_whatever_happens_nothing_is_left_and_nothing_is_negative(
    steps: list[tuple[str, int, int, bool, float]],
) -> None:
    loads = _loads(3, running_max=2)
    open_leases: list[Lease] = []
    now_s = 0.0
    for what, slot, number, streamed, pause_s in steps:
        now_s += pause_s
        if what == "send":
            open_leases.append(_send(loads, number, now_s, slot=slot, streamed=streamed))
        elif what == "settle":
            loads.prefilling.settle(slot, now_s)
        elif what == "reconcile":
            loads.reconcile(
                slot, requests=number % 7, waiting_tokens=number, held_tokens=number, now_s=now_s
            )
        elif open_leases and what == "first":
            loads.prefilling.ended(open_leases[number % len(open_leases)], now_s)
        elif open_leases:
            loads.release(
                open_leases.pop(number % len(open_leases)), now_s, number, served=streamed
            )
        for each in range(3):
            line = loads.prefilling.line[each]
            behind = sum(lease.prefill_tokens for lease in list(line)[1:])
            assert loads.pending_tokens[each] == behind
            assert all(lease.pending and not lease.released for lease in line)
            assert loads.wait_s(each, now_s) >= 0.0
            assert loads.inflight[each] == sum(lease.slot == each for lease in open_leases)
            assert (each in loads.prefilling.unseen) == (bool(line) and not line[0].streamed)
    for lease in open_leases:
        loads.release(lease, now_s)
    for each in range(3):
        assert loads.inflight[each] == loads.pending_tokens[each] == 0
        assert not loads.prefilling.line[each]
        assert loads.decoding(each) == pytest.approx(0.0)
        assert loads.held_tokens[each] == 0


def _run(loads: Loads, slot: int, *, speed: float, count: int = 40, now_s: float = 0.0) -> None:
    """Serve prompts of 3,000 tokens one after the other at so many times the default speed."""
    for _ in range(count):
        lease = _send(loads, 3000, now_s, slot=slot)
        now_s += _seconds(3000) / speed
        loads.prefilling.ended(lease, now_s)
        loads.release(lease, now_s, 3000)


def test_a_slow_replica_is_priced_as_slow_and_noise_is_not() -> None:
    loads = _loads(4)
    for slot, speed in enumerate((0.4, 1.0, 1.1, 0.9)):
        _run(loads, slot, speed=speed)
    assert loads.s_per_token[0] == pytest.approx(_seconds(1) / 0.4, rel=0.2)
    assert loads.s_per_token[1] == loads.s_per_token[2] == loads.s_per_token[3]
    _run(loads, 0, speed=1.0, count=400)  # it has recovered
    assert loads.s_per_token[0] == loads.s_per_token[1]


def test_a_group_learns_its_speed_and_another_keeps_its_own() -> None:
    loads = _loads(2)
    loads.open(2, "other", capacity_tokens=1)
    for _ in range(10):
        for slot in (0, 1):
            _run(loads, slot, speed=3.0)
    assert loads.s_per_token[0] == pytest.approx(_seconds(1) / 3, rel=0.1)
    assert loads.s_per_token[2] == pytest.approx(_seconds(1))
    loads.open(3, "g", capacity_tokens=1)  # a newcomer is as fast as its group
    assert loads.s_per_token[3] == loads.s_per_token[0]


def test_speed_is_learned_from_what_was_computed_and_not_from_what_was_guessed() -> None:
    loads = _loads()
    now_s = 0.0
    for _ in range(50):  # guessed at 30,000 tokens, of which all but 3,000 were cached
        lease = _send(loads, 30_000, now_s)
        now_s += _seconds(3000)
        loads.prefilling.ended(lease, now_s)
        loads.release(lease, now_s, 3000)
    assert loads.s_per_token[0] == pytest.approx(_seconds(1), rel=0.05)


def test_what_a_first_token_takes_anyway_is_no_slowness() -> None:
    loads = _loads()
    now_s = 0.0
    for _ in range(200):
        for tokens in (100, 6000):
            lease = _send(loads, tokens, now_s)
            now_s += 0.02 + _seconds(tokens)
            loads.prefilling.ended(lease, now_s)
            loads.release(lease, now_s, tokens)
    assert loads.s_per_token[0] == pytest.approx(_seconds(1), rel=0.15)


def test_a_newcomer_does_not_get_everything_until_it_has_caught_up() -> None:
    loads = _loads(2)
    for slot in (0, 1):
        loads.release(_send(loads, 50_000, slot=slot), 0.0)
    loads.open(2, "g", capacity_tokens=1)
    assert loads.dispatched_tokens[2] == 50_000


def test_slots_and_kv_space_that_are_taken_are_waited_for() -> None:
    loads = _loads(running_max=2)
    for _ in range(20):
        loads.release(_send(loads, 1000, 0.0), 4.0, 1000)
    assert loads.request_s[0] == pytest.approx(4.0, rel=0.2)
    leases = [_send(loads, 1000) for _ in range(2)]
    one_more = loads.extra_s[0]
    assert one_more == pytest.approx(loads.request_s[0] / 2)
    leases.append(_send(loads, 1000))
    assert loads.extra_s[0] == pytest.approx(2 * one_more)
    for lease in leases:
        loads.release(lease, 1.0)
    assert loads.extra_s[0] == 0.0
    assert loads.shortage_s(0, 90_000) == 0.0
    loads.reconcile(0, requests=9, waiting_tokens=0, held_tokens=80_000, now_s=1.0)
    assert loads.shortage_s(0, 15_000) == 0.0
    assert loads.shortage_s(0, 55_000) == pytest.approx(0.4 * loads.request_s[0])
    loads.reconcile(0, requests=0, waiting_tokens=0, held_tokens=10_000, now_s=1.0)
    assert loads.shortage_s(0, 90_000) == 0.0


def test_what_an_engine_has_beyond_ours_is_work_of_others() -> None:
    loads = _loads()
    mine = _send(loads, 3000)
    loads.reconcile(0, requests=1, waiting_tokens=0, held_tokens=3000, now_s=0.0)
    assert loads.wait_s(0, 0.0) == pytest.approx(_seconds(3000))
    assert loads.foreign_share([0]) == 0.0
    loads.reconcile(0, requests=4, waiting_tokens=9000, held_tokens=3000, now_s=0.0)
    assert loads.wait_s(0, 0.0) == pytest.approx(_seconds(9000))
    assert loads.foreign_share([0]) == pytest.approx(0.75)
    loads.release(mine, 1.0)
    loads.reconcile(0, requests=0, waiting_tokens=0, held_tokens=0, now_s=1.0)
    assert loads.wait_s(0, 1.0) == 0.0


def test_decode_speed_is_the_time_between_tokens() -> None:
    loads = _loads()
    loads.decoded(0, 101, 2.0)
    assert loads.s_per_output_token[0] == pytest.approx(0.02)
    loads.decoded(0, 1, 2.0)  # one token has no time between tokens
    for _ in range(100):
        loads.decoded(0, 101, 4.0)
    assert loads.s_per_output_token[0] == pytest.approx(0.04, rel=0.01)


def test_a_slot_that_is_given_away_again_begins_anew() -> None:
    loads = _loads(2)
    _run(loads, 0, speed=0.3)
    _send(loads, 1000)
    loads.close(0)
    loads.open(0, "h", capacity_tokens=5, inflight_max=7)
    assert (loads.inflight[0], loads.inflight_max[0]) == (0, 7)
    assert loads.prefilling.queued_tokens(0) == 0
    assert loads.s_per_token[0] == _seconds(1)


def test_a_lease_is_released_once() -> None:
    loads = _loads()
    lease = _send(loads, 10)
    loads.release(lease, 0.0)
    loads.prefilling.ended(lease, 0.0)  # harmless: it is over
    with pytest.raises(AssertionError):
        loads.release(lease, 0.0)


def test_an_error_teaches_no_speed_and_who_refuses_is_left_alone_for_a_while() -> None:
    loads = _loads()
    for turn in range(100):  # answered in a millisecond: nothing was computed
        lease = _send(loads, 10_000, float(turn))
        loads.prefilling.ended(lease, turn + 0.001)
        loads.release(lease, turn + 0.001, served=False)
    assert loads.s_per_token[0] == _seconds(1)
    assert loads.request_s[0] == 0.0
    loads.refused(0, 200.0)
    first_s = loads.wait_s(0, 200.0)
    assert first_s == pytest.approx(limits.REFUSED_PAUSE_S)
    loads.refused(0, 200.0)
    assert loads.wait_s(0, 200.0) == pytest.approx(2 * first_s)
    loads.reconcile(0, requests=0, waiting_tokens=0, held_tokens=0, now_s=200.0)
    assert loads.wait_s(0, 200.0) == pytest.approx(2 * first_s), "its gauges do not excuse it"
    for _ in range(20):
        loads.refused(0, 300.0)
    assert loads.wait_s(0, 300.0) <= 64.0
    loads.release(_send(loads, 10, 400.0), 400.1)
    loads.refused(0, 500.0)
    assert loads.wait_s(0, 500.0) == pytest.approx(first_s), "a success begins the count anew"


def test_the_time_of_a_whole_answer_is_not_that_of_its_prefill() -> None:
    loads = _loads()
    for turn in range(10):  # nothing else happens meanwhile
        lease = _send(loads, 1000, 10.0 * turn, streamed=False)
        loads.prefilling.ended(lease, 10.0 * turn + 5.0)
        loads.release(lease, 10.0 * turn + 5.0, 1000)
    assert loads.s_per_token[0] == _seconds(1)


def test_a_reading_that_is_older_than_what_ended_since_shows_no_others() -> None:
    loads = _loads()
    leases = [_send(loads, 1000) for _ in range(20)]
    for lease in leases[:15]:
        loads.release(lease, 0.5)
    loads.reconcile(0, requests=20, waiting_tokens=9000, held_tokens=0, now_s=0.6)
    assert loads.foreign_share([0]) == 0.0
    loads.reconcile(0, requests=20, waiting_tokens=9000, held_tokens=0, now_s=1.6)
    assert loads.foreign_share([0]) == pytest.approx(0.75)
    loads.forget_gauges(0)
    assert loads.foreign_share([0]) == 0.0


def test_a_prompt_that_hardly_fits_waits_though_most_is_free() -> None:
    loads = _loads()
    loads.release(_send(loads, 10, 0.0), 4.0)
    _send(loads, 30_000, 5.0)
    loads.reconcile(0, requests=1, waiting_tokens=0, held_tokens=0, now_s=5.0)
    assert 0 not in loads.tight
    assert loads.shortage_s(0, 90_000) > 0.0


def test_a_part_of_each_replica_is_kept_for_online_work() -> None:
    loads = Loads()
    loads.reserve_online(0.25)
    loads.open(0, "group", capacity_tokens=1000, inflight_max=8)
    loads.open(1, "group", capacity_tokens=1000, running_max=8)
    loads.open(2, "group", capacity_tokens=1000, inflight_max=1)
    loads.open(3, "group", capacity_tokens=1000)
    assert loads.lower_max == [6, 6, 1, 0]
    for slot, requests in enumerate((6, 6, 0, 100)):
        for _ in range(requests):
            _send(loads, 1, slot=slot)
    full = [[loads.is_full(slot, work_class) for slot in range(4)] for work_class in range(3)]
    assert full == [[False] * 4, [True, True, False, False], [True, True, False, False]]
    loads.reserve_online(0.0)
    assert loads.lower_max == [8, 0, 1, 0]
    assert not any(loads.is_full(slot, 2) for slot in range(4))
