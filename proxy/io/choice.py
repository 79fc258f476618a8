"""Which replica takes a request, and whether now: one worker's policy, picture, and queue.

A request goes at once when the replica that the policy has for it is open, and nobody waits for
that one; near saturation it waits (`core.holding` says why). Those that have no other place to go
to (a pinned session, what goes on from a stored answer) wait only while that one replica has as
many as it may have. Not held are look-ups, which compute nothing, and all under rules that do not
ask how busy a replica is. Held as well are those for which every replica is full, and, under every
rule, those for which nothing is awake and demand brings something up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from proxy.config import ProxyConfig
from proxy.contract import NO_REGION
from proxy.core import fleet as fleets
from proxy.core import limits, regions
from proxy.core.classes import OFFLINE, ONLINE
from proxy.core.crowd import Crowd
from proxy.core.opening import has_room, is_open, runway_beside_s
from proxy.core.picture import Picture, Seats
from proxy.core.policy import POLICIES, Decision, Request
from proxy.core.prospects import UNSCALED, Prospect
from proxy.core.responses import Responses
from proxy.errors import NoSpareError, ProxyError
from proxy.io.class_telemetry import ClassTelemetry
from proxy.io.clock import Clock
from proxy.io.preemption import Preemption
from proxy.io.queues import Waiter
from proxy.io.telemetry import Telemetry
from proxy.io.waiting import Waiting, nothing

_PINNING: Final = ("prefix", "session")  # rules under which a session can be pinned
_ANY_MODEL: Final = "\n"  # the queue for replicas that do not say what they serve
_NAMELESS: Final = ("", _ANY_MODEL)  # queues that are no model's


class Choice:
    """What a worker chooses by."""

    def __init__(self, config: ProxyConfig, clock: Clock) -> None:
        self.config = config
        self.region = config.region
        self.clock = clock
        self.telemetry = Telemetry()
        self.classes = ClassTelemetry()
        self.picture = Picture(clock.draw)
        self.fleet = fleets.empty_fleet()
        self.policy = POLICIES[config.policy]
        self.strict = config.session_affinity == "strict"
        self._holds_back = _holds_back(config)
        self.residency = regions.Residency(self.region)
        self.responses = Responses()  # answers that requests may go on from
        self.catch_up: Callable[[], None] = nothing  # reads what others have decided
        self.arrivals: dict[str, int] = {}  # requests that came, by model
        self.bodies_bytes_max = limits.BODIES_BYTES_MAX
        self.some_keys = False  # by which tenants are known
        self.crowd = Crowd()
        self.preemption = Preemption(self._fault)
        self.waiting = Waiting(
            clock, self.picture, self.choose, self.awaited, self.prospect_of, self._fault
        )
        self.tell_tenants_apart()
        self.make_room()
        self.waiting.at_once = not self._holds_back

    def tell_tenants_apart(self) -> None:
        """Share what is scarce among tenants, if there are any, and be late as configured."""
        access = self.config.access
        named = bool(access.tenants) or access.jwt is not None
        self.waiting.shares.on = named or self.some_keys
        self.waiting.lateness.shed = access.classes.late == "shed"
        self.picture.loads.reserve_online(access.classes.online_reserve)

    def follow(self, config: ProxyConfig) -> None:
        """Choose as `config` says from now on."""
        self.config = config
        self.know_region(self.region)
        self.policy = POLICIES[config.policy]
        self.strict = config.session_affinity == "strict"
        self._holds_back = _holds_back(config)
        self.tell_tenants_apart()
        self.make_room()
        self.waiting.at_once = not self._holds_back  # who waits by the rules of before goes
        self.work_done()

    def make_room(self) -> None:
        """Bound those who wait, by the configuration and by what memory there is for bodies."""
        # Half of it, as for their number: those that wait never shut out the others.
        bytes_max = min(self.config.queue_bytes, self.bodies_bytes_max // 2)
        self.waiting.room.resize(self.config.queue_size, bytes_max)
        self.waiting.sharers = self.config.workers

    def choose(
        self, request: Request, pool: fleets.Pool, picture: Picture, now_s: float
    ) -> Decision | None:
        """Return where the request should go: to the replica that has its state, or by the policy.

        None: nobody may take it now. It is a `Policy` itself, for those that wait.
        """
        if request.response_key:
            name = self.responses.place_of(request.response_key)
            if name is not None and name not in request.tried:
                seats, slot = picture.seats(pool), picture.slots.get(name, -1)
                if slot in seats.places:
                    return self._to_state(seats, seats.places[slot], "response", request)
                if regions.may_have_state(request, slot, seats, picture, now_s):
                    return Decision(seats.away[seats.away_slots.index(slot)], slot, "response")
        if request.pinned and self.config.policy in _PINNING:
            home = self._to_home(request, pool)
            if picture.seats(pool).slots:  # its state is here
                return home
        else:
            home = self.policy(request, pool, picture, now_s)
        if not pool.remotes or not request.abroad or pool.anywhere:
            return home
        priced = regions.prices_regions(self.policy)
        return regions.choose_region(
            home, request, pool, picture, now_s, priced=priced, held=self._held_for
        )

    def _held_for(self, pool: fleets.Pool) -> int:
        """Return how many wait for the replicas of a pool."""
        held = 0
        for key, queue in self.waiting.queues.items():
            if queue.waiters:
                awaited = self.awaited(key)
                if awaited is not None and awaited.ring is pool.ring:
                    held += len(queue.waiters)
        return held

    def _to_home(self, request: Request, pool: fleets.Pool) -> Decision | None:
        """Where its session lives, however busy; the next on the ring only if that is not there."""
        seats = self.picture.seats(pool)
        by_name = {replica.name: place for place, replica in enumerate(seats.replicas)}
        for step, name in enumerate(pool.ring.walk(request.chain.home_key)):
            if name in by_name and name not in request.tried:
                reason = "spill" if step else "session"
                return self._to_state(seats, by_name[name], reason, request)
        return None

    def _to_state(self, seats: Seats, place: int, reason: str, request: Request) -> Decision | None:
        """A replica that is full has to be waited for. None: it is, and nobody may wait."""
        slot = seats.slots[place]
        if not self.config.queue_size and self.picture.loads.is_full(slot, request.work_class):
            return None
        cached_octets = self.picture.index.held_of(slot, request.chain)
        return Decision(seats.replicas[place], slot, reason, cached_octets)

    def decide(
        self, request: Request, pool: fleets.Pool, model: str, *, lookup: bool, now_s: float
    ) -> tuple[Decision | None, bool]:
        """Return where a newcomer goes, its place there taken, or that it has to wait.

        Where another worker was before us, the choice is made anew without that replica. An online
        request that would have to wait for offline work has that give way, and is placed then.
        """
        self.catch_up()
        decision, held = self._place(request, pool, model, lookup=lookup, now_s=now_s)
        if not self.preemption or lookup or not (held or decision is None):
            return decision, held
        if not self._makes_way(request, pool, model, decision, held=held, now_s=now_s):
            return decision, held
        return self._place(request, pool, model, lookup=lookup, now_s=now_s)

    def _makes_way(
        self,
        request: Request,
        pool: fleets.Pool,
        model: str,
        decision: Decision | None,
        *,
        held: bool,
        now_s: float,
    ) -> bool:
        """Have offline work give way, where that helps; return whether some has at once."""
        if request.work_class != ONLINE:
            return False
        preemption, picture = self.preemption, self.picture
        if decision is not None and is_open(decision, request, picture, now_s):
            return False  # it waits for others of its class
        places: list[Sequence[int]] = [] if decision is None else [(decision.slot,)]
        if not request.pinned and not request.response_key:  # else no other replica would do
            places.append(picture.seats(pool).slots)
        for slots in places:
            if preemption.make_way(request, slots, picture, now_s):
                return True
        if held:  # one that cannot wait has nothing of what others will have done in a moment
            preemption.ask_way(request, places, picture, now_s)
        return False

    def give_way(self, replica_name: str, lease_ids: Sequence[int]) -> None:
        """Another worker's online request waits for a replica: end these, and let it go first."""
        slot = self.picture.slots.get(replica_name, -1)
        if slot >= 0:
            self.waiting.clearing.keep(slot, self.clock.now_s())
        self.preemption.give_way(lease_ids)

    def _place(
        self, request: Request, pool: fleets.Pool, model: str, *, lookup: bool, now_s: float
    ) -> tuple[Decision | None, bool]:
        loads = self.picture.loads
        if loads.headcount is None:  # nobody else of this proxy chooses
            decision = self.choose(request, pool, self.picture, now_s)
            return decision, self.holds(decision, request, model, lookup=lookup, now_s=now_s)
        crowded = loads.crowded
        for _ in range(limits.RESERVED_TRIED_MAX):
            decision = self.choose(request, pool, self.picture, now_s)
            held = self.holds(decision, request, model, lookup=lookup, now_s=now_s)
            if held or decision is None or lookup or self.reserves(decision, request):
                break
        else:
            decision, held = None, request.spare or self._held_for_want(model, request)
        if crowded:
            crowded.clear()
        return decision, held

    def reserves(self, decision: Decision, request: Request) -> bool:
        """Take the place of a request that goes there in this turn, before any other worker."""
        return self.picture.reserve(
            request.chain, decision.cached_octets, decision.slot, request.work_class
        )

    def holds(
        self, decision: Decision | None, request: Request, model: str, *, lookup: bool, now_s: float
    ) -> bool:
        """Return whether the request has to wait; else it goes where it was decided, if anywhere.

        Those with state on one replica gain nothing from it unless that is full.
        """
        if lookup:
            return False
        if decision is None:
            return request.spare or self._held_for_want(model, request)
        if request.pinned or decision.reason == "response":
            return not has_room(decision, request, self.picture)
        if not self._holds_back:
            return False
        self.picture.loads.prefilling.settle(decision.slot, now_s)  # not every rule has done it
        runway_s = self.waiting.runway_s(request, now_s)
        if request.work_class == OFFLINE:
            if self.waiting.braked() >> decision.slot & 1:
                return True
            if not request.spare:
                runway_s = min(runway_s, runway_beside_s(decision.slot, self.picture, now_s))
        return self.waiting.awaits(decision.slot) or not is_open(
            decision, request, self.picture, now_s, runway_s
        )

    def _held_for_want(self, model: str, request: Request) -> bool:
        """Whether to wait where nobody may take it: all are full, or demand brings somebody up."""
        queue = self.queue_of(model)
        pool = self.awaited(queue, request.regions)
        if pool is not None and pool.available:
            return self._holds_back
        if not self.config.queue_size:
            return False
        wakes = self.prospect_of(queue).wakes and self.resides(request.regions)
        return wakes or self.may_leave(request, pool, self.clock.now_s())

    def may_leave(self, request: Request, pool: fleets.Pool | None, now_s: float) -> bool:
        """Whether another region serves it, and has not sent it away: one may wait for room there.

        One that has come from there may not.
        """
        if pool is None or not pool.remotes or not request.abroad:
            return False
        return self.picture.some_serve(self.picture.seats(pool), request.tried, now_s)

    def resides(self, within: frozenset[str] | None) -> bool:
        """Whether what is bound to these regions may be computed in this one."""
        return within is None or self.region in within

    def know_region(self, managed: str) -> None:
        """The region is that of the configuration, or, where it names none, of the manager."""
        self.region = managed if self.config.region == NO_REGION else self.config.region

    def wait(
        self,
        model: str,
        request: Request,
        held_bytes: int,
        on_decision: Callable[[Decision], None],
        on_refusal: Callable[[ProxyError], None],
        since_s: float = -1.0,
    ) -> Waiter:
        """Have a request wait for its model's replicas; see `Waiting.add`.

        Raises `NoSpareError` for one that takes only what is spare: there is nothing.
        """
        if request.spare:
            raise NoSpareError("no replica has room to spare now")
        queue = self.queue_of(model)
        request.held_for = self._held_for_what(queue, request)
        waiter = self.waiting.add(queue, request, held_bytes, on_decision, on_refusal, since_s)
        account = waiter.account
        if account is not None and self.waiting.shares.level(account):
            request.held_for = "share"  # others, with less than theirs, go first
        return waiter

    def _held_for_what(self, queue: str, request: Request) -> str:
        """Say why a request has to wait."""
        pool = self.awaited(queue, request.regions)
        if pool is None or not pool.available:
            return "starting"
        if request.work_class == OFFLINE and self.waiting.braked():
            return "online-first"
        loads, slots = self.picture.loads, self.picture.seats(pool).slots
        if any(loads.is_full(s, request.work_class) and not loads.is_full(s) for s in slots):
            return "reserve"
        return "replicas-busy"

    def arrived(self, model: str, request: Request) -> None:
        """Count a request for a model that the fleet has, if it is demand."""
        if request.spare:
            return
        if model in self.arrivals:
            self.arrivals[model] += 1
        elif not model and (name := self.only_model()):
            self.arrivals[name] += 1

    def fleet_changed(self) -> None:
        """Other replicas may take requests: look anew at those who wait for them."""
        self.residency.forget(self.region)
        pools = self.fleet.pools
        self.arrivals = {model: self.arrivals.get(model, 0) for model in pools}
        per_token_s = self.picture.loads.s_per_token
        here = [slot for name, slot in self.picture.slots.items() if name in self.fleet.replicas]
        speed = sum([1.0 / per_token_s[slot] for slot in here])
        self.waiting.shares.know_speed(speed)
        self.waiting.fleet_changed(lambda queue: queue in pools or queue in _NAMELESS)

    def work_done(self) -> None:
        """The picture or the fleet has changed: perhaps somebody who waits can go."""
        self.waiting.work_done()

    def queue_of(self, model: str) -> str:
        """Name the queue of a model. Names that clients invent make none of their own."""
        return model if not model or model in self.fleet.pools else _ANY_MODEL

    def awaited(self, queue: str, within: frozenset[str] | None = None) -> fleets.Pool | None:
        """Return the pool that those in a queue wait for, as it is now, in these regions."""
        pool: fleets.Pool | None = None
        if queue != _ANY_MODEL:
            pool = self.fleet.pool_for(queue) if queue else self.fleet.only_pool()
        elif self.fleet.any_model.replicas:
            pool = self.fleet.any_model
        return pool if pool is None else self.residency.within(pool, within)

    def prospect_of(self, queue: str) -> Prospect:
        """Return what is to be expected of the replicas that those in a queue wait for."""
        if queue == _ANY_MODEL:
            return UNSCALED
        return self.fleet.prospect_of(queue or self.only_model())

    def only_model(self) -> str:
        """Return a name of the pool that requests without a model go to; empty: there is none."""
        pool = self.fleet.only_pool()
        return next((name for name, each in self.fleet.pools.items() if each is pool), "")

    def _fault(self) -> None:
        self.telemetry.internal_errors_total += 1


def _holds_back(config: ProxyConfig) -> bool:
    """Whether requests wait for a replica that is open: under rules that ask how busy each is."""
    return config.queue_size > 0 and config.policy in ("prefix", "least_load")
