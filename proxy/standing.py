"""How this proxy stands: all that the admin listener tells, from whoever knows it.

Reading changes nothing, except that the longest lateness since the last reading begins anew: that
of `/metrics` and that of the view, each for itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from proxy.config import ProxyConfig
from proxy.contract import NO_REGION, FleetSnapshot, ReplicaState
from proxy.contract.regions import RemoteState
from proxy.contract.version import package_version
from proxy.contract.view import ProxyView
from proxy.figures import Figures
from proxy.io.control import HotPrefix
from proxy.io.estate import Estate
from proxy.io.hub import Hub
from proxy.io.lookout import Lookout
from proxy.io.operating import shown_url
from proxy.io.peers import Peers
from proxy.io.quota_keeper import QuotaKeeper
from proxy.io.regions import Regions
from proxy.io.telemetry import Sample
from proxy.io.teller import Teller
from proxy.io.wanting import Wanting
from proxy.io.witness import Witness
from proxy.places import Places
from proxy.roster import Roster


class Standing:
    """The supervisor's parts as the admin listener sees them."""

    def __init__(
        self,
        config: ProxyConfig,
        *,
        places: Places,
        roster: Roster,
        lookout: Lookout,
        regions: Regions,
        hub: Hub,
        figures: Figures,
        others: tuple[Peers, Teller, Wanting, Witness, QuotaKeeper],
        on_fleet: Callable[[FleetSnapshot | None], None],
    ) -> None:
        """`on_fleet` is told when the fleet has changed by what an operator wishes."""
        self.config = config  # the supervisor keeps both of these up to date
        self.draining = False
        self.can_drain: str | None = None
        self.estate = Estate(others[0], self.counters)
        self._places = places
        self._roster = roster
        self._lookout = lookout
        self._regions = regions
        self._hub = hub
        self._figures = figures
        self._others = others
        self._on_fleet = on_fleet

    def ready(self) -> str | None:
        """Return None when ready, else the reason why not."""
        if self.draining:
            return "draining"
        if not self._places.ready_count:
            return "no worker is up yet"
        suspects = self.suspects()
        fleet = self._roster.fleet
        replicas = fleet.replicas if fleet else ()
        able = [r for r in replicas if r.state is ReplicaState.READY]
        if fleet and any(pool.wakes for pool in fleet.pools):
            return None  # who comes is held, and brings up what he waits for
        jobs_only = fleet and not (fleet.replicas or fleet.pools)
        if jobs_only and self.config.offline_url is not None:
            return None
        here = [r for r in able if r.replica_id not in suspects]
        if not here and not self._regions.serve:
            return "no replica can take a request"
        return None

    def fleet(self) -> FleetSnapshot | None:
        return self._roster.fleet

    def suspects(self) -> frozenset[str]:
        return self._lookout.prober.suspects

    def manager_url(self) -> str | None:
        return self.config.manager_url

    def held(self) -> frozenset[str]:
        return self._roster.held

    def hold(self, held: frozenset[str]) -> None:
        """Have these replicas drain from now on, and no others."""
        self._on_fleet(self._roster.hold(held))

    def remotes(self) -> list[RemoteState]:
        return self._regions.states()

    def proxy(self) -> ProxyView:
        """Return what the proxy is, without what is counted."""
        config, fleet = self.config, self._roster.fleet
        return ProxyView(
            version=package_version(),
            policy=config.policy,
            region=fleet.region if fleet and config.region == NO_REGION else config.region,
            workers=self._places.ready_count,
            not_ready=self.ready(),
            draining=self.draining,
            fleet_age_s=round(self._lookout.silence_s(), 3) if fleet else None,
            manager_url=shown_url(config.manager_url) if config.manager_url else None,
            can_drain=self.can_drain,
        )

    # --- counts ------------------------------------------------------------------------------

    async def samples(self) -> tuple[list[Sample], list[Sample]]:
        """Return counters and gauges of all workers, unsummed, and those of the supervisor."""
        peers, teller, wanting, witness, quotas = self._others
        counters, gauges = await self._places.samples()
        told, linked = self._hub.samples()
        extra = [
            self._lookout.samples(),
            self._figures.samples(self._places.pids()),
            ([], wanting.samples()),
        ]
        counters += [*told, *peers.samples(), *teller.samples(), *self.estate.samples()]
        gauges += [
            *linked,
            *witness.samples(),
            *self._regions.samples(),
            *quotas.samples(),
        ]
        for counted, gauged in extra:
            counters += counted
            gauges += gauged
        age_s = time.monotonic() - self._roster.at_s
        return counters, [*gauges, Sample("fleet_age_seconds", (), age_s)]

    async def counters(self) -> list[Sample]:
        """Return what a proxy that takes over goes on from."""
        return (await self.samples())[0]

    def counted(self) -> tuple[list[Sample], list[Sample]]:
        """Return counters and gauges as the workers told them last, unsummed."""
        counters, gauges = self._places.counted()
        return counters, [*gauges, *self._others[3].samples()]

    def hot(self) -> list[HotPrefix]:
        """Return what is hot in each of the workers, as they told it last."""
        return self._places.hot()

    async def recount(self) -> None:
        """Have the workers tell all of this anew."""
        await self._places.count(hot=True)

    def take_lag_s(self) -> float:
        """Return the longest lateness of a worker's timers since this was asked last."""
        return self._places.take_lag_s()

    async def explain(
        self, path: bytes, fields: list[tuple[bytes, bytes]], body: bytes
    ) -> tuple[int, bytes] | None:
        return await self._places.explain(path, fields, body)
