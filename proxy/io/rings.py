"""The rings of all models and what is hot on them, for those who look.

A ring is a pure function of the fleet, so no worker is asked for it: it is made here from the same
snapshot by the same code, in a thread, because one of hundreds of replicas takes a tenth of a
second, and only when a replica has come or gone while somebody looks.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from proxy.contract import FleetSnapshot, ReplicaState
from proxy.contract.view import (
    ARCS_MAX,
    HOLDERS_MAX,
    PREFIXES_MAX,
    RINGS_MAX,
    ArcView,
    PrefixView,
    RingView,
)
from proxy.core import fleet as fleets
from proxy.core.ring import Ring
from proxy.core.ring_view import arcs, place_of, shares
from proxy.io.control import HotPrefix

_Key = tuple[tuple[object, ...], ...]


class _Shown(NamedTuple):
    """One ring, made for showing."""

    models: tuple[str, ...]
    ring: Ring
    servers: Mapping[str, str]  # whose each name on it is
    shares: Mapping[str, float]
    arcs: tuple[ArcView, ...]


class Rings:
    """One writer: the view that they are part of."""

    def __init__(self) -> None:
        self._fleet = fleets.empty_fleet()
        self._key: _Key | None = None
        self._shown: list[_Shown] = []
        self._making = asyncio.Lock()

    async def follow(self, snapshot: FleetSnapshot | None) -> None:
        """These are the replicas now."""
        async with self._making:
            if snapshot is None or (key := _key(snapshot)) == self._key:
                return
            self._fleet, self._shown = await asyncio.to_thread(_make, self._fleet, snapshot)
            self._key = key

    def ratios(self) -> dict[str, float]:
        """Return each replica's share; of several rings, the largest that it has of one."""
        out: dict[str, float] = {}
        for shown in self._shown:
            for server, share in shown.shares.items():
                out[server] = max(share, out.get(server, 0.0))
        return out

    def views(self, busiest: Sequence[str], told: Sequence[HotPrefix]) -> tuple[RingView, ...]:
        """Return the rings with the prefixes on them; `busiest` names models, that one first."""
        order = {model: place for place, model in enumerate(busiest)}
        shown = sorted(
            self._shown,
            key=lambda one: (min(order.get(m, len(order)) for m in one.models), one.models),
        )[:RINGS_MAX]
        on: list[list[HotPrefix]] = [[] for _ in shown]
        for prefix in _summed(told):
            for place, one in enumerate(shown):
                if any(holder in one.shares for holder in prefix.holders):
                    on[place].append(prefix)
                    break
        return tuple(
            [
                RingView(
                    model=min(one.models, key=lambda model: (order.get(model, len(order)), model)),
                    models=one.models,
                    arcs=one.arcs,
                    prefixes=tuple([_prefix(one, prefix) for prefix in prefixes]),
                )
                for one, prefixes in zip(shown, on, strict=True)
            ]
        )


def _key(snapshot: FleetSnapshot) -> _Key:
    """Return all of a fleet that its rings depend on."""
    return tuple(
        [
            (
                record.replica_id,
                record.dp_size,
                record.models,
                record.weight,
                record.state is ReplicaState.STOPPED,
                not record.models and record.state is ReplicaState.READY,
            )
            for record in snapshot.replicas
        ]
    )


def _make(known: fleets.Fleet, snapshot: FleetSnapshot) -> tuple[fleets.Fleet, list[_Shown]]:
    fleet = fleets.apply(known, fleets.SnapshotReceived(snapshot))
    models: dict[int, list[str]] = {}  # by ring, which models of the same replicas share
    pools = {"": fleet.any_model, **fleet.pools}
    for model, pool in pools.items():
        if pool.replicas and (model or not fleet.pools):
            models.setdefault(id(pool.ring), []).append(model)
    most = ARCS_MAX // max(1, min(len(models), RINGS_MAX))
    out = []
    for names in models.values():
        pool = pools[names[0]]
        servers = {name: replica.replica_id for name, replica in pool.replicas.items()}
        parts = shares(pool.ring, servers)
        out.append(_Shown(tuple(names), pool.ring, servers, parts, arcs(pool.ring, servers, most)))
    return fleet, out


def _summed(told: Sequence[HotPrefix]) -> list[HotPrefix]:
    """Add up what workers have counted; the hottest first."""
    found: dict[int, HotPrefix] = {}
    for one in told:
        known = found.get(one.name)
        if known is not None:
            one = HotPrefix(  # noqa: PLW2901 - the sum stands for both
                one.name,
                one.octets,
                known.count + one.count,
                max(known.spread, one.spread),
                max(known.held_by, one.held_by),
                sorted({*known.holders, *one.holders})[:HOLDERS_MAX],
            )
        found[one.name] = one
    return sorted(found.values(), key=lambda one: (-one.count, one.name))[:PREFIXES_MAX]


def _prefix(shown: _Shown, told: HotPrefix) -> PrefixView:
    return PrefixView(
        name=f"{told.name:016x}",
        octets=told.octets,
        heat=float(told.count),
        spread=told.spread,
        at=place_of(told.name),
        home=next((shown.servers[name] for name in shown.ring.walk(told.name)), None),
        holders=tuple(told.holders),
        held_by=told.held_by,
    )
