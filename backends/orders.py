"""What is to be done with the replicas of scaled pools at one moment, from the arbiter's verdict.

Replicas are named here: a new one gets the lowest number that is free. Those of pools of a fixed
size come and go by themselves, so that nothing is ordered for them; they count where cards are
short, and that is all.

**Called back.** A replica on its way out still has its cards, its weights and its cache. When its
pool needs one more before it has ended, and it was let go only because it was not needed, it stays:
nothing comes up sooner.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import msgspec

from backends.claims import Lower, Raise, Verdict, Wait
from backends.ladder import Rung
from backends.members import Member, Standing
from backends.pools import View
from backends.scaled_pool import ScaledPool
from backends.spec import PoolSpec

DOWN = frozenset({Rung.ASLEEP, Rung.SUSPENDED})  # on these there is a process to be kept


class Orders:
    """Replicas and the rungs that they are wanted on; None: not at all."""

    def __init__(
        self,
        pools: Mapping[str, ScaledPool],
        views: Mapping[str, View],
        replica_ids: Collection[str],
        now_s: float,
    ) -> None:
        self.by_replica: dict[str, Rung | None] = {}
        self.words: dict[str, list[str]] = {}  # what is done, by pool
        self.waiting: dict[str, str] = {}  # why something is not, by pool
        self.cut: list[str] = []  # whose requests are not waited for
        self._pools = pools
        self._views = dict(views)
        self._taken = set(replica_ids)
        self._now_s = now_s

    def recall(self, shed: Collection[str]) -> dict[str, View]:
        """Keep those of `shed` whose pools need them after all; return the views with them."""
        for pool_id, view in self._views.items():
            lacking = self._pools[pool_id].desired - view.have
            found = [m for m in view.members if m.recallable and m.replica_id in shed]
            found.sort(key=lambda member: -member.heat)
            stay = {member.replica_id for member in found[: max(0, lacking)]}
            for replica_id in sorted(stay):
                self.by_replica[replica_id] = Rung.AWAKE
                self._say(pool_id, f"{replica_id} stays after all")
            members = tuple(_serving(m) if m.replica_id in stay else m for m in view.members)
            self._views[pool_id] = msgspec.structs.replace(view, members=members)
        return self._views

    def take(self, verdict: Verdict) -> set[str]:
        """Order what follows from `verdict`; return who goes only because nobody needs it."""
        self.waiting = {refusal.pool: refusal.reason for refusal in verdict.refused}
        wanted = any(isinstance(move, Wait) for move in verdict.moves) or bool(verdict.refused)
        shed = set()
        for move in verdict.moves:
            match move:
                case Wait(pool, reason):
                    self.waiting[pool] = reason
                case Lower():
                    self._lower(move)
                    shed |= set() if wanted else {move.replica_id}
                case Raise():
                    self._raise(move)
        for pool_id in self._pools:
            for replica_id in self._needless(pool_id):
                self.by_replica[replica_id] = None
                self._say(pool_id, f"{replica_id} ends: others serve in its place")
        return shed

    def _lower(self, move: Lower) -> None:
        pool = self._pools.get(move.pool)
        if pool is None or not pool.scaled:
            return
        self.by_replica[move.replica_id] = move.rung if move.rung in DOWN else None
        if move.cut:
            self.cut.append(move.replica_id)
        self._say(move.pool, f"{move.replica_id} to {move.rung}: {move.reason}")

    def _raise(self, move: Raise) -> None:
        pool = self._pools.get(move.pool)
        if pool is None or not pool.scaled:
            return
        if move.replica_id is None and self._now_s < pool.crowded_until_s:
            return
        replica_id = move.replica_id or self._fresh(pool.pool)
        self.by_replica[replica_id] = Rung.AWAKE
        self._say(move.pool, f"{replica_id} up, from {move.rung}")

    def _needless(self, pool_id: str) -> list[str]:
        """Return replicas at rest that could never serve beside those that do, the deepest first.

        A new start may be quicker than waking one, so that those at rest would pile up.
        """
        view, scale = self._views[pool_id], self._pools[pool_id].pool.autoscale
        if scale is None:
            return []
        rests = [m for m in view.standing(Standing.RESTS) if m.replica_id not in self.by_replica]
        serving = {m.replica_id for m in view.standing(Standing.SERVES, Standing.COMING)}
        coming = {
            name
            for name, rung in self.by_replica.items()
            if rung is Rung.AWAKE and view.pool.number_of(name) is not None
        }
        excess = len(serving | coming) + len(rests) - scale.max
        rests.sort(key=lambda member: (-member.rung.depth, -member.for_s))
        return [member.replica_id for member in rests[: max(0, excess)]]

    def _fresh(self, pool: PoolSpec) -> str:
        """Return the name of a new replica: with the lowest number that is free."""
        taken = self._taken | self.by_replica.keys()
        number = 0
        while (name := f"{pool.pool_id}-{number}") in taken:
            number += 1
        return name

    def _say(self, pool_id: str, what: str) -> None:
        self.words.setdefault(pool_id, []).append(what)


def _serving(member: Member) -> Member:
    return msgspec.structs.replace(member, standing=Standing.SERVES, rung=Rung.AWAKE, for_s=0.0)
