"""What the manager tells of the replicas that serve others: the fleet, and who asks for what now.

Models that share replicas (a base and its adapters, a name in two pools) are one *group*: what is
spare on these replicas is spare once. Replicas that do not say what they serve are nobody's: no
line is sent where it might be refused.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from contextlib import suppress

import aiohttp
import msgspec

from backends.clock import Clock
from backends.offline.gate import ReplicaSeen
from backends.scaling_report import DemandReport
from proxy.contract import (
    FLEET_WATCH_PATH,
    HEARTBEAT_INTERVAL_S,
    SNAPSHOT_BYTES_MAX,
    FleetSnapshot,
    ReplicaRecord,
    ReplicaState,
    decode_snapshot,
)
from proxy.contract.demand import DEMAND_PATH, ModelDemand

RECONNECT_S = 1.0
CONNECT_TIMEOUT_S = 2.0
SILENCE_S_MAX = 3 * HEARTBEAT_INTERVAL_S
GROUPS_MAX = 1024
# A line that is too long is a ValueError, and so is what is no snapshot.
_FAULTS = (aiohttp.ClientError, OSError, TimeoutError, ValueError)


class Group(msgspec.Struct, frozen=True, kw_only=True):
    """Models that the same replicas serve, and those of these that take requests."""

    names: tuple[str, ...]
    replicas: tuple[ReplicaSeen, ...] = ()


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """What others have in a group."""

    in_flight: int = 0
    queued: int = 0
    arrivals_total: int = 0
    panicking: bool = False
    kv_target: float = 1.0


def groups_of(snapshot: FleetSnapshot) -> dict[str, Group]:
    """Return the groups of a fleet, each under the first of its names."""
    pools: dict[str, set[str]] = {}
    for replica in snapshot.replicas:
        pools.setdefault(replica.pool, set()).update(replica.models)
    for pool in snapshot.pools:
        pools.setdefault(pool.pool, set()).add(pool.model)
    merged: list[set[str]] = []
    for served in pools.values():
        touching = [other for other in merged if other & served]
        merged = [other for other in merged if not other & served]
        merged.append(served.union(*touching))
    groups: dict[str, Group] = {}
    for group in sorted((names for names in merged if names), key=min)[:GROUPS_MAX]:
        replicas = [_seen(r) for r in snapshot.replicas if group & set(r.models) and _takes(r)]
        groups[min(group)] = Group(names=tuple(sorted(group)), replicas=tuple(replicas))
    return groups


def asked_of(report: DemandReport, names: Iterable[str]) -> Asked:
    """Return what others have in a group of these names."""
    told = [report.models[name] for name in names if name in report.models]
    demands: list[ModelDemand] = [each.demand for each in told]
    return Asked(
        in_flight=sum(each.in_flight for each in demands),
        queued=sum(each.queued for each in demands),
        arrivals_total=sum(each.arrivals_total for each in demands),
        panicking=any(each.panicking for each in told),
        kv_target=min((each.kv_target for each in told), default=1.0),
    )


def _takes(record: ReplicaRecord) -> bool:
    return record.state is ReplicaState.READY and not record.asleep


def _seen(record: ReplicaRecord) -> ReplicaSeen:
    return ReplicaSeen(
        replica_id=record.replica_id,
        load=record.load,
        target_inputs=record.target_inputs,
        max_inputs=record.max_inputs,
    )


class RegionWatch:
    """The newest that the manager at `url` has told."""

    def __init__(self, url: str, clock: Clock) -> None:
        self._url = url.rstrip("/")
        self._clock = clock
        self._heard_s = float("-inf")
        self.groups: dict[str, Group] = {}
        self.demand: DemandReport | None = None
        self.demand_s = float("-inf")

    def age_s(self) -> float:
        """Return how old the older half of the news is."""
        return self._clock.now_s() - min(self._heard_s, self.demand_s)

    async def follow(self, session: aiohttp.ClientSession) -> None:
        """Watch the fleet for ever; while the manager is away, the last that it said stands."""
        while True:
            with suppress(*_FAULTS):
                await self._follow_once(session)
            await asyncio.sleep(RECONNECT_S)

    async def _follow_once(self, session: aiohttp.ClientSession) -> None:
        timeout = aiohttp.ClientTimeout(sock_connect=CONNECT_TIMEOUT_S, sock_read=SILENCE_S_MAX)
        async with session.get(
            self._url + FLEET_WATCH_PATH, timeout=timeout, read_bufsize=SNAPSHOT_BYTES_MAX
        ) as response:
            response.raise_for_status()
            async for line in response.content:
                self._heard_s = self._clock.now_s()
                if line.strip():
                    self.groups = groups_of(decode_snapshot(line))

    async def ask(self, session: aiohttp.ClientSession) -> None:
        """Ask what there is to do for others at this moment."""
        with suppress(*_FAULTS):
            timeout = aiohttp.ClientTimeout(total=CONNECT_TIMEOUT_S)
            async with session.get(self._url + DEMAND_PATH, timeout=timeout) as response:
                response.raise_for_status()
                self.demand = msgspec.json.decode(await response.read(), type=DemandReport)
                self.demand_s = self._clock.now_s()
