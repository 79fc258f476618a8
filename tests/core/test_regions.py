"""Here or in another region: never for nothing, never where it may not, never without room."""

from __future__ import annotations

import random
from itertools import combinations

import pytest

from proxy.contract import PoolRecord
from proxy.contract.regions import SUMMARY_AGE_S_MAX, ModelSummary, RegionSummary
from proxy.core import claim_limits
from proxy.core.opening import Opening, is_open
from proxy.core.outlook import Outlook, returning_max
from proxy.core.policy import POLICIES, Request, terms
from proxy.core.regions import REASON, permits
from tests.core.builders import chain, record
from tests.core.regions_bench import FREE, NOW_S, Bench, asked, state

HOME = [record("a", "m"), record("b", "m")]
BUSY_TOKENS = 30_000 * 3  # three seconds of prefill


def test_what_is_idle_here_stays_here_whatever_is_idle_elsewhere() -> None:
    bench = Bench(HOME, [state("us#0", round_trip_s=0.0)])
    for key in range(50):  # ties go to the least used: never to one abroad, which has had nothing
        decision = bench.choose(asked(key))
        assert decision is not None
        assert not decision.replica.remote
        bench.picture.release(bench.send(asked(key), decision), NOW_S)


def test_slow_streams_here_send_nobody_where_nothing_is_known_of_them() -> None:
    bench = Bench(HOME, [state("us#0", round_trip_s=0.0)])
    for name in ("a", "b"):
        bench.picture.loads.s_per_output_token[bench.picture.slots[name]] = 9.0
    quick = asked()
    quick.tpot_s = 0.001
    at_home = bench.choose(quick)
    assert at_home is not None
    assert terms(at_home, quick, bench.picture, NOW_S).pace_s > claim_limits.REGION_SLACK_S
    assert not at_home.replica.remote


def test_it_leaves_when_waiting_here_costs_more_than_the_way() -> None:
    bench = Bench(HOME, [state("us#0"), state("ap#0", round_trip_s=0.16)])
    bench.load(int(30_000 * 0.8 * (0.08 + claim_limits.REGION_SLACK_S)))
    decision = bench.choose(asked())
    assert decision is not None
    assert not decision.replica.remote
    bench.load(BUSY_TOKENS)
    decision = bench.choose(asked())
    assert decision is not None
    assert (decision.replica.name, decision.reason) == ("us#0/m", REASON)
    assert is_open(decision, asked(), bench.picture, NOW_S)


def test_where_nothing_runs_that_could_end_nobody_waits_for_a_place_here() -> None:
    bench = Bench([record("a", "m")], [state("us#0", round_trip_s=0.5)])
    again = asked()
    again.tried.add("a")
    decision = bench.choose(again)
    assert decision is not None
    assert decision.replica.name == "us#0/m"


def test_no_more_go_than_the_other_region_said_it_would_begin() -> None:
    bench = Bench(HOME, [state("us#0"), state("ap#0", round_trip_s=0.16)])
    bench.load(BUSY_TOKENS * 10)
    went = [bench.choose(asked(key)) for key in range(1)]
    for key in range(20):
        decision = bench.choose(asked(key, octets=40))
        assert decision is not None
        bench.send(asked(key, octets=40), decision)
        went.append(decision)
    names = [d.replica.name for d in went[1:] if d is not None]
    assert names.count("us#0/m") == names.count("ap#0/m") == FREE.free
    # The next summary may be older than the last of these: they count until it cannot be.
    bench.hear(state("us#0", at_s=NOW_S + 0.3), now_s=NOW_S + 0.3)
    later = bench.choose(asked(99), NOW_S + 0.3)
    assert later is not None
    assert not later.replica.remote
    bench.hear(state("us#0", at_s=NOW_S + 0.5), now_s=NOW_S + 0.5)
    later = bench.choose(asked(99), NOW_S + 0.5)
    assert later is not None
    assert later.replica.remote


