"""What becomes of replicas whose machine, or cards, will be taken away."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.ladder import Rung
from backends.lifecycle import Event, Phase
from backends.reclaim import KILL_S, TERM_S, Fate, Memory, Notice, Outcome, Seen, outcome
from backends.reconcile import Wanted
from backends.spec import ReplicaSpec

GRACE_S = 4.0


def want(name: str, work_class: str = "online", rung: Rung | None = None) -> Wanted:
    spec = ReplicaSpec(
        replica_id=name, model="m", pool="m", engine="simulator", work_class=work_class
    )
    return Wanted(spec, "hash", rung)


def seen(
    name: str,
    *devices: str,
    phase: Phase = Phase.READY,
    work_class: str = "online",
    move_s: float | None = None,
    pinned: bool = False,
) -> Seen:
    return Seen(
        replica_id=name,
        phase=phase,
        work_class=work_class,
        devices=devices,
        stop_grace_s=GRACE_S,
        move_s=move_s,
        pinned=pinned,
    )


CARD_0 = Notice(told_s=0.0, ends_s=20.0, devices=frozenset({"0"}))
MACHINE = Notice(told_s=0.0, ends_s=20.0)
LEAVE_S = 20.0 - TERM_S - GRACE_S


def look(
    wanted: list[Wanted],
    there: list[Seen],
    notice: Notice = CARD_0,
    memory: Memory | None = None,
    free: int = 0,
    now_s: float = 0.0,
) -> Outcome:
    known = {each.replica_id: each for each in there}
    return outcome(wanted, known, [notice], memory or Memory(), free, now_s)


def names(out: Outcome) -> list[str]:
    return [each.spec.replica_id for each in out.wanted]


def test_without_a_notice_all_is_as_it_was() -> None:
    wanted = [want("m-0"), want("m-1", rung=Rung.ASLEEP)]
    out = outcome(wanted, {"m-0": seen("m-0", "0")}, [], Memory(), 0, 0.0)
    assert sorted(names(out)) == ["m-0", "m-1"]
    assert set(map(repr, out.wanted)) == set(map(repr, wanted))
    assert (out.fates, out.pushes, out.next_s) == ({}, (), None)


def test_one_that_serves_gets_a_stand_in_first_and_serves_on() -> None:
    out = look([want("m-0"), want("m-1")], [seen("m-0", "0"), seen("m-1", "1")])
    assert names(out) == ["m-2", "m-0", "m-1"]
    assert out.fates == {"m-0": Fate.SERVES_ON}
    assert out.memory.stand_ins == {"m-0": "m-2"}
    assert out.next_s == LEAVE_S


def test_it_leaves_as_soon_as_its_stand_in_serves() -> None:
    wanted, memory = [want("m-0"), want("m-1")], Memory({"m-0": "m-2"})
    coming = [seen("m-0", "0"), seen("m-1", "1"), seen("m-2", "2", phase=Phase.STARTING)]
    assert set(names(look(wanted, coming, memory=memory))) == {"m-0", "m-1", "m-2"}
    there = [*coming[:2], seen("m-2", "2")]
    out = look(wanted, there, memory=memory)
    assert set(names(out)) == {"m-1", "m-2"}
    assert out.fates == {"m-0": Fate.LEAVES}


def test_it_leaves_in_time_to_drain_if_nobody_stands_in_for_it() -> None:
    memory = Memory({"m-0": "m-1"})
    there = [seen("m-0", "0"), seen("m-1", phase=Phase.BACKOFF)]
    assert "m-0" in names(look([want("m-0")], there, memory=memory, now_s=LEAVE_S - 0.1))
    assert names(look([want("m-0")], there, memory=memory, now_s=LEAVE_S)) == ["m-1"]


@pytest.mark.parametrize("phase", [None, Phase.BACKOFF, Phase.STARTING])
def test_a_notice_taken_back_leaves_who_serves_where_its_stand_in_does_not_yet(
    phase: Phase | None,
) -> None:
    there = {"m-0": seen("m-0", "0")}
    if phase is not None:
        there["m-1"] = seen("m-1", phase=phase)
    out = outcome([want("m-0")], there, [], Memory({"m-0": "m-1"}), 0, 0.0)
    assert (names(out), out.memory) == (["m-0"], Memory())
    there["m-1"] = seen("m-1", "1")
    out = outcome([want("m-0")], there, [], Memory({"m-0": "m-1"}), 0, 0.0)
    assert (names(out), out.memory.stand_ins) == (["m-1"], {"m-0": "m-1"})


def test_a_short_notice_leaves_half_of_itself_to_the_stand_in() -> None:
    notice = msgspec.structs.replace(CARD_0, ends_s=6.0)
    out = look([want("m-0")], [seen("m-0", "0")], notice)
    assert out.next_s == 6.0 - TERM_S - 3.0


def test_stand_ins_are_started_in_the_order_of_their_classes() -> None:
    classes = ("semi-online", "online", "semi-online", "online")
    wanted = [want(f"m-{n}", each) for n, each in enumerate(classes)]
    there = [seen(f"m-{n}", "0", work_class=each) for n, each in enumerate(classes)]
    told = [each.spec.work_class for each in look(wanted, there).wanted]
    assert told[:4] == ["online", "online", "semi-online", "semi-online"]


def test_offline_work_is_given_up_at_once() -> None:
    out = look([want("m-0", "offline")], [seen("m-0", "0", work_class="offline")])
    assert out.wanted == ()
    assert out.fates == {"m-0": Fate.IS_REQUEUED}


@pytest.mark.parametrize(
    "phase", [Phase.STARTING, Phase.ASLEEP, Phase.WAKING, Phase.HELD, Phase.EMPTYING]
)
def test_what_does_not_serve_leaves_at_once_and_starts_elsewhere_by_itself(phase: Phase) -> None:
    out = look([want("m-0")], [seen("m-0", "0", phase=phase)])
    assert out.wanted == ()
    after = look([want("m-0")], [seen("m-0", phase=Phase.STOPPED)])
    assert names(after) == ["m-0"]


def test_one_that_can_be_moved_is_suspended_and_brought_back() -> None:
    wanted = [want("m-0")]
    out = look(wanted, [seen("m-0", "0", move_s=2.0)], free=1)
    assert out.wanted == (want("m-0", rung=Rung.SUSPENDED),)
    assert out.fates == {"m-0": Fate.MOVES}
    for phase in (Phase.EMPTYING, Phase.FALLING_ASLEEP, Phase.ASLEEP):
        out = look(wanted, [seen("m-0", "0", phase=phase, move_s=2.0)], memory=out.memory)
        assert out.wanted == (want("m-0", rung=Rung.SUSPENDED),)
    for phase in (Phase.SUSPENDED, Phase.WAKING):  # it has no card any more, then another one
        out = look(wanted, [seen("m-0", phase=phase, move_s=2.0)], memory=out.memory)
        assert out.wanted == (want("m-0", rung=Rung.AWAKE),)
    out = look(wanted, [seen("m-0", "1", move_s=2.0)], memory=out.memory)
    assert out.wanted == (want("m-0"),)
    assert out.memory == Memory()


@pytest.mark.parametrize(
    ("each", "free", "now_s"),
    [
        (seen("m-0", "0", move_s=None), 1, 0.0),
        (seen("m-0", "0", move_s=2.0), 0, 0.0),
        (seen("m-0", "0", "1", move_s=2.0), 1, 0.0),
        (seen("m-0", "0", move_s=9.1), 1, 0.0),
        (seen("m-0", "0", move_s=2.0, pinned=True), 1, 0.0),
    ],
)
def test_one_that_cannot_be_moved_in_time_is_stood_in_for(
    each: Seen, free: int, now_s: float
) -> None:
    assert look([want("m-0")], [each], free=free, now_s=now_s).fates == {"m-0": Fate.SERVES_ON}


def test_cards_are_promised_to_one_mover_only() -> None:
    there = [seen("m-0", "0", move_s=1.0), seen("m-1", "0", move_s=1.0)]
    out = look([want("m-0"), want("m-1")], there, free=1)
    assert sorted(out.fates.values()) == [Fate.MOVES, Fate.SERVES_ON]


def test_one_at_rest_is_suspended_and_rests_on() -> None:
    rest = seen("m-0", "0", phase=Phase.ASLEEP, move_s=2.0)
    out = look([want("m-0")], [rest])
    assert out.wanted == (want("m-0", rung=Rung.SUSPENDED),)
    after = look([want("m-0")], [seen("m-0", phase=Phase.SUSPENDED)], memory=out.memory)
    assert after.wanted == (want("m-0"),)


def test_one_that_names_its_card_is_not_started_there_again() -> None:
    out = look([want("m-0")], [seen("m-0", "0", pinned=True)])
    assert names(out) == ["m-0"]


def test_when_the_machine_goes_nothing_is_started() -> None:
    there = [seen("m-0", "0"), seen("m-1", phase=Phase.BACKOFF)]
    out = look([want("m-0"), want("m-1"), want("m-2")], there, MACHINE)
    assert names(out) == ["m-0"]
    assert look([want("m-0"), want("m-2")], there, MACHINE, now_s=LEAVE_S).wanted == ()


def test_drain_and_sigterm_end_when_their_time_is_up() -> None:
    draining, stopping = seen("m-0", "0", phase=Phase.DRAINING), seen("m-1", "0")
    stopping = msgspec.structs.replace(stopping, phase=Phase.STOPPING)
    there = [draining, stopping]
    assert look([], there, now_s=20.0 - TERM_S - 0.01).pushes == ()
    assert look([], there, now_s=20.0 - TERM_S).pushes == (("m-0", Event.DEADLINE),)
    both = look([], there, now_s=20.0 - KILL_S).pushes
    assert set(both) == {("m-0", Event.DEADLINE), ("m-1", Event.DEADLINE)}


def test_a_stand_in_whose_card_goes_as_well_is_stood_in_for() -> None:
    both = Notice(told_s=0.0, ends_s=20.0, devices=frozenset({"0", "1"}))
    there = [seen("m-0", "0"), seen("m-1", "1")]
    out = look([want("m-0")], there, both, Memory({"m-0": "m-1"}))
    assert set(names(out)) == {"m-0", "m-1", "m-2"}
    gone = look([want("m-0")], [seen("m-2", "2")], both, out.memory)
    assert names(gone) == ["m-2"]
    assert gone.memory.stand_ins == {"m-0": "m-2"}  # of those who are gone nothing is kept


def test_who_is_not_wanted_any_more_is_forgotten() -> None:
    out = look([want("m-1")], [seen("m-1", "1")], memory=Memory({"m-0": "m-2"}))
    assert out.memory == Memory()


SEEN = st.builds(
    Seen,
    replica_id=st.sampled_from([f"m-{n}" for n in range(6)]),
    phase=st.sampled_from(Phase),
    work_class=st.sampled_from(["online", "semi-online", "offline"]),
    devices=st.lists(st.sampled_from("0123"), max_size=2, unique=True).map(tuple),
    stop_grace_s=st.floats(0, 60),
    move_s=st.none() | st.floats(0, 30),
    pinned=st.booleans(),
)


@given(
    st.lists(SEEN, max_size=6, unique_by=lambda each: each.replica_id),
    st.integers(0, 6),
    st.sets(st.sampled_from("0123")),
    st.integers(0, 4),
    st.floats(0, 25),
)
def test_looks_agree_and_lose_nobody(
    there: list[Seen], count: int, devices: set[str], free: int, now_s: float
) -> None:
    classes = {each.replica_id: each.work_class for each in there}
    wanted = [want(f"m-{n}", classes.get(f"m-{n}", "online")) for n in range(count)]
    notice = msgspec.structs.replace(CARD_0, devices=frozenset(devices))
    out = look(wanted, there, notice, free=free, now_s=now_s)
    told = names(out)
    assert len(set(told)) == len(told)
    for each in wanted:
        name = each.spec.replica_id
        if name not in out.fates:
            assert name in told
        elif out.fates[name] is Fate.SERVES_ON and name in out.memory.stand_ins:
            assert {name, out.memory.stand_ins[name]} <= set(told)
    again = look(wanted, there, notice, out.memory, free, now_s)
    assert set(names(again)) == set(told)
    assert again.memory == out.memory
