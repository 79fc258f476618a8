"""One pool as the control law, the arbiter and the proxies are told of it.

Pure: from the pool's specification, its members, its portion of the model's demand and what the
rungs cost follow the law's observation, the arbiter's claim and the record in the fleet.

What other regions ask of this one, and what they offer, goes to the last scaled pool: the one that
takes what the others cannot.

A model may have several pools, and its demand is counted by model. It is poured into them in order:
first what the pools of a fixed size are meant to carry, then the scaled ones as the configuration
names them, each up to what its most replicas are meant to carry; the last takes the rest. So a pool
that is scaled grows by what the fixed ones cannot take, and shrinks first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from backends.claims import Claim
from backends.ladder import Ladder, Resting, Rung, Rungs
from backends.members import Member, Standing
from backends.observation import Observation, ScalingPolicy
from backends.spec import PoolSpec
from proxy.contract import PoolRecord
from proxy.contract.demand import DEMAND_INTERVAL_S, Elsewhere, ModelDemand

HANDED_S = 2 * DEMAND_INTERVAL_S  # from now on reports tell of what a new replica has been given


class Portion(msgspec.Struct, frozen=True):
    """What of a model's demand is one pool's. Counters only grow."""

    in_flight: int = 0
    queued: int = 0
    queued_s: float = 0.0
    queued_tokens: int = 0
    in_flight_tokens: int = 0
    arrivals: float = 0.0
    refused: float = 0.0
    wanted: float = 0.0  # requests in flight of other regions, that this pool is to serve
    elsewhere: Mapping[str, Elsewhere] = {}  # by region: what it could do for this pool's requests


def handed(portion: Portion) -> Portion:
    """Return a portion of which nothing waits: a replica has just come up and takes it.

    The reports that say what waits are from before it did, and what waits although there is one
    more is asked for once more.
    """
    return msgspec.structs.replace(
        portion,
        in_flight=portion.in_flight + portion.queued,
        queued=0,
        in_flight_tokens=portion.in_flight_tokens + portion.queued_tokens,
        queued_tokens=0,
    )


class Vessel(msgspec.Struct, frozen=True):
    """A pool that demand is poured into."""

    pool_id: str
    carries: float  # requests that it is meant to carry at most
    scaled: bool


def pour(
    demand: ModelDemand,
    last: ModelDemand,
    vessels: Sequence[Vessel],
    before: Mapping[str, Portion],
) -> dict[str, Portion]:
    """Return each pool's portion; `last` and `before` are the demand and portions poured last."""
    total = demand.in_flight + demand.queued
    left = float(total)
    order = sorted(vessels, key=lambda vessel: vessel.scaled)  # stable: as they were configured
    arrivals = demand.arrivals_total - last.arrivals_total
    refused = demand.refused_total - last.refused_total
    portions = {}
    for vessel in order:
        taken = left if vessel is order[-1] else min(left, vessel.carries)
        left -= taken
        share = taken / total if total else float(vessel is order[0])
        known = before.get(vessel.pool_id, Portion())
        portions[vessel.pool_id] = Portion(
            in_flight=round(share * demand.in_flight),
            queued=round(share * demand.queued),
            queued_s=demand.queued_s if taken else 0.0,
            queued_tokens=round(share * demand.queued_tokens),
            in_flight_tokens=round(share * demand.in_flight_tokens),
            arrivals=known.arrivals + share * max(0, arrivals),
            refused=known.refused + share * max(0, refused),
        )
    return portions


def policy_of(pool: PoolSpec) -> ScalingPolicy | None:
    """Return the law's settings for a pool; None: it is not scaled, or not by requests."""
    scale, spec = pool.autoscale, pool.first
    if scale is None or pool.serves == "jobs":
        return None
    return ScalingPolicy(
        min=scale.min,
        max=scale.max,
        buffer=scale.buffer,
        target_inputs=float(target_inputs(pool)),
        target_tokens=spec.target_tokens,
        max_inputs=spec.max_inputs,
        kv_target=scale.kv_target,
        stable_window_s=scale.stable_window_secs,
        panic_window_s=scale.panic_window_secs,
        panic_threshold=scale.panic_threshold,
        scaledown_window_s=scale.scaledown_window_secs,
    )


def target_inputs(pool: PoolSpec) -> int:
    """Return how many requests a replica is meant to have; 0: nobody has said."""
    return pool.first.target_inputs or pool.first.max_inputs