def test_two_proxies_of_a_region_have_its_room_but_once() -> None:
    bench = Bench(HOME, [state("us#0"), state("us#1", round_trip_s=0.09)])
    bench.load(BUSY_TOKENS * 10)
    went = 0
    for key in range(20):
        decision = bench.choose(asked(key, octets=40))
        assert decision is not None
        went += decision.replica.remote
        bench.send(asked(key, octets=40), decision)
    assert went == FREE.free
    bench.hear(state("us#0"), state("us#1", at_s=NOW_S + 1.0), now_s=NOW_S + 1.0)
    later = bench.choose(asked(99), NOW_S + 1.0)
    assert later is not None
    assert later.replica.name == "us#1/m"  # the other one's summary may not have what was sent
    bench.hear(state("us#0"))
    assert list(bench.picture.outlooks._sent) == [("us", "m")]
    bench.hear()
    assert not bench.picture.outlooks._sent


def test_what_is_over_takes_no_room_any_more() -> None:
    bench = Bench(HOME, [state("us#0"), state("us#1", at_s=NOW_S - 0.1)])
    bench.load(BUSY_TOKENS * 10)
    outlooks = [bench.picture.outlooks.of[bench.picture.slots[f"us#{n}/m"]] for n in (0, 1)]
    leases = []
    for key in range(FREE.free):
        decision = bench.choose(asked(key, octets=40))
        assert decision is not None
        leases.append(bench.send(asked(key, octets=40), decision))
    assert [each.room(0, NOW_S) for each in outlooks] == [0, 0]
    bench.picture.release(leases.pop(), NOW_S + 0.1)
    assert [each.room(0, NOW_S) for each in outlooks] == [1, 1]
    bench.hear(state("us#0", at_s=NOW_S + 2), state("us#1"), now_s=NOW_S + 2)
    assert [each.room(0, NOW_S) for each in outlooks] == [FREE.free, 1]
    for lease in leases:
        bench.picture.release(lease, NOW_S + 2)
    assert [each.unseen_tokens for each in outlooks] == [0, 0]
    assert [each.room(0, NOW_S) for each in outlooks] == [FREE.free, FREE.free]


@pytest.mark.parametrize(
    "changed",
    [
        state("us#0", linked=False),
        state("us#0", FREE, at_s=NOW_S - SUMMARY_AGE_S_MAX - 0.1),
        state("us#0", ModelSummary(awake=2, free=4, queued=1)),
        state("us#0", ModelSummary(awake=2, free=0)),
        state("us#0", ModelSummary(awake=0, free=3, wakes=True)),
        state("us#0", summary=None),
    ],
)
def test_a_region_that_is_gone_or_full_or_has_others_waiting_is_left_at_once(changed) -> None:
    bench = Bench(HOME, [state("us#0")])
    bench.load(BUSY_TOKENS)
    first = bench.choose(asked())
    assert first is not None
    assert first.replica.remote
    bench.hear(changed)
    decision = bench.choose(asked())
    assert decision is not None
    assert not decision.replica.remote
    pool = bench.fleet.pools["m"]
    assert not bench.picture.may_leave(bench.picture.seats(pool), NOW_S)


def test_one_that_cannot_be_reached_is_left_for_longer_each_time() -> None:
    outlook, now_s = Outlook(), NOW_S
    outlook.know(state("us#0"), FREE)
    pauses_s = []
    for _ in range(6):
        begin_s = now_s
        outlook.suspect(now_s)
        while outlook.why_not(now_s):
            now_s += 0.125
            outlook.know(state("us#0", at_s=now_s), FREE)
        pauses_s.append(now_s - begin_s)
    assert pauses_s == [0.5, 1.0, 2.0, 4.0, 8.0, 8.0]
    outlook.answered()
    outlook.suspect(now_s)
    assert not outlook.why_not(now_s + claim_limits.REGION_PAUSE_S)
    outlook.suspect(now_s + 1.0)
    outlook.know(state("us#0", linked=False), FREE)
    outlook.know(state("us#0", at_s=now_s + 1.0), FREE)
    assert not outlook.why_not(now_s + 1.0)  # it has come back, and all is forgiven


