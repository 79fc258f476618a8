"""What the proxies of a region have to do, as they report it: the newest report of each, summed.

A report is a whole, so the last one of a proxy is all that is kept of it. One that has been silent
for `DEMAND_AGE_S_MAX` is gone, and its requests with it: they were connections of its process. One
that says that it has ended is gone at once.

Counters of a proxy begin at its own start, and the sum must only grow: what a report adds to the
one before it is added here. What a proxy had counted before this manager first heard of it is
history, not a burst of this moment, and is left out, unless it says that it has only just begun.

Whoever drains a replica waits until no proxy has requests on it. A count that was taken before all
workers of a proxy had heard of the draining is no such count: one of them may just have chosen it.
So reports name the fleet that was known, and until it is one that tells of the draining, a proxy
counts as having a request there; or until it has been silent for `DOUBT_S`, because one that ends
says no more, and what it may have sent by then the engine tells of.

Bounded: by the proxies that may report at once, and by the names of pools and replicas that there
are; what a proxy reports beside these is dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from itertools import islice
from typing import TypeVar

import msgspec

from proxy.contract import FleetSnapshot, ReplicaState
from proxy.contract.demand import (
    DEMAND_AGE_S_MAX,
    DEMAND_INTERVAL_S,
    Demand,
    Elsewhere,
    ModelDemand,
)

PROXIES_MAX = 256
REGIONS_MAX = 64  # that a report may speak of
FIRST_SEQUENCE_MAX = 1  # a proxy that has said no more than this has just begun
DOUBT_S = 3 * DEMAND_INTERVAL_S  # one report may be late, and one lost
NONE = ModelDemand()
_T = TypeVar("_T")


class _Heard(msgspec.Struct, frozen=True):
    demand: Demand
    at_s: float


class DemandBook:
    """The newest report of each proxy that lives."""

    def __init__(self, now_s: Callable[[], float]) -> None:
        self._now_s = now_s
        self._models: frozenset[str] = frozenset()
        self._heard: dict[str, _Heard] = {}
        self._arrivals: dict[str, int] = {}  # by model, of all proxies that ever reported
        self._refused: dict[str, int] = {}
        self._epoch = ""
        self._replicas: frozenset[str] = frozenset()
        self._closed: dict[str, int] = {}  # replicas that take nothing new: since which snapshot

    @property
    def proxies(self) -> int:
        return len(self._heard)

    def serve(self, models: Collection[str]) -> None:
        """Take reports of these models from now on, and of no others."""
        self._models = frozenset(models)
        for counts in (self._arrivals, self._refused):
            for gone in counts.keys() - self._models:
                del counts[gone]

    def publish(self, fleet: FleetSnapshot) -> None:
        """Note what the proxies are told of who takes new requests."""
        closed = (r for r in fleet.replicas if r.asleep or r.state is not ReplicaState.READY)
        self._epoch = fleet.epoch
        self._replicas = frozenset(r.replica_id for r in fleet.replicas)
        self._closed = {r.replica_id: self._closed.get(r.replica_id, fleet.version) for r in closed}

    def take(self, demand: Demand, now_s: float) -> bool:
        """Note a report; say whether it was news: an older one than the last is not."""
        self.expire(now_s)
        before = self._heard.get(demand.proxy_id)
        if before is not None and demand.sequence <= before.demand.sequence:
            return False
        if before is None and len(self._heard) >= PROXIES_MAX:
            return False
        models = {name: told for name, told in demand.models.items() if name in self._models}
        if before is not None or demand.sequence <= FIRST_SEQUENCE_MAX:
            self._count(models, before.demand.models if before else {})
        replicas = {name: told for name, told in demand.replicas.items() if name in self._replicas}
        demand = msgspec.structs.replace(
            demand,
            models=models,
            replicas=replicas,
            elsewhere=_of(demand.elsewhere, self._models),
            wanted=_of(demand.wanted, self._models),
        )
        self._heard[demand.proxy_id] = _Heard(demand, now_s)
        return True

    def expire(self, now_s: float) -> None:
        """Forget the proxies that have been silent for too long, or have said their last."""
        for proxy_id, heard in list(self._heard.items()):
            if heard.demand.last or now_s - heard.at_s > DEMAND_AGE_S_MAX:
                del self._heard[proxy_id]

    def of(self, model: str) -> ModelDemand:
        """Return what all proxies together have for `model`; the counters only grow."""
        told = (heard.demand.models.get(model) for heard in self._heard.values())
        now = summed(each for each in told if each is not None)
        return msgspec.structs.replace(
            now,
            arrivals_total=self._arrivals.get(model, 0),
            refused_total=self._refused.get(model, 0),
        )

    def wanted(self, model: str) -> dict[str, float]:
        """Return what each other region asks of this one: what one proxy says, they all do."""
        asked: dict[str, float] = {}
        for heard in self._heard.values():
            for region, inputs in heard.demand.wanted.get(model, {}).items():
                asked[region] = max(inputs, asked.get(region, 0.0))
        return asked

    def elsewhere(self, model: str) -> dict[str, Elsewhere]:
        """Return what each other region could do, as the newest report has it; but requests that
        are there are of all proxies, and where one has few that may be computed there, few may."""
        found: dict[str, Elsewhere] = {}
        for heard in sorted(self._heard.values(), key=lambda heard: heard.at_s):
            for region, newer in heard.demand.elsewhere.get(model, {}).items():
                older = found.get(region)
                found[region] = newer if older is None else _newer(older, newer)
        return found

    def in_flight(self, replica_id: str) -> int | None:
        """Return the requests of all proxies on this replica; None: no proxy tells."""
        self.expire(self._now_s())
        if not self._heard:
            return None
        told = (heard.demand.replicas.get(replica_id) for heard in self._heard.values())
        count = sum(each.in_flight for each in told if each is not None)
        return max(count, int(self._may_be_chosen(replica_id)))

    def spare(self, replica_id: str) -> int:
        """Return those of them that may have only what is spare."""
        told = (heard.demand.replicas.get(replica_id) for heard in self._heard.values())
        return sum(each.spare for each in told if each is not None)

    def _may_be_chosen(self, replica_id: str) -> bool:
        """Say whether a proxy may not have heard yet that this one takes nothing new."""
        since = self._closed.get(replica_id)
        if since is None:
            return False
        doubt_s = self._now_s() - DOUBT_S
        recent = (heard.demand for heard in self._heard.values() if heard.at_s >= doubt_s)
        return any(d.fleet_epoch != self._epoch or d.fleet_version < since for d in recent)

    def tokens(self, replica_id: str) -> int:
        """Return the uncached prompt tokens that the proxies have waiting on this replica."""
        told = (heard.demand.replicas.get(replica_id) for heard in self._heard.values())
        return sum(each.tokens for each in told if each is not None)

    def _count(self, now: Mapping[str, ModelDemand], before: Mapping[str, ModelDemand]) -> None:
        for model, told in now.items():
            last = before.get(model, NONE)
            arrivals = told.arrivals_total - last.arrivals_total
            refused = told.refused_total - last.refused_total
            self._arrivals[model] = self._arrivals.get(model, 0) + max(0, arrivals)
            self._refused[model] = self._refused.get(model, 0) + max(0, refused)


def _of(told: Mapping[str, dict[str, _T]], models: frozenset[str]) -> dict[str, dict[str, _T]]:
    """Return what is told of these models, by a bounded number of regions."""
    return {
        model: dict(islice(by_region.items(), REGIONS_MAX))
        for model, by_region in told.items()
        if model in models
    }


def _newer(older: Elsewhere, newer: Elsewhere) -> Elsewhere:
    return msgspec.structs.replace(
        newer,
        in_flight=older.in_flight + newer.in_flight,
        share=min(older.share, newer.share),
    )


def summed(demands: Iterable[ModelDemand]) -> ModelDemand:
    """Return the sum: of requests, tokens and counters; of waits the longest."""
    total = NONE
    for each in demands:
        total = ModelDemand(
            in_flight=total.in_flight + each.in_flight,
            in_flight_tokens=total.in_flight_tokens + each.in_flight_tokens,
            queued=total.queued + each.queued,
            queued_tokens=total.queued_tokens + each.queued_tokens,
            queued_s=max(total.queued_s, each.queued_s),
            arrivals_total=total.arrivals_total + each.arrivals_total,
            refused_total=total.refused_total + each.refused_total,
            spare=total.spare + each.spare,
        )
    return total