class View(msgspec.Struct, frozen=True, kw_only=True):
    """A pool and everything that is known of it at one moment."""

    pool: PoolSpec
    members: tuple[Member, ...]
    portion: Portion
    gpus_each: int
    rungs: Rungs
    presses: bool = False  # its jobs are due so soon that they wait behind no offline work

    def standing(self, *standings: Standing) -> tuple[Member, ...]:
        return tuple(member for member in self.members if member.standing in standings)

    @property
    def names(self) -> frozenset[str]:
        """The models that it answers to: those configured, and what its engines list."""
        listed = (member.names for member in self.members)
        return frozenset({self.pool.first.model, *self.pool.first.adapters}).union(*listed)

    @property
    def have(self) -> int:
        """Replicas that serve or will without anybody doing more."""
        return len(self.standing(Standing.SERVES, Standing.COMING))

    @property
    def idle(self) -> bool:
        """Whether it is scaled, and nobody asks anything of it now."""
        asked = self.portion.in_flight + self.portion.queued
        busy = any(member.in_flight for member in self.members)
        return self.pool.autoscale is not None and not asked and not busy

    @property
    def resting(self) -> tuple[Resting, ...]:
        rests = self.standing(Standing.RESTS)
        return tuple(Resting(member.replica_id, member.rung) for member in rests)

    def up_s(self, ladder: Ladder, now_s: float) -> float:
        """Return what bringing up one more would take."""
        return ladder.ways_up(self.rungs, self.resting, now_s)[0].up_s

    def coming_in_s(self, ladder: Ladder, *, hopeful: bool = False) -> tuple[float, ...]:
        """Return for each that comes in how many seconds it should serve, the soonest first.

        `hopeful`: without those whose starts have failed so far, for which nobody should be held.
        """
        left = []
        for member in self.standing(Standing.COMING):
            if hopeful and member.failing:
                continue
            imaged = member.came_from is Rung.COLD and self.rungs.imaged
            rung = Rung.SNAPSHOTTED if imaged else member.came_from
            cost = ladder.cost(member.launch_hash, rung, self.rungs.engine)
            left.append(max(0.0, cost.up_s - member.for_s))
        return tuple(sorted(left))

    def startable(self, cards_free: int | None, limit: int | None) -> int:
        """Return how many more replicas could be started now, and nobody else's taken for them.

        None where the last ones failed: what is promised to other regions must come.
        """
        scale = self.pool.autoscale
        if scale is None or any(member.failing for member in self.members):
            return 0
        more = min(scale.max, scale.max if limit is None else limit) - self.have
        if cards_free is not None and self.gpus_each:
            resting = sum(rest.rung.holds_gpus for rest in self.resting)
            more = min(more, resting + cards_free // self.gpus_each)
        return max(0, more)

    def observation(
        self, ladder: Ladder, now_s: float, gpu_limit: int | None, *, blocked: bool = False
    ) -> Observation:
        """Return what the control law is told."""
        serving = self.standing(Standing.SERVES)
        loads = [member.load for member in serving if member.load is not None]
        portion = self.portion
        if any(member.for_s < HANDED_S for member in serving):
            portion = handed(portion)
        return Observation(
            at_s=now_s,
            in_flight=portion.in_flight,
            queued=portion.queued,
            queued_tokens=portion.queued_tokens,
            in_flight_tokens=portion.in_flight_tokens,
            arrivals_total=int(portion.arrivals),
            refused_total=int(portion.refused),
            blocked=blocked,
            wanted=portion.wanted,
            elsewhere=dict(portion.elsewhere),
            kv_used_ratio=sum(load.kv_used_ratio for load in loads) / max(1, len(loads)),
            preemptions_total=sum(member.preemptions for member in self.members),
            ready=len(serving),
            coming_in_s=self.coming_in_s(ladder),
            start_s=self.up_s(ladder, now_s),
            gpu_limit=gpu_limit,
        )

    def claim(self, ladder: Ladder, now_s: float, desired: int) -> Claim:
        """Return what the arbiter is told: this pool wants `desired` replicas that serve.

        What an operator holds is there and serves nobody, so as many more are wanted; of a pool of
        a fixed size what an operator has put to rest is not.
        """
        scale = self.pool.autoscale
        rests = ladder.rests(self.rungs, now_s)
        holders = []
        for member in self.members:
            if member.standing is Standing.GONE:
                continue
            below = tuple(rest for rest in rests if rest.rung.depth > member.rung.depth)
            holder = member.holder(below)
            resting = member.standing is Standing.RESTS
            if scale is None and resting:
                holder = msgspec.structs.replace(holder, kept=True)
            if holder.rung is Rung.SUSPENDED:  # its cards are lent, if they are not free yet
                holder = msgspec.structs.replace(holder, devices=())
            holders.append(holder)
        held = len(self.standing(Standing.HELD))
        desired -= len(self.resting) if scale is None else 0
        least = desired if scale is None else min(scale.min, desired)
        return Claim(
            pool=self.pool.pool_id,
            model=self.pool.first.model,
            work_class="semi-online" if self.presses else self.pool.first.work_class,
            gpus_each=self.gpus_each,
            weight=self.pool.first.weight,
            desired=desired + held,
            min=least + held,
            holders=tuple(holders),
            queued=self.portion.queued,
            queued_tokens=self.portion.queued_tokens,
            queued_s=self.portion.queued_s,
            ways_up=ladder.ways_up(self.rungs, () if scale is None else self.resting, now_s),
        )

    def record(self, ladder: Ladder, now_s: float, startable: int = 0) -> PoolRecord:
        """Return what the proxies are told, under the model's own name."""
        coming = self.coming_in_s(ladder, hopeful=True)
        scale = self.pool.autoscale
        return PoolRecord(
            model=self.pool.first.model,
            pool=self.pool.first.pool,
            work_class=self.pool.first.work_class,
            wakes=scale is not None,
            awake=len(self.standing(Standing.SERVES)),
            coming=len(coming),
            ready_in_s=round(coming[0], 1) if coming else 0.0,
            start_s=round(self.up_s(ladder, now_s), 1),
            max_tokens=self.pool.first.max_tokens,
            carries=float(target_inputs(self.pool)),
            startable=startable,
        )