def test_many_that_are_lost_at_once_are_one_reason_to_pause() -> None:
    bench = Bench(HOME, [state("us#0", ModelSummary(awake=8, free=99))])
    bench.load(BUSY_TOKENS)
    leases = []
    for key in range(30):
        decision = bench.choose(asked(key, octets=4))
        assert decision is not None
        leases.append(bench.send(asked(key, octets=4), decision))
    for lease in leases:
        bench.picture.suspect_remote("us#0", NOW_S)
        bench.picture.release(lease, NOW_S, served=False, refused=True)
    outlook = bench.picture.outlooks.of[bench.picture.slots["us#0/m"]]
    assert outlook.why_not(NOW_S)
    later_s = NOW_S + claim_limits.REGION_PAUSE_S + 0.1
    bench.hear(state("us#0", at_s=later_s))
    assert not outlook.why_not(later_s)
    decision = bench.choose(asked(), later_s)
    assert decision is not None
    assert decision.replica.remote


def test_a_conversation_that_went_stays_there_while_that_is_cheaper() -> None:
    bench = Bench(HOME, [state("us#0")])
    turn = asked(5, octets=30_000 * 4)
    bench.load(BUSY_TOKENS)
    decision = bench.choose(turn)
    assert decision is not None
    assert decision.replica.remote
    bench.picture.release(bench.send(turn, decision), NOW_S)
    later_s = NOW_S + 60.0
    bench.hear(state("us#0", at_s=later_s), now_s=later_s)
    for replica in HOME:  # idle again
        slot = bench.picture.slots[replica.replica_id]
        bench.picture.loads.open(slot, "", capacity_tokens=1_000_000)
    again = bench.choose(turn, later_s)
    assert again is not None
    assert again.replica.remote  # a second of prefill is saved
    assert again.cached_octets == 30_000 * 4
    stranger = bench.choose(asked(6, octets=30_000 * 4), later_s)
    assert stranger is not None
    assert not stranger.replica.remote
    bench.hear(state("us#0", ModelSummary(awake=1, free=1, wait_s=9.0), at_s=later_s))
    home = bench.choose(turn, later_s)
    assert home is not None
    assert not home.replica.remote


def test_a_region_that_was_lost_is_taken_back_by_degrees() -> None:
    wide = ModelSummary(awake=8, free=100, s_per_token=1 / 30_000)
    bench = Bench(HOME, [state("us#0", wide)])
    bench.load(BUSY_TOKENS * 100)
    bench.hear(state("us#0", wide, linked=False))

    def sent_at(now_s: float) -> int:
        bench.hear(state("us#0", wide, since_s=NOW_S, at_s=now_s + 9), now_s=now_s)
        leases = []
        for key in range(200):
            decision = bench.choose(asked(key, octets=4), now_s)
            assert decision is not None
            if not decision.replica.remote:
                break
            leases.append(bench.send(asked(key, octets=4), decision, now_s))
        for lease in leases:
            bench.picture.release(lease, now_s)
        return len(leases)

    counts = [sent_at(NOW_S + back_s) for back_s in (0.0, 2.0, 5.0, 9.9, 10.1)]
    assert counts[0] == 1
    assert counts == sorted(counts)
    assert counts[2] < 75
    assert counts[-1] == 100


def test_how_many_come_back_grows_from_one_to_all() -> None:
    counts = [returning_max(50, back_s / 10) for back_s in range(120)]
    assert counts[0] == 1
    assert counts == sorted(counts)
    assert counts[-1] == 50
    assert returning_max(50, -3.0) == 1


