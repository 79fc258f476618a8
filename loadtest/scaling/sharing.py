"""Pools of many models on one set of cards, in virtual time: the project's law and arbiter decide.

A replica here has a rung: it is brought up from where it rests in the seconds that the ladder gives
for that, has to finish what it has before it goes down (offline work is cut, and asked again), and
keeps its card until it is on a rung that gives it up. The costs are the ladder's own for vLLM and
the 8 B shape, as measured on an H200, and so are the speeds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Final

import msgspec
from typing_extensions import override

from backends.arbiter import Unserved, arbitrate, replicas_possible
from backends.claims import Claim, Holder, Lower, Move, Raise, Room, Transit, Verdict
from backends.gpus import Gpu
from backends.ladder import Ladder, Rest, Resting, Rung, RungCost, Rungs
from backends.observation import Observation, ScalingPolicy
from backends.planning.goal import WorkClass
from backends.scaling import Scaler
from loadtest.scaling.replicas import Job, Replica, Speeds
from loadtest.scaling.world import Pool, Seen, World

# vLLM 0.26.0, Qwen3-8B's shape in 16 bits on one H200: 2,048 tokens of prompt in 56.5 ms; steps of
# 5.2 ms alone and 5.7 ms with 32 beside; a cache of 336,064 tokens at 0.45 of the card.
SPEEDS: Final = Speeds(
    prefill_s_per_token=56.5e-3 / 2048,
    step_s=5.2e-3,
    step_s_per_sequence=0.5e-3 / 31,
    kv_tokens=336_064,
)
TARGET_INPUTS: Final = 8.4  # as in the other cells of this lab
MAX_INPUTS: Final = 12
TICK_S: Final = 1.0
HOST_BYTES: Final = 2 * 10**12  # of the machine's memory, for those that rest
RESTS: Final = frozenset({Rung.ASLEEP, Rung.SUSPENDED})

Arbiter = Callable[[Sequence[Claim], Room], Verdict]


class Unit:
    """A replica as the manager knows it; `engine` is there while it serves."""

    __slots__ = (
        "devices",
        "engine",
        "idle_since_s",
        "name",
        "ready_s",
        "rung",
        "transit",
        "up_at_s",
    )

    def __init__(self, name: str, rung: Rung) -> None:
        self.name = name
        self.rung = rung
        self.transit = Transit.NONE
        self.devices: tuple[str, ...] = ()
        self.engine: Replica | None = None
        self.ready_s = math.inf  # when it comes
        self.up_at_s = math.inf
        self.idle_since_s = 0.0


class Sharer(Pool):
    """A pool whose replicas come and go by the arbiter's moves."""

    def __init__(
        self,
        world: World,
        name: str,
        work_class: WorkClass,
        ladder: Ladder,
        *,
        allowed: frozenset[Rung] = RESTS,
        replicas_max: int = 0,
    ) -> None:
        super().__init__(world, start_s=0.0, max_inputs=MAX_INPUTS, speeds=SPEEDS)
        self.name = name
        self.replicas_max = replicas_max
        self.work_class = work_class
        self.units: dict[str, Unit] = {}
        self.cut_total = 0
        self.wanted_s = 0.0  # replica-seconds
        self.had_s = 0.0  # of these
        self.pushed: Callable[[float], None] = lambda now_s: None
        self._ladder = ladder
        self._rungs = Rungs(launch_hash=name, engine="vllm", allowed=allowed)
        self._downs: dict[int, tuple[Unit, float]] = {}  # by the engine that has to finish first

    # --- what the law and the arbiter see ---------------------------------------------------------

    def claim(self, desired: int, unserved_s: float, now_s: float) -> Claim:
        resting = [
            Resting(unit.name, unit.rung)
            for unit in self.units.values()
            if unit.rung is not Rung.AWAKE and unit.transit is Transit.NONE
        ]
        rests = self._ladder.rests(self._rungs, now_s)
        return Claim(
            pool=self.name,
            work_class=self.work_class,
            desired=desired,
            queued=len(self.queue),
            queued_tokens=self.queued_tokens,
            unserved_s=unserved_s,
            holders=tuple(self._holder(unit, rests, now_s) for unit in self.units.values()),
            ways_up=self._ladder.ways_up(self._rungs, resting, now_s),
        )

    def observed(self, seen: Seen, gpu_limit: int | None, up_s: float) -> Observation:
        return Observation(
            at_s=seen.at_s,
            in_flight=seen.in_flight,
            queued=seen.queued,
            queued_tokens=seen.queued_tokens,
            in_flight_tokens=seen.in_flight_tokens,
            arrivals_total=seen.arrivals_total,
            refused_total=seen.refused_total,
            kv_used_ratio=seen.kv_used_ratio,
            ready=seen.ready,
            coming_in_s=seen.coming_in_s,
            start_s=up_s,
            gpu_limit=gpu_limit,
        )

    def cost(self, rung: Rung) -> RungCost:
        return self._ladder.cost(self.name, rung, "vllm")

    def _holder(self, unit: Unit, rests: tuple[Rest, ...], now_s: float) -> Holder:
        back_s = next((r.up_s for r in rests if not r.rung.holds_gpus), 0.0)
        in_flight = unit.engine.in_flight if unit.engine else 0
        if in_flight:
            unit.idle_since_s = now_s
        return Holder(
            replica_id=unit.name,
            rung=unit.rung,
            transit=unit.transit,
            devices=unit.devices,
            from_nothing=not unit.rung.has_process,
            in_flight=in_flight,
            idle_s=now_s - unit.idle_since_s,
            up_for_s=max(0.0, now_s - unit.up_at_s),
            start_s=back_s,
            come_back_s=back_s,
            rests=rests,
        )

    # --- what becomes of a move -------------------------------------------------------------------

    def suspend_all(self) -> None:
        """Let as many as there may be be suspended at the beginning: they were up before."""
        for _ in range(self.replicas_max):
            self._new(Rung.SUSPENDED)

    def _new(self, rung: Rung) -> Unit:
        self._names += 1
        unit = self.units[f"{self.name}-{self._names}"] = Unit(f"{self.name}-{self._names}", rung)
        return unit

    def bring(self, move: Raise, now_s: float) -> None:
        unit = self.units[move.replica_id] if move.replica_id else self._new(move.rung)
        unit.devices = unit.devices or move.devices
        unit.transit = Transit.COMING
        unit.ready_s = now_s + self.cost(unit.rung).up_s
        self.coming = sorted([*self.coming, unit.ready_s])
        self.world.at(unit.ready_s, lambda at_s: self._up(unit, at_s))

    def _up(self, unit: Unit, now_s: float) -> None:
        if unit.transit is not Transit.COMING:
            return  # was broken off
        self.coming.remove(unit.ready_s)
        unit.rung, unit.transit, unit.up_at_s = Rung.AWAKE, Transit.NONE, now_s
        unit.idle_since_s = now_s
        self._names += 1
        unit.engine = Replica(self._names, self.speeds)
        self.ready.append(unit.engine)
        self.serve(now_s)

    def lower(self, move: Lower, now_s: float) -> None:
        unit = self.units[move.replica_id]
        down_s = self.cost(move.rung).down_s
        if unit.transit is Transit.COMING:
            self.coming.remove(unit.ready_s)
        unit.rung, unit.transit = move.rung, Transit.GOING
        engine, unit.engine = unit.engine, None
        if engine is None:
            self._down_in(unit, down_s, now_s)
            return
        self.ready.remove(engine)
        if move.cut or not engine.in_flight:
            self.cut_total += engine.in_flight
            engine.version += 1  # nothing more happens on it
            self._down_in(unit, down_s, now_s)
        else:
            self.leaving.append(engine)
            self._downs[engine.name] = (unit, down_s)

    @override
    def turn(self, replica: Replica, now_s: float) -> None:
        super().turn(replica, now_s)
        if replica.name in self._downs and not replica.in_flight:
            unit, down_s = self._downs.pop(replica.name)
            self._down_in(unit, down_s, now_s)

    def _down_in(self, unit: Unit, down_s: float, now_s: float) -> None:
        self.world.at(now_s + down_s, lambda at_s: self._down(unit))

    def _down(self, unit: Unit) -> None:
        unit.transit = Transit.NONE
        if not unit.rung.holds_gpus:
            unit.devices = ()
        if not unit.rung.has_process:
            del self.units[unit.name]

    @override
    def arrive(self, job: Job, now_s: float) -> None:
        super().arrive(job, now_s)
        if len(self.queue) == 1 and not self.size:  # those after it need not say so again
            self.pushed(now_s)


