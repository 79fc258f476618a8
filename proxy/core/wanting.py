"""What the regions ask of each other, as a proxy carries it between its manager and other regions.

The manager decides: it is told what others could do for each model (`elsewhere_of`), and says in
its snapshots what they are to start (`asked_of`). What others ask of this region is told to it as
it was said last (`wanted_by`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from proxy.contract import PoolRecord
from proxy.contract.demand import Elsewhere
from proxy.contract.regions import WANTED_AGE_S_MAX, ModelSummary, RemoteState, Wanted

Counts = dict[str, dict[str, int]]  # by model, then by region
# By model, then by region: what others could do for us, and what they ask of us.
Between = tuple[dict[str, dict[str, Elsewhere]], dict[str, dict[str, float]]]


def summed(parts: Iterable[Counts]) -> Counts:
    """Return what several workers have counted, as one."""
    total: Counts = {}
    for part in parts:
        for model, by_region in part.items():
            found = total.setdefault(model, {})
            for region, count in by_region.items():
                found[region] = found.get(region, 0) + count
    return total


def elsewhere_of(
    states: Iterable[RemoteState],
    queued: Mapping[str, int],
    abroad: Counts,
    bound: Counts,
    allowed: Mapping[str, frozenset[str]],
) -> dict[str, dict[str, Elsewhere]]:
    """Return what each region that is there could do for each model.

    `queued` requests wait here, of which `bound` may not be computed there; `abroad` are there
    already. `allowed` are the regions of the models that are not allowed everywhere.
    """
    found: dict[str, dict[str, Elsewhere]] = {}
    for state in states:
        if not state.linked or state.summary is None or state.summary.draining:
            continue
        for model, told in state.summary.models.items():
            here = found.setdefault(model, {})
            if state.region in here or state.region not in allowed.get(model, (state.region,)):
                continue  # all proxies of a region say the same
            stay, wait = bound.get(model, {}).get(state.region, 0), queued.get(model, 0)
            share = 1.0 - min(1.0, stay / wait) if wait else 1.0
            there = abroad.get(model, {}).get(state.region, 0)
            here[state.region] = _elsewhere(told, state.round_trip_s, there, share)
    return {model: by_region for model, by_region in found.items() if by_region}


def _elsewhere(told: ModelSummary, round_trip_s: float, there: int, share: float) -> Elsewhere:
    return Elsewhere(
        start_s=told.start_s + round_trip_s if told.start_s else 0.0,
        startable=told.startable if told.wakes else 0,
        coming=told.coming,
        free=told.free,
        in_flight=there,
        carries=told.carries,
        share=share,
    )


def asked_of(pools: Iterable[PoolRecord], region: str) -> dict[str, float]:
    """Return what the manager asks of another region, by model."""
    asked: dict[str, float] = {}
    for pool in pools:
        inputs = pool.wanted.get(region, 0.0)
        if inputs > 0.0:
            asked[pool.model] = asked.get(pool.model, 0.0) + inputs
    return asked


def wanted_by(heard: Iterable[tuple[Wanted, float]], now_s: float) -> dict[str, dict[str, float]]:
    """Return what each region asks of this one; `heard` has what its proxies said, and when.

    They all say what their manager has decided: one that is behind by a moment asks for less or
    more for that moment, and the most is taken.
    """
    wanted: dict[str, dict[str, float]] = {}
    for said, at_s in heard:
        if now_s - at_s > WANTED_AGE_S_MAX:
            continue
        for model, inputs in said.models.items():
            by_region = wanted.setdefault(model, {})
            by_region[said.region] = max(inputs, by_region.get(said.region, 0.0))
    return wanted