def test_where_nothing_is_awake_it_goes_where_it_is_served_soonest() -> None:
    scaled = PoolRecord(model="m", pool="p", wakes=True, start_s=15.0)
    bench = Bench([], [state("us#0")], pools=[scaled])
    decision = bench.choose(asked())
    assert decision is not None
    assert decision.replica.name == "us#0/m"
    cold = ModelSummary(wakes=True, start_s=60.0)
    bench.hear(state("us#0", cold))
    assert bench.choose(asked()) is None  # our own start is sooner
    bench.hear(state("us#0", ModelSummary(wakes=True, coming=1, ready_in_s=3.0, start_s=60.0)))
    assert bench.choose(asked()) is not None
    bench.hear(state("us#0", ModelSummary(awake=1, queued=7, wakes=True, wait_s=90.0)))
    assert bench.choose(asked()) is None


def test_a_model_that_only_another_region_has_is_served_though_it_waits_there() -> None:
    bench = Bench([record("a", "other")], [state("us#0", ModelSummary(awake=1, queued=3))])
    decision = bench.choose(asked())
    assert decision is not None
    assert decision.replica.region == "us"
    opening = Opening(bench.fleet.pools["m"], bench.picture, NOW_S)
    assert opening.now
    assert bench.fleet.only_pool() is bench.fleet.pools["other"]
    bench.hear(state("us#0", ModelSummary()))
    assert bench.choose(asked()) is None


@pytest.mark.parametrize("name", [name for name in POLICIES if name != "prefix"])
def test_rules_without_prices_leave_only_when_nobody_here_may_take_it(name: str) -> None:
    records = [record("a", "m", max_inputs=1), record("b", "m", max_inputs=1)]
    bench = Bench(records, [state("us#0", round_trip_s=0.0)], POLICIES[name])
    for _ in records:
        decision = bench.choose(asked())
        assert decision is not None
        assert not decision.replica.remote
        bench.send(asked(), decision)
    decision = bench.choose(asked())
    assert decision is not None
    assert decision.replica.remote


def test_where_all_are_full_it_leaves_when_the_first_place_would_come_too_late() -> None:
    records = [record("a", "m", max_inputs=2), record("b", "m", max_inputs=2)]
    bench = Bench(records, [state("us#0")])
    for key in range(4):
        decision = bench.choose(asked(key))
        assert decision is not None
        bench.send(asked(key), decision)
    for slot in bench.picture.slots.values():
        bench.picture.loads.request_s[slot] = 0.4  # ten end in a second
    assert bench.choose(asked()) is None
    decision = bench.choose(asked(), held=9)
    assert decision is not None
    assert decision.replica.remote


def test_what_was_tried_may_not_leave_or_was_sent_away_stays() -> None:
    bench = Bench(HOME, [state("us#0")])
    bench.load(BUSY_TOKENS)
    tried, bound, spare = asked(), asked(), asked()
    tried.tried.add("us#0/m")
    bound.abroad = False
    for request in (tried, bound):
        decision = bench.choose(request)
        assert decision is not None
        assert not decision.replica.remote
    assert spare.abroad
    refused = bench.choose(spare)
    assert refused is not None
    lease = bench.send(spare, refused)
    bench.picture.release(lease, NOW_S, served=False, refused=True)
    decision = bench.choose(asked(3))
    assert decision is not None
    assert not decision.replica.remote


def test_news_make_no_other_fleet_and_leave_what_is_known_of_caches() -> None:
    bench = Bench(HOME, [state("us#0"), state("ap#0")])
    before = bench.fleet
    turn = asked(5, octets=4000)
    slot = bench.picture.slots["us#0/m"]
    bench.picture.index.note(slot, turn.chain)
    for step in range(20):
        bench.hear(
            state("us#0", ModelSummary(awake=step % 3, free=step), linked=step % 5 > 0, at_s=NOW_S),
            state("ap#0", at_s=NOW_S + step),
        )
        assert bench.fleet is before
    assert bench.picture.index.held_of(slot, turn.chain) == 4000
    assert list(before.pools["m"].ring.names) == ["a", "b"]
    bench.hear(state("ap#0"))
    assert set(bench.fleet.remotes) == {"ap#0/m"}
    assert "us#0/m" not in bench.picture.slots


