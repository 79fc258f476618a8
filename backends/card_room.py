"""The cards of this machine as the arbiter meets them: all, the free ones, and those in between.

A card is leased until its memory is free, which can be after its replica has ended, or after it was
suspended. To the arbiter such cards are on their way to being free, so that nobody else is sent
away for want of them.
"""

from __future__ import annotations

from collections.abc import Iterable

from backends.claims import Claim, Holder, Room, Transit
from backends.gpus import GpuLeases
from backends.ladder import Rung
from backends.members import Standing
from backends.pools import View

FREEING = ""  # the name of the claim of those whom these cards are taken back from


def room_of(
    leases: GpuLeases | None, views: Iterable[View], host_bytes_free: int | None
) -> tuple[Room, tuple[Claim, ...]]:
    """Return the cards, and a claim that holds those that are being freed, if any are."""
    if leases is None:
        return Room(host_bytes_free=host_bytes_free), ()
    having = {
        member.replica_id
        for view in views
        for member in view.members
        if member.standing is not Standing.GONE and member.rung is not Rung.SUSPENDED
    }
    holders = tuple(
        Holder(replica_id=owner, rung=Rung.COLD, transit=Transit.GOING, devices=devices)
        for owner, devices in leases.holders.items()
        if owner not in having
    )
    freeing = (Claim(pool=FREEING, gpus_each=0, holders=holders),) if holders else ()
    return Room(gpus=leases.gpus, free=free_cards(leases), host_bytes_free=host_bytes_free), freeing


def free_cards(leases: GpuLeases) -> frozenset[str]:
    """Return the cards that nobody has."""
    return frozenset(gpu.device for gpu in leases.free)
