"""Who gets cards, who gives them up, and who waits."""

from __future__ import annotations

from typing import Any

from backends.arbiter import arbitrate
from backends.claims import Claim, Holder, Lower, Raise, Room, Transit, Wait
from backends.gpus import Gpu
from backends.ladder import Rest, Rung, WayUp

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
