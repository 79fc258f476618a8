"""Which replica takes a request, and whether now: one worker's policy, picture, and queue.

A request goes at once when the replica that the policy has for it is open, and nobody waits before
it; near saturation it waits (`core.holding` says why). Not held are those that have no other place
to go to (a pinned session, a stored answer), look-ups, and all under rules that do not ask how busy
a replica is. Held as well are those for which every replica has as many as it may have.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from proxy.config import ProxyConfig
from proxy.core import fleet as fleets
from proxy.core.holding import is_open
from proxy.core.picture import Picture, Seats
from proxy.core.policy import POLICIES, Decision, Request
from proxy.core.responses import Responses
from proxy.errors import QueueFullError
from proxy.io.clock import Clock
from proxy.io.telemetry import Telemetry
from proxy.io.waiting import Waiter, Waiting

_ANY_MODEL: Final = "\n"  # the queue for replicas that do not say what they serve


class Choice:
    """What a worker chooses by."""

    def __init__(self, config: ProxyConfig, clock: Clock) -> None:
        self.config = config
        self.clock = clock
        self.telemetry = Telemetry()
        self.picture = Picture(clock.draw)
        self.fleet = fleets.empty_fleet()
        self.policy = POLICIES[config.policy]
        self.strict = config.session_affinity == "strict"
        self._holds_back = _holds_back(config)
        self.responses = Responses()  # answers that requests may go on from
        self.waiting = Waiting(clock, self.picture, self.choose, self.awaited, self._fault)

    def follow(self, config: ProxyConfig) -> None:
        """Choose as `config` says from now on."""
        self.config = config
        self.policy = POLICIES[config.policy]
        self.strict = config.session_affinity == "strict"
        self._holds_back = _holds_back(config)
        self.work_done()

    def choose(
        self, request: Request, pool: fleets.Pool, picture: Picture, now_s: float
    ) -> Decision | None:
        """Return where the request should go: to the replica that has its state, or by the policy.

        None: nobody may take it now. It is a `Policy` itself, for those that wait.
        """
        if request.response_key:
            name = self.responses.place_of(request.response_key)
            seats = picture.seats(pool)
            place = seats.places.get(picture.slots.get(name, -1), -1) if name is not None else -1
            if place >= 0 and name not in request.tried:
                return _to_keeper(seats, place, request, picture)
        return self.policy(request, pool, picture, now_s)

    def holds(
        self, decision: Decision | None, request: Request, model: str, *, lookup: bool, now_s: float
    ) -> bool:
        """Return whether the request has to wait; else it goes where it was decided, if anywhere.

        Those with state on one replica gain nothing from it: they have no other to go to.
        """
        if (
            decision is not None
            and not self.waiting.count
            and is_open(decision, request, self.picture, now_s)
        ):
            return False
        if not self._holds_back or lookup or request.pinned:
            return False
        if decision is None:
            pool = self.awaited(self._queue_of(model))
            return pool is not None and bool(pool.available)  # all are full, and none has failed
        if decision.reason == "response":
            return False
        self.picture.loads.settle(decision.slot, now_s)  # not every rule has done it
        busy = not is_open(decision, request, self.picture, now_s)
        return busy or self.waiting.any_for(self._queue_of(model))

    def wait(self, model: str, request: Request, on_decision: Callable[[Decision], None]) -> Waiter:
        """Have a request wait for its model's replicas. Raises `QueueFullError`."""
        if self.waiting.count >= self.config.queue_size:
            raise QueueFullError(
                f"{self.waiting.count} requests wait for a replica already (--queue-size)",
                wait_s=self.waiting.retry_after_s(),
            )
        return self.waiting.add(self._queue_of(model), request, on_decision)

    def work_done(self) -> None:
        """The picture or the fleet has changed: perhaps somebody who waits can go."""
        self.waiting.work_done()

    def _queue_of(self, model: str) -> str:
        """Name the queue of a model. Names that clients invent make none of their own."""
        return model if not model or model in self.fleet.pools else _ANY_MODEL

    def awaited(self, queue: str) -> fleets.Pool | None:
        """Return the pool that those in a queue wait for, as it is now."""
        if queue == _ANY_MODEL:
            return self.fleet.any_model if self.fleet.any_model.replicas else None
        return self.fleet.pool_for(queue) if queue else self.fleet.only_pool()

    def _fault(self) -> None:
        self.telemetry.internal_errors_total += 1


def _holds_back(config: ProxyConfig) -> bool:
    """Whether requests wait for a replica that is open: under rules that ask how busy each is."""
    return config.queue_size > 0 and config.policy in ("prefix", "least_load")


def _to_keeper(seats: Seats, place: int, request: Request, picture: Picture) -> Decision | None:
    slot = seats.slots[place]
    most = picture.loads.inflight_max[slot]
    if most and picture.loads.inflight[slot] >= most:
        return None
    cached_octets = picture.index.held_of(slot, request.chain)
    return Decision(seats.replicas[place], slot, "response", cached_octets)
