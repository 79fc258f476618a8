"""Who gets the GPUs: many models on one pool of cards.

How many each may have (`shares.py`) follows from what all want; which replica goes and which comes
is decided here. A pool that has more than its share gives some up when another lacks them; one that
has less takes the quickest way up that its cards allow. Who yields is, in this order, asleep (it
computes nothing), idle, of the coldest cache, the cheapest to bring back.

**One thing at a time.** What is on its way is seen in the claims and not asked for again, so the
same state always gives the same moves, and a state in which all have their share gives none. Cards
that are being given up count as coming: nobody else is sent away for them. A replica that has just
come up is not taken within its own start time while its pool wants it, or the pool would pay for
starts and not for answers; offline work is, even while it starts. A pool that has more than it
wants loses one at a time.

A replica asleep keeps the lease of its cards. When somebody wants these it is lowered further, to a
rung that gives them up; where nobody does, replicas rest no deeper than they must. Cards for a
tensor-parallel replica are freed where they lie close together, as `gpus.choose` would take them.

Pure: values in, values out; ages come with the claims (`Unserved` keeps the one that nobody else
knows).
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence

from backends.claims import Claim, Holder, Lower, Raise, Refusal, Room, Transit, Verdict, Wait
from backends.gpus import choose
from backends.ladder import Rest, Rung, WayUp, best_rest
from backends.shares import PATIENCE_S, TURN_S_MIN, Shares, share_out, turn_s

_COLD = Rest(Rung.COLD, 0.0)


class Unserved:
    """For how long each pool has wanted a replica while none of it served.

    A wait is remembered for `TURN_S_MIN` after it ended: a pool that had to wait until its claim
    went before others' would otherwise lose the replica to these in the moment that it comes up.
    """

    def __init__(self) -> None:
        self._waits: dict[str, tuple[float, float]] = {}  # its begin, and when it was last one

    def note(
        self, wanting: Iterable[str], now_s: float, failing: Collection[str] = ()
    ) -> Mapping[str, float]:
        """Take the pools that want one and have none, and return how long each has waited."""
        waits = {p: wait for p, wait in self._waits.items() if p not in failing}
        recent = {p: wait for p, wait in waits.items() if now_s - wait[1] < TURN_S_MIN}
        now = {pool: (recent.get(pool, (now_s, 0.0))[0], now_s) for pool in wanting}
        self._waits = recent | now
        return {pool: last_s - since_s for pool, (since_s, last_s) in self._waits.items()}


def arbitrate(claims: Sequence[Claim], room: Room) -> Verdict:
    """Return what is to be done now. The moves are in the order in which to make them."""
    held = sum(len(holder.devices) for claim in claims for holder in claim.holders)
    shares = share_out(claims, held + len(room.free))
    table = _Table(claims, room, shares)
    for pool in table.to_come():
        table.bring(pool)
    for claim in claims:
        table.shed(claim)
    table.relieve_host()
    return Verdict(
        moves=(*table.lows, *table.raises, *table.waits),
        refused=tuple(table.refusals()),
        terms={claim.pool: _terms(claim, shares) for claim in claims},
    )


def replicas_possible(claim: Claim, claims: Sequence[Claim], room: Room) -> int | None:
    """Return how many replicas the cards allow beside what others are promised; None: any number.

    For the control law, which need not want what cannot be.
    """
    if not claim.gpus_each:
        return None
    held = sum(len(holder.devices) for other in claims for holder in other.holders)
    promised = sum(other.min * other.gpus_each for other in claims if other.pool != claim.pool)
    possible = max(0, held + len(room.free) - promised) // claim.gpus_each
    by_node = Counter(gpu.host for gpu in room.gpus)
    if set(by_node) - {""}:  # no replica has cards of two nodes
        possible = min(possible, sum(gpus // claim.gpus_each for gpus in by_node.values()))
    return possible


class _Table:
    """What lies on the table while it is decided: cards, who has been lowered, who raised."""

    def __init__(self, claims: Sequence[Claim], room: Room, shares: Shares) -> None:
        self.claims = {claim.pool: claim for claim in claims}
        self.shares = shares
        self.lows: list[Lower] = []
        self.raises: list[Raise] = []
        self.waits: list[Wait] = []
        self.short: dict[str, int] = {}  # replicas that get nothing, by pool
        self._room = room
        self._free = set(room.free)
        self._coming = {
            device
            for claim in claims
            for holder in claim.holders
            if holder.transit is Transit.GOING and not holder.rung.holds_gpus
            for device in holder.devices
        }
        self._host_free = room.host_bytes_free
        self._used: set[str] = set()  # replicas that something has been decided of
        self._spare = {c.pool: len(c.serving) - shares.replicas[c.pool] for c in claims}
        self._reserve(claims)

    def to_come(self) -> tuple[str, ...]:
        """Return the pool of each replica that is to come, in the order of the shares."""
        there = {pool: len(claim.serving) for pool, claim in self.claims.items()}
        come = []
        for pool in self.shares.order:
            there[pool] -= 1
            if there[pool] < 0:
                come.append(pool)
        return tuple(come)

    def bring(self, pool: str) -> None:
        """Bring one more replica of this pool up, or see to it that cards become free for it."""
        claim = self.claims[pool]
        ways = [way for way in claim.ways_up if self._passable(claim, way)]
        for way in ways:
            devices = self._at_once(claim, way)
            if devices is not None:
                self._free -= set(devices)
                self._used |= {way.replica_id} if way.replica_id else set()
                self.raises.append(Raise(pool, way.replica_id, way.rung, devices))
                return
        for way in ways:
            if self._make_way(claim, way):
                self._used |= {way.replica_id} if way.replica_id else set()
                return
        self.short[pool] = self.short.get(pool, 0) + 1

    def shed(self, claim: Claim) -> None:
        """Let a pool that has more than it wants lose one, if none is on its way down already."""
        going = any(holder.transit is Transit.GOING for holder in claim.holders)
        lowered = any(low.pool == claim.pool for low in self.lows)
        if going or lowered or len(claim.serving) <= claim.wants:
            return
        movable = [h for h in claim.serving if claim.may_yield(h)]
        if movable:
            wanted = self._scarce()
            self._lower(claim, min(movable, key=_yields), "it is not needed", gpu_wanted=wanted)

    def relieve_host(self) -> None:
        """Lower replicas that rest, the longest idle first, while the host's memory is short."""
        resting = [
            (claim, holder)
            for claim in self.claims.values()
            for holder in claim.holders
            if not holder.serves and claim.may_yield(holder)
        ]
        for claim, holder in sorted(resting, key=lambda pair: -pair[1].idle_s):
            if self._host_free is None or self._host_free >= 0:
                return
            if holder.replica_id not in self._used:
                self._lower(claim, holder, "the host's memory is short", gpu_wanted=False)

    def _scarce(self) -> bool:
        """Whether somebody wants cards and gets none."""
        shares = self.shares.replicas
        return bool(self.short) or any(
            claim.gpus_each and shares[claim.pool] < claim.wants for claim in self.claims.values()
        )

    def refusals(self) -> Iterable[Refusal]:
        """Yield what is wanted and will not come as things are."""
        cards = len(self._room.gpus)
        for pool, claim in self.claims.items():
            beyond = claim.wants - max(self.shares.replicas[pool], len(claim.serving))
            if beyond > 0:
                yield Refusal(pool, beyond, f"its share of {cards} GPUs is used")
            if pool in self.short:
                why = "no cards that it could use can be given up now"
                yield Refusal(pool, self.short[pool], why)

    def _reserve(self, claims: Sequence[Claim]) -> None:
        """Keep those asleep for their own pools, as far as these will raise them."""
        self._kept_asleep: set[str] = set()
        for claim in claims:
            lacking = self.shares.replicas[claim.pool] - len(claim.serving)
            asleep = [
                way.replica_id
                for way in claim.ways_up
                if way.replica_id and self._passable(claim, way) and way.rung.holds_gpus
            ]
            self._kept_asleep.update(asleep[: max(0, lacking)])

    def _passable(self, claim: Claim, way: WayUp) -> bool:
        if way.replica_id is None:
            return True
        holder = next((h for h in claim.holders if h.replica_id == way.replica_id), None)
        free = holder is not None and not holder.serves and claim.may_yield(holder)
        return free and way.replica_id not in self._used

    def _at_once(self, claim: Claim, way: WayUp) -> tuple[str, ...] | None:
        """Return the cards to lease for this way now, perhaps none; None: it has to wait."""
        holder = _holder(claim, way)
        if not claim.gpus_each or (holder and holder.devices):
            return ()
        return self._choose(self._free, claim, holder)

    def _choose(
        self, devices: set[str], claim: Claim, holder: Holder | None
    ) -> tuple[str, ...] | None:
        if holder and holder.bound:
            return holder.bound if devices.issuperset(holder.bound) else None
        gpus = [gpu for gpu in self._room.gpus if gpu.device in devices]
        chosen = choose(gpus, claim.gpus_each)
        return tuple(gpu.device for gpu in chosen) if chosen else None

    def _make_way(self, claim: Claim, way: WayUp) -> bool:
        """Reserve cards for it that are being given up, or have others give some up."""
        holder = _holder(claim, way)
        near = self._free | self._coming
        chosen = self._choose(near, claim, holder)
        if chosen is not None:
            self._take(chosen)
            self.waits.append(Wait(claim.pool, "cards are being given up for it"))
            return True
        victims = self._victims(claim, holder, near)
        if not victims:
            return False
        for other, victim in victims:
            reason = f"{claim.pool} ({claim.work_class}) needs its GPU"
            self._lower(other, victim, reason, gpu_wanted=True)
            self._spare[other.pool] -= victim.serves
        freed = {device for _, victim in victims for device in victim.devices}
        chosen = self._choose(near | freed, claim, holder)
        assert chosen is not None
        self._coming |= freed
        self._take(chosen)
        names = ", ".join(victim.replica_id for _, victim in victims)
        self.waits.append(Wait(claim.pool, f"{names} makes room for it"))
        return True

    def _take(self, devices: Iterable[str]) -> None:
        self._free -= set(devices)
        self._coming -= set(devices)

    def _victims(
        self, claim: Claim, holder: Holder | None, near: set[str]
    ) -> list[tuple[Claim, Holder]]:
        """Return whose cards, with those that are near, make room; nobody, if none would.

        The best cards for a replica of several are freed if that keeps within what each pool can
        spare; otherwise those of whoever yields first.
        """
        offers = sorted(self._offers(), key=lambda pair: _yields(pair[1]))
        if claim.gpus_each == 1:
            sufficing = (
                pair
                for pair in offers
                if self._choose(near | _devices([pair]), claim, holder) is not None
            )
            return list(itertools.islice(sufficing, 1))
        best = self._fewest(claim, holder, near, offers)
        if self._within_spare(best) == best:
            return best
        return self._fewest(claim, holder, near, self._within_spare(offers))

    def _fewest(
        self,
        claim: Claim,
        holder: Holder | None,
        near: set[str],
        offers: list[tuple[Claim, Holder]],
    ) -> list[tuple[Claim, Holder]]:
        """Drop offers, the last to yield first, for as long as cards as close can be chosen."""
        chosen = self._choose(near | _devices(offers), claim, holder)
        if chosen is None:
            return []
        apart = self._apart(chosen)
        for pair in reversed(offers):
            fewer = [other for other in offers if other is not pair]
            chosen = self._choose(near | _devices(fewer), claim, holder)
            if chosen is not None and self._apart(chosen) <= apart:
                offers = fewer
        return offers

    def _within_spare(self, offers: list[tuple[Claim, Holder]]) -> list[tuple[Claim, Holder]]:
        spare = dict(self._spare)
        within = []
        for claim, holder in offers:
            if not holder.serves or spare[claim.pool] > 0:
                spare[claim.pool] -= holder.serves
                within.append((claim, holder))
        return within

    def _apart(self, devices: Iterable[str]) -> tuple[int, int]:
        """Say over how many groups of linked cards and over how many nodes these lie."""
        gpus = [gpu for gpu in self._room.gpus if gpu.device in devices]
        links = {g.device if g.nvlink_group is None else g.nvlink_group for g in gpus}
        return len(links), len({gpu.numa_node for gpu in gpus})

    def _offers(self) -> Iterable[tuple[Claim, Holder]]:
        """Yield each replica whose cards another pool could have."""
        for claim in self.claims.values():
            for holder in claim.holders:
                if (
                    not claim.may_yield(holder)
                    or not holder.devices
                    or holder.replica_id in self._used
                ):
                    continue
                if holder.serves:
                    may = self._spare[claim.pool] > 0
                else:
                    may = holder.replica_id not in self._kept_asleep
                if may:
                    yield claim, holder

    def _lower(self, claim: Claim, holder: Holder, reason: str, *, gpu_wanted: bool) -> None:
        now = next((r.host_bytes for r in holder.rests if r.rung is holder.rung), 0)
        below = [rest for rest in holder.rests if rest.rung.depth > holder.rung.depth]
        if holder.transit is Transit.COMING or not below:  # a start that is broken off
            below = [_COLD]
        free = None if self._host_free is None else self._host_free + now
        rest = best_rest(
            below,
            gpu_wanted=gpu_wanted,
            host_bytes_free=free,
            up_s_max=PATIENCE_S[claim.work_class],
        )
        self._host_free = None if free is None else free - rest.host_bytes
        self._used.add(holder.replica_id)
        cut = gpu_wanted and claim.work_class == "offline" and holder.in_flight > 0
        self.lows.append(Lower(claim.pool, holder.replica_id, rest.rung, reason, cut))


def _yields(holder: Holder) -> tuple[float | str, ...]:
    return (*holder.yields, holder.replica_id)


def _devices(pairs: Iterable[tuple[Claim, Holder]]) -> set[str]:
    return {device for _, holder in pairs for device in holder.devices}


def _holder(claim: Claim, way: WayUp) -> Holder | None:
    return next((h for h in claim.holders if h.replica_id == way.replica_id), None)


def _terms(claim: Claim, shares: Shares) -> dict[str, float]:
    return {
        "desired": claim.desired,
        "min": claim.min,
        "wants": claim.wants,
        "serving": len(claim.serving),
        "share": shares.replicas[claim.pool],
        "queued": claim.queued,
        "unserved_s": claim.unserved_s,
        "turn_s": turn_s(claim),
    }