class Backlog(Sharer):
    """Offline work: there is always more of it, and it takes what nobody else wants."""

    def __init__(
        self, world: World, name: str, ladder: Ladder, sizes: tuple[int, int], until_s: float
    ) -> None:
        super().__init__(world, name, "offline", ladder)
        self.taken_total = 0
        self._sizes = sizes
        self._until_s = until_s

    @override
    def serve(self, now_s: float) -> None:
        for engine in self.ready:
            while engine.in_flight < self.max_inputs and now_s < self._until_s:
                engine.take(Job(now_s, *self._sizes), now_s)
                self.taken_total += 1
            self.world.watch(self, engine)

    @property
    def done_total(self) -> int:
        flying = sum(engine.in_flight for engine in (*self.ready, *self.leaving))
        return self.taken_total - self.cut_total - flying


class Sharing:
    """One machine: its cards, its pools, and who decides about them."""

    def __init__(
        self, world: World, pools: Sequence[Sharer], cards: int, arbiter: Arbiter = arbitrate
    ) -> None:
        self.world = world
        self.pools = {pool.name: pool for pool in pools}
        self.gpus = tuple(Gpu(device=str(number), name="card") for number in range(cards))
        self.moves = {"raise": 0, "lower": 0}
        self.awake_s = 0.0  # card-seconds that replicas serve in
        self.awake_max = 0
        self.unserved_max_s = dict.fromkeys(self.pools, 0.0)
        self.offline_taken = 0  # offline replicas that gave way
        self._arbiter = arbiter
        self._unserved = Unserved()
        self._desired = dict.fromkeys(self.pools, 0)
        self._claims: list[Claim] = []
        self._scalers = {
            pool.name: Scaler(
                ScalingPolicy(
                    max=pool.replicas_max, target_inputs=TARGET_INPUTS, max_inputs=MAX_INPUTS
                )
            )
            for pool in pools
            if not isinstance(pool, Backlog)
        }
        for pool in pools:
            pool.pushed = self.decide

    def govern(self, until_s: float) -> None:
        def tick(now_s: float) -> None:
            self._account()
            self.decide(now_s)
            if now_s < until_s:
                self.world.at(now_s + TICK_S, tick)

        self.world.at(0.0, tick)

    def decide(self, now_s: float) -> None:
        room = self.room()
        for pool in self.pools.values():
            self._desired[pool.name] = self._wish(pool, room, now_s)
        none = [p.name for p in self.pools.values() if self._desired[p.name] and not p.ready]
        waits_s = self._unserved.note(none, now_s)
        for name, waited_s in waits_s.items():
            self.unserved_max_s[name] = max(self.unserved_max_s[name], waited_s)
        self._claims = [
            pool.claim(self._desired[pool.name], waits_s.get(pool.name, 0.0), now_s)
            for pool in self.pools.values()
        ]
        for move in self._arbiter(self._claims, room).moves:
            self._perform(move, now_s)

    def room(self) -> Room:
        units = [unit for pool in self.pools.values() for unit in pool.units.values()]
        held = {device for unit in units for device in unit.devices}
        resting = sum(
            pool.cost(unit.rung).host_bytes
            for pool in self.pools.values()
            for unit in pool.units.values()
            if unit.transit is not Transit.COMING
        )
        return Room(
            gpus=self.gpus,
            free=frozenset(gpu.device for gpu in self.gpus if gpu.device not in held),
            host_bytes_free=HOST_BYTES - resting,
        )

    def _wish(self, pool: Sharer, room: Room, now_s: float) -> int:
        scaler = self._scalers.get(pool.name)
        if scaler is None:
            return len(self.gpus)
        pool.serve(now_s)
        claim = pool.claim(0, 0.0, now_s)
        limit = replicas_possible(claim, self._claims, room)
        seen = Seen(now_s, pool)
        return scaler.decide(pool.observed(seen, limit, claim.ways_up[0].up_s)).desired

    def _perform(self, move: Move, now_s: float) -> None:
        pool = self.pools[move.pool]
        if isinstance(move, Raise):
            self.moves["raise"] += 1
            pool.bring(move, now_s)
        elif isinstance(move, Lower):
            self.moves["lower"] += 1
            self.offline_taken += pool.work_class == "offline"
            pool.lower(move, now_s)

    def _account(self) -> None:
        awake = sum(len(pool.ready) + len(pool.leaving) for pool in self.pools.values())
        self.awake_s += TICK_S * awake
        self.awake_max = max(self.awake_max, awake)
        for pool in self.pools.values():
            wanted = self._desired[pool.name]
            pool.wanted_s += TICK_S * wanted
            pool.had_s += TICK_S * min(wanted, len(pool.ready))


def first_come(claims: Sequence[Claim], room: Room) -> Verdict:
    """Decide as a plain queue for cards would: nobody gives up what it still wants."""
    return arbitrate([_held_on_to(claim) for claim in claims], room)


def _held_on_to(claim: Claim) -> Claim:
    spare = len(claim.serving) - claim.wants
    holders = []
    for holder in sorted(claim.holders, key=lambda one: one.yields):
        gives = spare > 0 and holder.serves
        spare -= gives
        kept = holder.serves and not gives
        holders.append(msgspec.structs.replace(holder, kept=kept))
    return msgspec.structs.replace(claim, holders=tuple(holders), work_class="online")
