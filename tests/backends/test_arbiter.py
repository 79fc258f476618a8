"""Who gets cards, who gives them up, and who waits."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from backends.arbiter import Unserved, arbitrate, replicas_possible
from backends.claims import Claim, Holder, Lower, Raise, Refusal, Room, Transit, Wait
from backends.gpus import Gpu
from backends.ladder import Rest, Rung, WayUp
from backends.shares import turn_s

RESTS = (
    Rest(Rung.ASLEEP, 0.5, host_bytes=16),
    Rest(Rung.SUSPENDED, 2.0, host_bytes=18),
    Rest(Rung.COLD, 46.0),
)
NEW = WayUp(Rung.COLD, 46.0)


def room(cards: int, free: str = "", **values: Any) -> Room:
    gpus = tuple(Gpu(device=str(n), name="h200") for n in range(cards))
    return Room(gpus=gpus, free=frozenset(free), **values)


def holder(replica_id: str, devices: str, rung: Rung = Rung.AWAKE, **values: Any) -> Holder:
    values = {"up_for_s": 1000.0, "start_s": 46.0, "rests": RESTS, **values}
    return Holder(replica_id=replica_id, rung=rung, devices=tuple(devices), **values)


def claim(pool: str, desired: int, *holders: Holder, **values: Any) -> Claim:
    resting = tuple(WayUp(h.rung, 0.5, h.replica_id) for h in holders if h.rung is not Rung.AWAKE)
    values = {"ways_up": (*resting, NEW), **values}
    return Claim(pool=pool, desired=desired, holders=holders, **values)


def test_a_free_card_goes_to_who_wants_one() -> None:
    verdict = arbitrate([claim("a", 1)], room(2, "01"))
    assert verdict.moves == (Raise("a", None, Rung.COLD, ("0",)),)


def test_who_is_asleep_wakes_on_its_own_card() -> None:
    asleep = holder("a-0", "0", Rung.ASLEEP)
    verdict = arbitrate([claim("a", 1, asleep)], room(1))
    assert verdict.moves == (Raise("a", "a-0", Rung.ASLEEP),)


def test_online_takes_from_offline_and_cuts_its_requests() -> None:
    busy = holder("off-0", "0", in_flight=9)
    offline = claim("off", 1, busy, work_class="offline")
    verdict = arbitrate([offline, claim("on", 1)], room(1))
    assert verdict.moves == (
        Lower("off", "off-0", Rung.SUSPENDED, "on (online) needs its GPU", cut=True),
        Wait("on", "off-0 makes room for it"),
    )


def test_cards_on_their_way_are_waited_for() -> None:
    going = holder("off-0", "0", Rung.SUSPENDED, transit=Transit.GOING)
    offline = claim("off", 1, going, work_class="offline")
    verdict = arbitrate([offline, claim("on", 1)], room(1))
    assert verdict.moves == (Wait("on", "cards are being given up for it"),)


def test_who_is_not_needed_rests_no_deeper_than_it_must() -> None:
    verdict = arbitrate([claim("a", 0, holder("a-0", "0"))], room(1))
    assert verdict.moves == (Lower("a", "a-0", Rung.ASLEEP, "it is not needed"),)


def test_who_waits_for_an_answer_is_not_put_where_coming_back_takes_too_long() -> None:
    rests = (Rest(Rung.ASLEEP, 30.0), Rest(Rung.SUSPENDED, 2.0), Rest(Rung.COLD, 46.0))
    idle = claim("a", 0, holder("a-0", "0", rests=rests))
    for work_class, rung in (("online", Rung.SUSPENDED), ("semi-online", Rung.ASLEEP)):
        (move,) = arbitrate([msgspec.structs.replace(idle, work_class=work_class)], room(1)).moves
        assert isinstance(move, Lower)
        assert move.rung is rung


def test_a_light_pool_has_no_shorter_turn_and_a_heavy_one_a_longer() -> None:
    turns = [turn_s(claim("a", 1, holder("a-0", "0"), weight=w)) for w in (0.1, 1.0, 2.0)]
    assert turns == [184.0, 184.0, 368.0]


def test_one_that_has_just_come_up_is_not_taken() -> None:
    young = claim("semi", 2, *(holder(f"s-{n}", str(n), up_for_s=45.0) for n in (0, 1)))
    semi = msgspec.structs.replace(young, work_class="semi-online")
    verdict = arbitrate([semi, claim("on", 1)], room(2))
    assert verdict.moves == ()
    assert verdict.refused == (Refusal("on", 1, "its share of 2 GPUs is used"),)
    offline = msgspec.structs.replace(young, work_class="offline")
    assert lowered([offline, claim("on", 1)], room(2)) == ["s-0"]


def test_one_that_has_just_come_up_is_taken_when_its_own_pool_does_not_want_it() -> None:
    young = holder("a-0", "0", up_for_s=1.0)
    assert lowered([claim("a", 1, young), claim("b", 1)], room(1)) == []
    assert lowered([claim("a", 0, young), claim("b", 1)], room(1)) == ["a-0"]
    assert lowered([claim("a", 0, young)], room(1)) == ["a-0"]


def test_of_those_that_have_just_come_up_as_many_stay_as_are_wanted() -> None:
    cold, warm = (holder(f"a-{n}", str(n), up_for_s=1.0, heat=n) for n in (0, 1))
    others = [claim("b", 1), claim("c", 1)]
    assert lowered([claim("a", 1, cold, warm), *others], room(2)) == ["a-0"]
    old = holder("a-2", "2", heat=9)
    assert lowered([claim("a", 1, warm, old), *others], room(2)) == ["a-2"]
    coming = holder("a-3", "3", transit=Transit.COMING)
    assert lowered([claim("a", 1, warm, coming), *others], room(2)) == []
    kept = holder("a-4", "4", up_for_s=1.0, kept=True)
    assert lowered([claim("a", 1, warm, kept), *others], room(2)) == ["a-1"]


def test_an_offline_start_is_broken_off_for_who_waits_for_an_answer() -> None:
    starts = holder("o-0", "0", transit=Transit.COMING, from_nothing=True)
    offline = claim("o", 1, starts, work_class="offline")
    assert arbitrate([offline, claim("on", 1)], room(1)).moves == (
        Lower("o", "o-0", Rung.COLD, "on (online) needs its GPU"),
        Wait("on", "o-0 makes room for it"),
    )
    resumes = msgspec.structs.replace(starts, from_nothing=False)
    assert lowered([claim("o", 1, resumes, work_class="offline"), claim("on", 1)], room(1)) == []
    online = claim("p", 2, starts, holder("p-1", "1"))
    assert lowered([online, claim("on", 1)], room(2)) == ["p-1"]


def test_a_start_after_one_that_failed_makes_room_for_a_model_that_waits() -> None:
    again = holder("p-0", "0", transit=Transit.COMING, from_nothing=True, failing=True)
    waits = claim("on", 1, unserved_s=6.0)
    assert lowered([claim("p", 1, again), waits], room(1)) == ["p-0"]
    first = msgspec.structs.replace(again, failing=False)
    assert lowered([claim("p", 1, first), waits], room(1)) == []
    assert lowered([claim("p", 1, again), claim("on", 0)], room(1)) == []
    assert lowered([claim("p", 0, again)], room(1)) == ["p-0"]


def test_who_has_had_its_turn_and_failed_waits_anew() -> None:
    unserved = Unserved()
    unserved.note(["a"], 0.0)
    assert unserved.note(["a", "b"], 4.0) == {"a": 4.0, "b": 0.0}
    unserved.note(["b"], 6.0, failing={"a"})
    assert unserved.note(["a", "b"], 7.0) == {"a": 0.0, "b": 3.0}


def test_an_operators_replica_is_nobodys_to_move() -> None:
    kept = holder("off-0", "0", Rung.ASLEEP, kept=True)
    offline = claim("off", 1, kept, work_class="offline")
    verdict = arbitrate([offline, claim("on", 1)], room(1))
    assert verdict.moves == ()
    assert verdict.terms["on"]["share"] == 0


@pytest.mark.parametrize(
    "first",
    [
        {"rung": Rung.ASLEEP},
        {"in_flight": 0},
        {"heat": 1},
        {"come_back_s": 0.5},
        {"idle_s": 100.0},
    ],
)
def test_who_yields_first(first: dict[str, Any]) -> None:
    warm = {"in_flight": 1, "heat": 10, "come_back_s": 2.0, "idle_s": 1.0}
    others = [holder(f"a-{n}", str(n), **warm) for n in (0, 2)]
    chosen = holder("a-1", "1", **{"rung": Rung.AWAKE, **warm, **first})
    serving = 3 - (chosen.rung is Rung.ASLEEP)
    offline = claim("a", serving, others[0], chosen, others[1], work_class="offline")
    verdict = arbitrate([offline, claim("on", 1)], room(3))
    assert [m.replica_id for m in verdict.moves if isinstance(m, Lower)] == ["a-1"]


def test_asleep_ones_are_lowered_further_before_any_that_serve() -> None:
    asleep = holder("b-0", "1", Rung.ASLEEP, heat=9)
    claims = [claim("a", 1, holder("a-0", "0")), claim("b", 0, asleep), claim("c", 1)]
    verdict = arbitrate(claims, room(2))
    assert verdict.moves == (
        Lower("b", "b-0", Rung.SUSPENDED, "c (online) needs its GPU"),
        Wait("c", "b-0 makes room for it"),
    )


def test_one_asleep_is_kept_for_its_own_pool_that_wants_it() -> None:
    asleep = holder("b-0", "1", Rung.ASLEEP)
    busy = holder("a-0", "0", in_flight=1)
    claims = [claim("a", 1, busy, work_class="offline"), claim("b", 1, asleep), claim("c", 1)]
    verdict = arbitrate(claims, room(2))
    assert Raise("b", "b-0", Rung.ASLEEP) in verdict.moves
    assert Lower("a", "a-0", Rung.SUSPENDED, "c (online) needs its GPU", cut=True) in verdict.moves


def test_a_suspended_one_comes_back_on_the_cards_it_is_bound_to() -> None:
    bound = holder("a-0", "", Rung.SUSPENDED, bound=("1",))
    claims = [claim("a", 1, bound)]
    assert arbitrate(claims, room(3, "012")).moves == (Raise("a", "a-0", Rung.SUSPENDED, ("1",)),)


def test_one_whose_cards_are_taken_for_good_is_passed_for_a_new_one() -> None:
    bound = holder("a-0", "", Rung.SUSPENDED, bound=("1",))
    other = claim("b", 1, holder("b-0", "1"), min=1)
    verdict = arbitrate([claim("a", 1, bound), other], room(2, "0"))
    assert verdict.moves == (Raise("a", None, Rung.COLD, ("0",)),)


def test_whoever_sits_on_the_cards_that_one_is_bound_to_makes_way() -> None:
    bound = holder("a-0", "", Rung.SUSPENDED, bound=("1",))
    others = [holder(f"b-{n}", str(n), heat=n) for n in (0, 1)]
    verdict = arbitrate([claim("a", 1, bound), claim("b", 0, *others)], room(2))
    assert [m.replica_id for m in verdict.moves if isinstance(m, Lower)] == ["b-1"]


def test_cards_of_a_group_are_freed_together() -> None:
    linked = Room(gpus=tuple(Gpu(device=str(n), name="h", nvlink_group=n // 2) for n in range(6)))
    heats = {0: 5, 1: 5, 2: 0, 3: 9, 4: 9, 5: 0}  # the two coldest, 2 and 5, are not linked
    cold = [holder(f"b-{n}", str(n), heat=heat) for n, heat in heats.items()]
    verdict = arbitrate(
        [claim("b", 4, *cold, work_class="offline"), claim("a", 1, gpus_each=2)], linked
    )
    gone = [m.replica_id for m in verdict.moves if isinstance(m, Lower)]
    assert gone == ["b-0", "b-1"]


def test_nobody_goes_who_would_not_help() -> None:
    linked = holder("b-0", "012", heat=0)
    single = holder("c-0", "3", heat=0)
    claims = [
        claim("b", 0, linked, gpus_each=3),
        claim("c", 1, single, work_class="offline"),
        claim("a", 1, gpus_each=3),
    ]
    lows = [m for m in arbitrate(claims, room(4)).moves if isinstance(m, Lower)]
    assert lows == [Lower("b", "b-0", Rung.SUSPENDED, "a (online) needs its GPU")]


def test_a_pool_that_needs_no_card_gets_all_it_wants() -> None:
    verdict = arbitrate([claim("a", 3, gpus_each=0)], room(0))
    assert verdict.moves == (Raise("a", None, Rung.COLD),) * 3


def test_a_pool_that_wants_less_loses_one_at_a_time() -> None:
    many = [holder(f"a-{n}", str(n), heat=n) for n in range(3)]
    verdict = arbitrate([claim("a", 0, *many)], room(3))
    assert verdict.moves == (Lower("a", "a-0", Rung.ASLEEP, "it is not needed"),)
    going = holder("a-0", "0", Rung.ASLEEP, transit=Transit.GOING)
    assert arbitrate([claim("a", 0, going, *many[1:])], room(3)).moves == ()


def test_a_minimum_is_given_up_for_one_of_a_class_before_it_alone() -> None:
    offline = claim("off", 1, holder("off-0", "0"), min=1, work_class="offline")
    assert arbitrate([offline, claim("on", 1)], room(1)).moves == ()
    verdict = arbitrate([offline, claim("on", 1, min=1)], room(1))
    assert [move.replica_id for move in verdict.moves if isinstance(move, Lower)] == ["off-0"]
    online = claim("one", 1, holder("one-0", "0"), min=1)
    verdict = arbitrate([online, claim("other", 1, min=1)], room(1))
    assert verdict.moves == ()


def test_one_that_rests_is_lowered_when_the_hosts_memory_is_short() -> None:
    resting = [
        holder("a-0", "0", Rung.ASLEEP, idle_s=10.0),
        holder("a-1", "1", Rung.ASLEEP, idle_s=20.0),
        holder("a-2", "2", Rung.ASLEEP, idle_s=15.0),
    ]
    verdict = arbitrate([claim("a", 0, *resting)], room(3, host_bytes_free=-17))
    assert verdict.moves == (
        Lower("a", "a-1", Rung.COLD, "the host's memory is short"),
        Lower("a", "a-2", Rung.COLD, "the host's memory is short"),
    )


def test_of_pools_without_any_the_one_with_most_work_for_its_start_comes_first() -> None:
    slow = claim("a", 1, queued=10, ways_up=(WayUp(Rung.COLD, 46.0),))
    quick = claim("b", 1, queued=5, ways_up=(WayUp(Rung.COLD, 5.0),))
    assert arbitrate([slow, quick], room(1, "0")).moves == (Raise("b", None, Rung.COLD, ("0",)),)


def test_but_the_one_that_has_waited_longer_comes_first_in_the_end() -> None:
    slow = claim("a", 1, queued=10, unserved_s=6.0, ways_up=(WayUp(Rung.COLD, 46.0),))
    quick = claim("b", 1, queued=500, unserved_s=5.5, ways_up=(WayUp(Rung.COLD, 5.0),))
    assert arbitrate([slow, quick], room(1, "0")).moves == (Raise("a", None, Rung.COLD, ("0",)),)


def lowered(claims: list[Claim], cards: Room) -> list[str]:
    return [m.replica_id for m in arbitrate(claims, cards).moves if isinstance(m, Lower)]


def test_whoever_has_had_its_turn_longest_gives_way() -> None:
    first = claim("a", 1, holder("a-0", "0", up_for_s=500.0, heat=9))
    second = claim("b", 1, holder("b-0", "1", up_for_s=300.0))
    assert lowered([first, second, claim("c", 1, unserved_s=6.0)], room(2)) == ["a-0"]


def test_nobody_gives_way_within_its_turn() -> None:
    first = claim("a", 1, holder("a-0", "0", up_for_s=183.0))  # a start took 46 s
    assert lowered([first, claim("c", 1, unserved_s=6.0)], room(1)) == []
    first = claim("a", 1, holder("a-0", "0", up_for_s=184.0))
    assert lowered([first, claim("c", 1, unserved_s=6.0)], room(1)) == ["a-0"]


def test_equals_do_not_take_from_each_other() -> None:
    more = claim("b", 2, holder("b-0", "0", heat=0), holder("b-1", "1", heat=0))
    less = claim("a", 2, holder("a-0", "2"), queued=100)
    assert arbitrate([more, less], room(3)).moves == ()


def test_each_pool_gives_what_it_can_spare() -> None:
    cold = claim("a", 2, *(holder(f"a-{n}", str(n)) for n in (0, 1)), work_class="offline")
    hot = claim("b", 2, *(holder(f"b-{n}", str(n), heat=9) for n in (2, 3)), work_class="offline")
    assert lowered([cold, hot, claim("c", 2)], room(4)) == ["a-0", "b-2"]


def test_what_one_gives_up_serves_two() -> None:
    wide = claim("a", 0, holder("a-0", "01"), gpus_each=2)
    narrow = claim("b", 1, holder("b-0", "2"), work_class="offline")
    verdict = arbitrate([wide, narrow, claim("c", 2)], room(3))
    assert [m.replica_id for m in verdict.moves if isinstance(m, Lower)] == ["a-0"]
    assert verdict.refused == ()


def test_offline_work_that_has_waited_long_enough_gets_a_replica() -> None:
    online = claim("on", 2, holder("on-0", "0", heat=9), holder("on-1", "1"), queued=1)
    offline = claim("off", 1, work_class="offline", unserved_s=599.0)
    assert lowered([online, offline], room(2)) == []
    offline = msgspec.structs.replace(offline, unserved_s=600.0)
    assert lowered([online, offline], room(2)) == ["on-1"]


def test_a_card_that_is_coming_is_for_one() -> None:
    going = holder("a-0", "0", Rung.SUSPENDED, transit=Transit.GOING)
    offline = claim("a", 2, going, holder("a-1", "1"), work_class="offline")
    assert lowered([offline, claim("c", 2)], room(2)) == ["a-1"]


def test_who_makes_room_on_cards_and_on_the_host_goes_down_once() -> None:
    asleep = claim("a", 0, holder("a-0", "0", Rung.ASLEEP))
    assert lowered([asleep, claim("c", 1)], room(1, host_bytes_free=-100)) == ["a-0"]


def test_one_that_is_not_needed_gives_its_card_to_whom_it_does_not_suffice_yet() -> None:
    idle, young = holder("a-0", "0"), holder("b-0", "1", up_for_s=1.0)
    claims = [claim("a", 0, idle), claim("b", 1, young), claim("c", 1, gpus_each=2)]
    assert arbitrate(claims, room(2)).moves == (
        Lower("a", "a-0", Rung.SUSPENDED, "it is not needed"),
    )


def test_nobody_who_serves_gives_way_to_a_forecast() -> None:
    serving = claim("a", 3, *(holder(f"a-{n}", str(n)) for n in range(3)), work_class="semi-online")
    ahead = claim("b", 3, holder("b-0", "3"))
    assert lowered([serving, ahead], room(4)) == []
    short = msgspec.structs.replace(ahead, queued=1)
    assert lowered([serving, short], room(4)) == ["a-0", "a-1"]
    offline = msgspec.structs.replace(serving, work_class="offline")
    assert lowered([offline, ahead], room(4)) == ["a-0", "a-1"]


def test_how_many_replicas_the_cards_allow() -> None:
    claims = [
        claim("a", 1, holder("a-0", "01"), gpus_each=2),
        claim("b", 1, min=3),
        claim("c", 1, gpus_each=0),
    ]
    many = room(8, "234567")
    assert [replicas_possible(c, claims, many) for c in claims] == [2, 8, None]


def test_a_wait_is_counted_from_its_begin_and_forgotten_when_it_ends() -> None:
    unserved = Unserved()
    assert unserved.note(["a"], 10.0) == {"a": 0.0}
    assert unserved.note(["a", "b"], 15.0) == {"a": 5.0, "b": 0.0}
    assert unserved.note(["b"], 20.0) == {"a": 5.0, "b": 5.0}  # remembered for a while
    assert unserved.note([], 24.9) == {"a": 5.0, "b": 5.0}
    assert unserved.note([], 25.1) == {"b": 5.0}
    assert unserved.note(["a", "b"], 26.0) == {"a": 0.0, "b": 11.0}
