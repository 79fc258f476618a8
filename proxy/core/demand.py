"""Several workers' work as one: what a proxy tells its manager is the sum of what each has.

A worker that has died takes with it what it had in flight and waiting; what it had counted stays in
the sums, so that no counter falls.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from proxy.contract.demand import ModelDemand, ReplicaDemand


def sum_models(parts: Iterable[Mapping[str, ModelDemand]]) -> dict[str, ModelDemand]:
    total: dict[str, ModelDemand] = {}
    for part in parts:
        for name, more in part.items():
            before = total.get(name)
            total[name] = more if before is None else _both(before, more)
    return total


def sum_replicas(parts: Iterable[Mapping[str, ReplicaDemand]]) -> dict[str, ReplicaDemand]:
    total: dict[str, ReplicaDemand] = {}
    for part in parts:
        for name, more in part.items():
            before = total.get(name, _NONE)
            total[name] = ReplicaDemand(
                before.in_flight + more.in_flight,
                before.tokens + more.tokens,
                before.spare + more.spare,
            )
    return total


def counted(models: Mapping[str, ModelDemand]) -> dict[str, ModelDemand]:
    """Return what remains of one that has died: its counters."""
    return {
        name: ModelDemand(arrivals_total=one.arrivals_total, refused_total=one.refused_total)
        for name, one in models.items()
    }


_NONE = ReplicaDemand()


def _both(one: ModelDemand, other: ModelDemand) -> ModelDemand:
    return ModelDemand(
        in_flight=one.in_flight + other.in_flight,
        in_flight_tokens=one.in_flight_tokens + other.in_flight_tokens,
        queued=one.queued + other.queued,
        queued_tokens=one.queued_tokens + other.queued_tokens,
        queued_s=max(one.queued_s, other.queued_s),
        arrivals_total=one.arrivals_total + other.arrivals_total,
        refused_total=one.refused_total + other.refused_total,
        spare=one.spare + other.spare,
    )