def test_what_a_region_served_is_not_forgotten_when_it_ends() -> None:
    bench = Bench([], [state("us#0")])
    last = RegionSummary(region="us", sequence=2, draining=True)  # its workers have ended already
    bench.hear(state("us#0", summary=last))
    bench.hear(state("us#0", linked=False))
    assert [remote.name for remote in bench.fleet.pools["m"].remotes] == ["us#0/m"]
    assert bench.choose(asked()) is None
    bench.hear(state("us#0", None))  # it is back, without the model
    assert "m" not in bench.fleet.pools


def test_our_own_region_and_what_has_no_usable_url_are_no_remotes() -> None:
    bench = Bench(HOME, [state("eu#1"), state("us#0", url="ftp://x"), state("ap#0")])
    assert set(bench.fleet.remotes) == {"ap#0/m"}


# --- residency ----------------------------------------------------------------------------------


@pytest.mark.sweep
def test_what_is_bound_to_regions_is_never_sent_elsewhere() -> None:
    """A hundred thousand requests over fleets, loads and rules as chance has them."""
    chance = random.Random(8)
    names = ("eu", "us", "ap", "sa")
    bounds = [frozenset(some) for n in (1, 2, 3) for some in combinations(names, n)]
    chains = [chain(key, 400) for key in range(30)]
    sent = {True: 0, False: 0}
    served = 0
    for _ in range(400):
        records = [
            record(
                f"r{n}",
                "m",
                max_inputs=chance.choice((0, 1, 3)),
                region=chance.choice(("local", "eu", "us")),
            )
            for n in range(chance.randrange(4))
        ]
        states = [
            state(
                f"{region}#0",
                ModelSummary(awake=chance.randrange(3), free=chance.randrange(30), wakes=True),
                round_trip_s=chance.random() * 0.2,
                linked=chance.random() < 0.9,
            )
            for region in names[1:]
        ]
        bench = Bench(records, states, chance.choice(list(POLICIES.values())))
        if "m" not in bench.fleet.pools:
            continue
        if chance.random() < 0.5:
            bench.load(BUSY_TOKENS)
        for number in range(270):
            regions = chance.choice(bounds)
            request = Request(chance.choice(chains), has_session=number % 7 == 0)
            request.regions = regions
            if number % 10 == 0:
                request.tried.update(chance.sample(list(bench.picture.slots), 1))
            decision = bench.choose(request)
            served += 1
            if decision is not None:
                assert decision.replica.region in regions
                assert permits(regions, decision.replica)
                sent[decision.replica.remote] += 1
                if number < 20:
                    bench.send(request, decision)
    assert served >= 100_000
    assert sent[True] > 10_000
    assert sent[False] > 10_000


def test_a_bound_request_sees_a_pool_without_the_rest_and_always_the_same() -> None:
    bench = Bench(HOME, [state("us#0"), state("ap#0")])
    pool = bench.fleet.pools["m"]
    seen = bench.residency.within(pool, frozenset({"ap"}))
    assert not seen.replicas
    assert [r.region for r in seen.remotes] == ["ap"]
    assert bench.residency.within(pool, frozenset({"ap"})) is seen
    assert bench.residency.within(pool, None) is pool


def test_what_may_not_be_computed_here_waits_for_no_start_here() -> None:
    scaled = PoolRecord(model="m", pool="p", wakes=True, start_s=15.0)
    cold = ModelSummary(wakes=True, start_s=60.0)
    bench = Bench([], [state("us#0", cold)], pools=[scaled])
    assert bench.choose(asked()) is None
    decision = bench.choose(asked(regions=frozenset({"us"})))
    assert decision is not None
    assert decision.replica.region == "us"
