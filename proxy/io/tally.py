"""What one worker has in flight and waiting, told to its supervisor for the manager.

Told every so often, and at once when a request begins to wait for a model of which nothing is
awake: then a start is on the way before the second such request has come. It is the whole each
time, counted from the leases that are held, so that a request counts for its replica from the
moment in which it is bound to it. Without a manager nothing is told.
"""

from __future__ import annotations

import asyncio

import msgspec

from proxy.contract.demand import DEMAND_INTERVAL_S, ModelDemand, ReplicaDemand
from proxy.contract.regions import SUMMARY_INTERVAL_S, ModelSummary
from proxy.core import limits
from proxy.core.demand import sum_models
from proxy.core.fleet import Fleet
from proxy.core.replica import Replica
from proxy.core.summary import summarise
from proxy.core.wanting import Counts
from proxy.io import control
from proxy.io.plane import Plane
from proxy.io.tasks import beat

IDLE_INTERVAL_S = 1.0  # while there are no other regions: there may be some after a reload


class Tally:
    """One worker's demand; `run` owns its time."""

    def __init__(self, plane: Plane, channel: control.Channel) -> None:
        self._plane = plane
        self._channel = channel
        self._told: control.Demanded | None = None
        self._urgent = asyncio.Event()
        plane.waiting.on_hold = self._urgent.set

    async def run(self) -> None:
        """Tell until cancelled."""
        while True:
            if self._plane.config.manager_url is None:
                await beat(DEMAND_INTERVAL_S)
                continue
            try:
                async with asyncio.timeout(DEMAND_INTERVAL_S):
                    await self._urgent.wait()
            except TimeoutError:
                pass
            else:
                await asyncio.sleep(0)  # who comes in the same turn of the loop is told of as well
            self._tell(at_once=self._urgent.is_set())
            self._urgent.clear()
            await asyncio.sleep(limits.DEMAND_PUSH_S)

    def _tell(self, *, at_once: bool) -> None:
        plane = self._plane
        if self._channel.waiting_bytes > limits.NOTES_WAITING_BYTES_MAX:
            return  # a supervisor that is behind gets the next one
        demanded = self._counted(demand_of(plane, at_once=at_once))
        if demanded != self._told or at_once:
            self._told = demanded
            self._channel.send(demanded)

    def _counted(self, demanded: control.Demanded) -> control.Demanded:
        """Have no counter fall: what leaves for another region had been counted as it came."""
        if self._told is None or not self._plane.departures:
            return demanded
        models = {
            name: msgspec.structs.replace(
                one, arrivals_total=max(one.arrivals_total, before.arrivals_total)
            )
            if (before := self._told.models.get(name)) is not None
            else one
            for name, one in demanded.models.items()
        }
        return msgspec.structs.replace(demanded, models=models)


def demand_of(plane: Plane, *, at_once: bool = False) -> control.Demanded:
    """Return all that a worker has, by the names under which the manager counts it."""
    replicas: dict[str, ReplicaDemand] = {}
    models: dict[str, ModelDemand] = {}
    for name, count in _by_replica(plane).items():
        replica = plane.fleet.replicas.get(name)
        replica_id = name if replica is None else replica.replica_id
        before = replicas.get(replica_id, ReplicaDemand())
        replicas[replica_id] = ReplicaDemand(
            before.in_flight + count.in_flight + count.spare,
            before.tokens + count.in_flight_tokens + count.spare_tokens,
            before.spare + count.spare,
        )
        model = _model_of(replica, plane.fleet) if replica is not None else ""
        if model:
            more = ModelDemand(
                in_flight=count.in_flight,
                in_flight_tokens=count.in_flight_tokens,
                spare=count.spare,
            )
            models = sum_models((models, {model: more}))
    return control.Demanded(
        sum_models((models, *_waiting(plane), *_arrived(plane))),
        replicas,
        plane.fleet_epoch,
        plane.fleet_version,
        at_once,
        abroad=_abroad(plane),
        bound=_bound(plane),
    )


