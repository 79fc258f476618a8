"""What is done with replicas by the arbiter's verdict, and the cards that it is given to judge."""

from __future__ import annotations

from backends.arbiter import arbitrate
from backends.card_room import FREEING, room_of
from backends.claims import Claim, Lower, Raise, Refusal, Verdict, Wait
from backends.gpus import Gpu, GpuInventory, GpuLeases
from backends.ladder import Ladder, Rung
from backends.members import Standing
from backends.orders import Orders
from backends.pools import View
from backends.scaled_pool import ScaledPool
from tests.backends.test_pools import member, view


def orders(seen: View, desired: int = 1) -> Orders:
    pool = ScaledPool(seen.pool, 0.0)
    pool.desired = desired
    return Orders({"m": pool}, {"m": seen}, {m.replica_id for m in seen.members}, 100.0)


def test_moves_become_rungs_and_words() -> None:
    made = orders(view(member(0, Standing.SERVES), member(2, Standing.RESTS, Rung.ASLEEP)))
    moves = (
        Lower("m", "m-0", Rung.COLD, "it is not needed"),
        Raise("m", "m-2", Rung.ASLEEP),
        Raise("m", None, Rung.COLD, ("3",)),
    )
    assert made.take(Verdict(moves=moves)) == {"m-0"}
    assert made.by_replica == {"m-0": None, "m-2": Rung.AWAKE, "m-1": Rung.AWAKE}
    assert made.words["m"][0] == "m-0 to cold: it is not needed"


def test_one_that_goes_for_others_is_not_called_back() -> None:
    seen = view(member(0, Standing.GOING, recallable=True), member(1, Standing.GOING))
    made = orders(seen)
    assert made.recall(set())["m"].have == 0
    views = orders(seen).recall({"m-0", "m-1"})
    assert [m.standing for m in views["m"].members] == [Standing.SERVES, Standing.GOING]
    verdict = Verdict(moves=(Lower("m", "m-0", Rung.COLD, "x"), Wait("n", "y")))
    assert made.take(verdict) == set()


def test_as_many_are_called_back_as_are_lacking_the_warmest_first() -> None:
    seen = view(
        member(0, Standing.GOING, recallable=True, heat=5),
        member(1, Standing.GOING, recallable=True, heat=9),
    )
    made = orders(seen)
    assert made.recall({"m-0", "m-1"})["m"].have == 1
    assert made.by_replica == {"m-1": Rung.AWAKE}


def test_a_pool_of_a_fixed_size_is_told_why_it_waits_and_nothing_else() -> None:
    made = orders(view(member(0, Standing.SERVES), pool="{engine: simulator, replicas: 1}"))
    verdict = Verdict(
        moves=(Raise("m", None, Rung.COLD), Lower("m", "m-0", Rung.COLD, "x")),
        refused=(Refusal("m", 1, "its share of 1 GPUs is used"),),
    )
    made.take(verdict)
    assert (made.by_replica, made.waiting) == ({}, {"m": "its share of 1 GPUs is used"})


def test_a_pool_that_found_no_card_lately_asks_later_and_offline_work_is_cut() -> None:
    made = orders(view(member(0, Standing.SERVES)))
    made._pools["m"].crowded_until_s = 101.0
    made.take(
        Verdict(moves=(Raise("m", None, Rung.COLD), Lower("m", "m-0", Rung.COLD, "x", cut=True)))
    )
    assert (made.by_replica, made.cut) == ({"m-0": None}, ["m-0"])


def test_cards_that_are_being_freed_are_waited_for_and_nobody_is_sent_away() -> None:
    """Of a replica that has ended, and of one that is suspended, while memory is still held."""
    leases = GpuLeases(GpuInventory(tuple(Gpu(device=str(n), name="x") for n in range(3))))
    for owner, card in (("m-0", "0"), ("m-1", "1"), ("gone-7", "2")):
        leases.claim(owner, [card])
    seen = view(
        member(0, Standing.SERVES, devices=("0",)),
        member(1, Standing.RESTS, Rung.SUSPENDED, devices=("1",)),
    )
    room, freeing = room_of(leases, [seen], None)
    assert (room.free, [claim.pool for claim in freeing]) == (frozenset(), [FREEING])
    assert {holder.replica_id for holder in freeing[0].holders} == {"m-1", "gone-7"}
    other = Claim(pool="n", desired=2, ways_up=seen.claim(Ladder(), 0.0, 0).ways_up[-1:])
    verdict = arbitrate([seen.claim(Ladder(), 0.0, 1), other, *freeing], room)
    assert [type(move) for move in verdict.moves] == [Wait, Wait]
    assert room_of(None, [seen], 7)[0].host_bytes_free == 7
