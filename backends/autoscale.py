"""Scales the pools of a manager: looks, asks the law and the arbiter, and says what is to be.

Once a second, and at once when a request waits for a model that nobody serves or will serve. Each
look is at the whole: members from their keepers, demand from the proxies' newest reports, cards
from their leases. Nothing is kept but what only time tells (`members`) and what the rungs have cost
(`ladder`), so after a crash the same follows from what is adopted and what the proxies report.

What is to be done is done through `reconcile`, by the replicas that are wanted and the rungs that
they are wanted on. Between two looks these follow from where the members stand (`members`), so that
what an operator does meanwhile is not undone, and what failed is not asked for without end.

A pool that this manager has only begun to look at loses no replica within its `scaledown_window`:
what it would need is not known yet, and a manager that came back must not send home those who work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import msgspec

from backends.arbiter import Unserved, arbitrate, replicas_possible
from backends.card_room import free_cards, room_of
from backends.claims import RANKS, Claim, Verdict, Wait
from backends.clock import Timer
from backends.demand import DemandBook
from backends.engines.base import Engine, launch_hash
from backends.gpus import pinned
from backends.images import image_of, pool_id_of
from backends.job_rates import Expectation
from backends.job_scaling import JobPool, JobScaling
from backends.keeper import Keeper
from backends.ladder import Ladder, Rung
from backends.lifecycle import Event, Lifecycle, Phase
from backends.members import Look, Member, Memory, Standing
from backends.offline.work import JobNeeds
from backends.orders import Orders
from backends.pools import Portion, View
from backends.portions import Portions
from backends.reconcile import Wanted
from backends.rungs_here import RungsHere, host_bytes_free
from backends.scaled_pool import ScaledPool, records_of
from backends.scaling_metrics import Tally
from backends.scaling_report import GpuReport, ScalingReport
from backends.spec import PoolSpec, pool_specs
from backends.starting import gpus_leased, gpus_wanted
from backends.surroundings import Surroundings
from proxy.config import Config
from proxy.contract import PoolRecord
from proxy.contract.demand import Demand

TICK_S = 1.0
TICK_SHORT_S = 0.1  # while somebody waits for cards that are being given back
CROWDED_S = 5.0  # a pool whose new replica found no card after all asks again


class RefusedScaleError(Exception):
    """A pool's size cannot be set; the text says why."""