async def summarise_regularly(plane: Plane, channel: control.Channel) -> None:
    """Say what other regions should know of the models here, where there are others."""
    while True:
        others = plane.config.access.remote_regions
        await beat(SUMMARY_INTERVAL_S if others else IDLE_INTERVAL_S)
        behind = channel.waiting_bytes > limits.NOTES_WAITING_BYTES_MAX
        if plane.config.access.remote_regions and not behind:
            channel.send(control.Summarised(summary_of(plane)))


def summary_of(plane: Plane) -> dict[str, ModelSummary]:
    """Return what this worker sees of each model."""
    plane.catch_up()
    waiting: dict[str, int] = {}
    for key, queue in plane.waiting.queues.items():
        model = key or plane.only_model()
        waiting[model] = waiting.get(model, 0) + len(queue.waiters)
    return summarise(plane.fleet, plane.picture, waiting, plane.clock.now_s())


class _Count:
    """The requests that one replica has of ours, and the tokens of those not answered."""

    __slots__ = ("in_flight", "in_flight_tokens", "spare", "spare_tokens")

    def __init__(self) -> None:
        self.in_flight = self.in_flight_tokens = self.spare = self.spare_tokens = 0


def _by_replica(plane: Plane) -> dict[str, _Count]:
    found: dict[str, _Count] = {}
    for lease in plane.leases:
        if lease.replica_name in plane.fleet.remotes:
            continue  # the work of another region's replicas
        count = found.get(lease.replica_name)
        if count is None:
            count = found[lease.replica_name] = _Count()
        tokens = lease.prefill_tokens if lease.pending else 0
        if lease.spare:
            count.spare += 1
            count.spare_tokens += tokens
        else:
            count.in_flight += 1
            count.in_flight_tokens += tokens
    return found


def _model_of(replica: Replica, fleet: Fleet) -> str:
    """Return the name under which a replica's work counts; empty where it names no model."""
    names = sorted(replica.models)
    for name in names:
        if name in fleet.prospects:
            return fleet.prospects[name].name
    return names[0] if names else ""


def _waiting(plane: Plane) -> list[dict[str, ModelDemand]]:
    now_s = plane.clock.now_s()
    return [
        {
            model: ModelDemand(
                queued=len(queue.waiters),
                queued_tokens=queue.tokens,
                queued_s=round(queue.oldest_s(now_s), 3),
                refused_total=queue.refused_total,
            )
        }
        for key, queue in plane.waiting.queues.items()
        if (model := _counted_as(key or plane.only_model(), plane.fleet))
        and (queue.waiters or queue.refused_total)
    ]


def _arrived(plane: Plane) -> list[dict[str, ModelDemand]]:
    """Return the requests that came, without those that have left for another region."""
    left = plane.departures
    return [
        {name: ModelDemand(arrivals_total=max(0, count - left.get(model, 0)))}
        for model, count in plane.arrivals.items()
        if count and (name := _counted_as(model, plane.fleet))
    ]


def _abroad(plane: Plane) -> Counts:
    """Return our requests that are in other regions, by model and region."""
    found: Counts = {}
    for lease in plane.leases if plane.fleet.remotes else ():
        remote = plane.fleet.remotes.get(lease.replica_name)
        if remote is not None and not lease.spare:
            by_region = found.setdefault(min(remote.models), {})
            by_region[remote.region] = by_region.get(remote.region, 0) + 1
    return found


def _bound(plane: Plane) -> Counts:
    """Return the requests that wait and may not be computed in another region, by these."""
    found: Counts = {}
    regions = {remote.region for remote in plane.fleet.remotes.values()}
    for key, queue in plane.waiting.queues.items() if regions else ():
        by_region = found.setdefault(key or plane.only_model(), {})
        for waiter in queue.waiters:
            allowed = waiter.request.regions
            for region in regions - allowed if allowed is not None else ():
                by_region[region] = by_region.get(region, 0) + 1
    return {model: by_region for model, by_region in found.items() if by_region}


def _counted_as(model: str, fleet: Fleet) -> str:
    pool = fleet.pools.get(model)
    if pool is None or not (pool.replicas or model in fleet.prospects):
        return ""  # of nobody's here: other regions alone have it
    return fleet.prospect_of(model).name or model