class Autoscaler:
    """The pools of one manager."""

    def __init__(
        self,
        around: Surroundings,
        engines: Mapping[str, Engine],
        keepers: Mapping[str, Keeper],
        book: DemandBook,
        perform: Callable[[], None],
    ) -> None:
        """`perform` has the manager make so what `wanted` says."""
        self.ladder = Ladder()
        self.tally = Tally()
        self.book = book
        self.pools: dict[str, ScaledPool] = {}
        self._around = around
        self._engines = engines
        self._keepers = keepers
        self._perform = perform
        self._here = RungsHere(around, engines)
        self._hashes: dict[str, str] = {}
        self._gpus_each: dict[str, int] = {}
        self._memory = Memory()
        self._unserved = Unserved()
        self._views: dict[str, View] = {}
        self._states: dict[str, Lifecycle] = {}  # of the last look
        self._portions = Portions(book)
        self.jobs = JobScaling(around.clock.now_s(), Expectation(around.cards))
        self._orders: dict[str, Rung | None] = {}  # by replica, of this moment only
        self._shed: set[str] = set()  # taken down because they were not needed, and nobody's gain
        self._released: set[str] = set()  # of pools that are not scaled any more: to be woken
        self._told_out: dict[str, frozenset[Rung]] = {}
        self._timer: Timer | None = None
        self._open = False

    # --- what the manager says ------------------------------------------------------------------

    def want(self, config: Config) -> None:
        """Scale the pools of `config` from now on, and no others."""
        now_s = self._around.clock.now_s()
        pools: dict[str, ScaledPool] = {}
        for spec in pool_specs(config):
            known = self.pools.get(spec.pool_id)
            if known is None:
                known = ScaledPool(spec, now_s)
            else:
                if known.scaled and spec.autoscale is None:
                    self._released |= self._resting(spec.pool_id)
                known.replace(spec, now_s)
            pools[spec.pool_id] = known
            engine = self._engines[spec.first.engine]
            self._learn_of_images(spec, engine)
            self._hashes[spec.pool_id] = launch_hash(engine, spec.first)
            self._gpus_each[spec.pool_id] = self._gpus_of(spec, engine)
        for gone in self.pools.keys() - pools.keys():
            del self._hashes[gone], self._gpus_each[gone]
        self._around.shelf.keep(pools)
        self.jobs.budget_per_hour = config.offline.price_per_hour_max
        self.jobs.spare = config.offline.spare_capacity
        self.pools = pools
        self._views = {}

    def begin(self) -> None:
        """Look now, and again and again until `close`."""
        self._open = True
        self.tick()

    def close(self) -> None:
        """Want nothing any more."""
        self._open = False
        if self._timer is not None:
            self._timer.cancel()

    def take(self, demand: Demand) -> None:
        """Note what a proxy reports; look at once if somebody waits for whom nobody comes."""
        if not self.book.take(demand, self._around.clock.now_s()) or not self._open:
            return
        waiting = {model for model, told in demand.models.items() if told.queued} | {*demand.wanted}
        for pool_id, view in self._views.items():
            asked = waiting & view.names and view.pool.serves == "requests"
            if asked and self.pools[pool_id].scaled and not view.have:
                self.tick()
                return

    def take_needs(self, needs: JobNeeds) -> None:
        """Note what a service of jobs has left to do."""
        self.jobs.book.take(needs, self._around.clock.now_s())

    def set_replicas(self, pool_id: str, replicas: int) -> None:
        """Set the size of a pool that is not scaled, until the configuration is read again.

        Raises `RefusedScaleError`, or KeyError where there is no such pool.
        """
        pool = self.pools[pool_id]
        if pool.scaled:
            raise RefusedScaleError(
                f"pool {pool_id} is scaled by demand; change min and max of its autoscale and "
                "send the manager SIGHUP, or take autoscale out of it"
            )
        pool.fixed = pool.desired = replicas
        self._around.log.tell("pool_sized", pool=pool_id, replicas=replicas)
        self._perform()

    # --- what is to be --------------------------------------------------------------------------

    def wanted(self) -> tuple[Wanted, ...]:
        """Return the replicas that are to be, and on which rungs: as they are, but for orders."""
        if not self._open:
            return ()
        self._look_again()
        wanted: list[Wanted] = []
        for pool_id, pool in self.pools.items():
            wanted += self._of_scaled(pool_id) if pool.scaled else self._of_fixed(pool_id)
        return tuple(wanted)

    def _of_fixed(self, pool_id: str) -> list[Wanted]:
        pool, told = self.pools[pool_id], self._hashes[pool_id]
        specs = [pool.pool.replica(number) for number in range(pool.fixed or 0)]
        return [
            Wanted(spec, told, Rung.AWAKE if spec.replica_id in self._released else None)
            for spec in specs
        ]

    def _of_scaled(self, pool_id: str) -> list[Wanted]:
        pool, told = self.pools[pool_id].pool, self._hashes[pool_id]
        rungs = {member.replica_id: member.keep_on for member in self._views[pool_id].members}
        rungs |= {name: rung for name, rung in self._orders.items() if self._is_of(name, pool_id)}
        numbered = ((pool.number_of(name), rung) for name, rung in rungs.items())
        wanted = sorted((n, rung) for n, rung in numbered if n is not None and rung is not None)
        return [Wanted(pool.replica(number), told, rung) for number, rung in wanted]

    def meant(self, replica_id: str) -> Wanted | None:
        """Return what a replica of this name is, if a pool has it; of a fixed one, has it now."""
        for pool_id, pool in self.pools.items():
            number = pool.pool.number_of(replica_id)
            if number is not None and (pool.scaled or number < (pool.fixed or 0)):
                return Wanted(pool.pool.replica(number), self._hashes[pool_id])
        return None

    def records(self) -> tuple[PoolRecord, ...]:
        """Return what the proxies are told, for each name that a pool answers to."""
        leases = self._around.cards.leases
        free = len(free_cards(leases)) if leases is not None else None
        return records_of(self.pools, self._views, self.ladder, self._around.clock.now_s(), free)

    def report(self) -> ScalingReport:
        leases = self._around.cards.leases
        self._look_again()
        gpus = GpuReport()
        if leases is not None:
            total = len(leases.inventory.gpus)
            gpus = GpuReport(total, len(free_cards(leases)), dict(leases.holders))
        return ScalingReport(
            at_s=self._around.clock.unix_s(),
            proxies=self.book.proxies,
            pools=tuple(p.report(self._views[name]) for name, p in self.pools.items()),
            gpus=gpus,
        )

    # --- one look -------------------------------------------------------------------------------

    def tick(self) -> None:
        """Decide, and have it done; the next look comes whatever becomes of this one."""
        if not self._open:
            return
        delay_s = TICK_S
        try:
            delay_s = TICK_SHORT_S if self._turn(self._around.clock.now_s()) else TICK_S
        finally:
            if self._timer is not None:
                self._timer.cancel()
            self._timer = self._around.clock.call_later(delay_s, self.tick)

    def _turn(self, now_s: float) -> bool:
        """Look, decide, act; say whether somebody waits for cards that are being given back."""
        self.book.expire(now_s)
        self._look(now_s)
        self._pour()
        self._decide(now_s)
        orders = Orders(self.pools, self._views, self._keepers, now_s)
        self._views = orders.recall(self._shed)
        verdict = self._judge(now_s)
        self._shed = (self._shed & self._keepers.keys()) | orders.take(verdict)
        refused = {refusal.pool for refusal in verdict.refused}
        for pool_id, pool in self.pools.items():
            pool.refused = pool_id in refused
            self._tell(pool, orders.words.get(pool_id, ()), orders.waiting.get(pool_id, ""))
        self._orders = orders.by_replica
        try:
            self._perform()
        finally:
            self._orders = {}
        self._cut(orders.cut)
        self._look_again()
        return any(isinstance(move, Wait) for move in verdict.moves)

    def _tell(self, pool: ScaledPool, moves: Sequence[str], waits: str) -> None:
        """Log what is new in a pool."""
        if waits and waits != pool.waiting:
            self._around.log.tell("scaling_waits", pool=pool.pool.pool_id, reason=waits)
        pool.waiting = waits
        note = pool.note(moves, self._around.clock.unix_s())
        if note is not None:
            self.tally.decided(note)
            told = msgspec.to_builtins(note)
            del told["at_s"]
            self._around.log.tell("scaling", **told)

    def _look_again(self) -> None:
        """See each replica as it is now, if one of them has turned since the last look.

        This is asked after each reading of each engine's load, which changes nothing here.
        """
        states = self._states
        same = len(states) == len(self._keepers) and all(
            states.get(name) is keeper.state for name, keeper in self._keepers.items()
        )
        if not same or self._views.keys() != self.pools.keys():
            self._look(self._around.clock.now_s())

    def _look(self, now_s: float) -> None:
        """See each replica as it is now."""
        members: dict[str, list[Member]] = {pool_id: [] for pool_id in self.pools}
        self._memory.keep(set(self._keepers))
        self._released &= self._keepers.keys()
        self._told_out = {n: out for n, out in self._told_out.items() if n in self._keepers}
        self._states = {name: keeper.state for name, keeper in self._keepers.items()}
        for replica_id, keeper in self._keepers.items():
            pool = self.pools.get(pool_id_of(replica_id))
            if pool is None:
                continue
            member, rise = self._memory.see(self._seen(keeper), now_s)
            members[pool.pool.pool_id].append(member)
            if rise is not None:
                self.tally.rose(rise)
            self._learn(keeper, member, now_s)
            if member.standing is Standing.SERVES:
                self._released.discard(replica_id)
            if keeper.state.phase is Phase.BACKOFF and member.standing is Standing.GONE:
                pool.crowded_until_s = now_s + CROWDED_S
        shelf = self._around.shelf
        self._views = {
            pool_id: View(
                pool=pool.pool,
                members=tuple(members[pool_id]),
                portion=pool.portion,
                gpus_each=self._gpus_each[pool_id],
                rungs=self._here.of(pool.pool, self._hashes[pool_id], imaged=shelf.has(pool_id)),
                presses=pool.presses,
            )
            for pool_id, pool in self.pools.items()
        }

    def _seen(self, keeper: Keeper) -> Look:
        observed, leases = keeper.observed, self._around.cards.leases
        replica_id, restored = keeper.spec.replica_id, keeper.turns.get(Rung.SNAPSHOTTED)
        suspender = self._around.suspender_of(self._engines[keeper.spec.engine])
        lent = self._around.cards.lent(replica_id)
        return Look(
            replica_id=replica_id,
            launch_hash=observed.launch_hash,
            state=keeper.state,
            aim=observed.aim,
            load=keeper.questions.load,
            devices=leases.holders.get(replica_id, ()) if leases else (),
            in_flight=self.book.in_flight(replica_id),
            spare=self.book.spare(replica_id),
            tokens=self.book.tokens(replica_id),
            names=keeper.questions.models,
            restored_s=restored.up_s if restored else 0.0,
            bound=() if not lent or suspender.probe().moves else lent,
            posing=observed.posing,
        )

    def _learn(self, keeper: Keeper, member: Member, now_s: float) -> None:
        """Take what rungs have cost, and which have failed since they were looked at last."""
        measured = {rung: cost for rung, cost in keeper.turns.items() if cost.up_s > 0.0}
        self.ladder.learn(member.launch_hash, member.replica_id, measured)
        out = keeper.observed.out
        for rung in out - self._told_out.get(member.replica_id, frozenset()):
            self.ladder.failed(member.launch_hash, rung, now_s)
        self._told_out[member.replica_id] = out

    def _learn_of_images(self, spec: PoolSpec, engine: Engine) -> None:
        """Look whether there is an image of a pool that is new, or whose command is."""
        told = launch_hash(engine, spec.first)
        if spec.first.snapshot and self._hashes.get(spec.pool_id) != told:
            image = image_of(engine, spec.first, self._around.snapshots)
            self._around.shelf.put(spec.pool_id, image)

    def _pour(self) -> None:
        """Give each pool its portion of what its model is asked for."""
        before = {pool_id: pool.portion for pool_id, pool in self.pools.items()}
        for pool_id, portion in self._portions.pour(self._views.values(), before).items():
            self._see(pool_id, portion)

    def _see(self, pool_id: str, portion: Portion, *, presses: bool = False) -> View:
        """Let a pool be one that is asked for so much, and return it."""
        pool, view = self.pools[pool_id], self._views[pool_id]
        pool.portion, pool.presses = portion, presses
        self._views[pool_id] = msgspec.structs.replace(view, portion=portion, presses=presses)
        return self._views[pool_id]

    def _decide(self, now_s: float) -> None:
        """Ask the laws what each pool needs."""
        room, freeing = room_of(self._around.cards.leases, self._views.values(), host_bytes_free())
        claims = [self._claim(pool_id, now_s) for pool_id in self.pools]
        crews = []
        for pool_id, claim in zip(self.pools, claims, strict=True):
            limit = replicas_possible(claim, [*claims, *freeing], room) if room.gpus else None
            pool, view = self.pools[pool_id], self._views[pool_id]
            if pool.pool.serves == "jobs":
                gpus = gpus_wanted(self._engines[pool.pool.first.engine], pool.pool.first)
                crews.append(JobPool(view, self._hashes[pool_id], gpus, limit))
            else:
                pool.decide(view, self.ladder, now_s, limit)
        decided = self.jobs.decide(crews, list(self._views.values()), self.ladder, now_s)
        for crew, found in zip(crews, decided, strict=True):
            pool_id = crew.view.pool.pool_id
            view = self._see(pool_id, found.portion, presses=found.presses)
            seen = view.observation(self.ladder, now_s, crew.limit)
            self.pools[pool_id].settle(found.decision, seen)

    def _judge(self, now_s: float) -> Verdict:
        """Ask the arbiter who gets what it needs."""
        room, freeing = room_of(self._around.cards.leases, self._views.values(), host_bytes_free())
        wanting = [
            pool_id
            for pool_id, pool in self.pools.items()
            if pool.desired and not self._views[pool_id].have
        ]
        failing = {name for name, v in self._views.items() if any(m.failing for m in v.members)}
        unserved = self._unserved.note(wanting, now_s, failing)
        short = [pool_id for pool_id in wanting if self._gpus_each[pool_id] > len(room.free)]
        claims = [
            msgspec.structs.replace(
                claim,
                unserved_s=unserved.get(claim.pool, 0.0),
                desired=claim.min if self._spares(claim, short) else claim.desired,
            )
            for claim in (self._claim(pool_id, now_s) for pool_id in self.pools)
        ]
        verdict = arbitrate([*claims, *freeing], room)
        for pool_id, pool in self.pools.items():
            pool.granted = verdict.terms.get(pool_id, {})
        return verdict

    def _spares(self, claim: Claim, short: Sequence[str]) -> bool:
        """Say whether a pool keeps replicas only in case, while another of no lower class has none.

        A pool keeps its last ones for its `scaledown_window` because coming back costs something.
        Those who wait for a card pay more.
        """
        rank = RANKS[claim.work_class]
        ranks = (RANKS[self.pools[pool_id].pool.first.work_class] for pool_id in short)
        return (
            claim.gpus_each > 0 and self._views[claim.pool].idle and min(ranks, default=9) <= rank
        )

    def _cut(self, replica_ids: Iterable[str]) -> None:
        """Wait no longer for the requests of these: whoever sent them asks again.

        One that is to sleep or to be suspended has them finish, within the grace that its pool has
        for that: an engine that is told to sleep waits for them, or loses what they have computed.
        """
        for replica_id in replica_ids:
            keeper = self._keepers[replica_id]
            if keeper.state.phase is Phase.DRAINING:
                keeper.apply(Event.DEADLINE, "its GPU is needed: its requests are asked again")

    def _claim(self, pool_id: str, now_s: float) -> Claim:
        return self._views[pool_id].claim(self.ladder, now_s, self.pools[pool_id].desired)

    def _resting(self, pool_id: str) -> set[str]:
        view = self._views.get(pool_id)
        return {m.replica_id for m in view.standing(Standing.RESTS)} if view else set()

    def _is_of(self, replica_id: str, pool_id: str) -> bool:
        return self.pools[pool_id].pool.number_of(replica_id) is not None

    def _gpus_of(self, pool: PoolSpec, engine: Engine) -> int:
        """Return how many of our cards a replica leases; one that is pinned shares its own."""
        count = gpus_leased(engine, pool.first)
        ours = self._around.cards.leases is not None
        return count if ours and pinned(pool.first.env, pool.first.args, count) is None else 0
