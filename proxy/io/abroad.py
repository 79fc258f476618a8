"""Other regions, as one worker knows them: a place in its picture for each, and news of them.

They come several times a second and mostly change figures alone. Only other proxies, or other
models of theirs, make another fleet; everything else is written where prices are read
(`core.outlook`), so that no ring, no seat and no record of a cache is made anew.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from proxy.config import ProxyConfig
from proxy.contract.regions import RemoteState
from proxy.core import fleet as fleets
from proxy.core.lease import Lease
from proxy.core.policy import Decision, Request
from proxy.core.regions import Place, permits, places_of, remotes_of
from proxy.core.replica import Replica
from proxy.errors import InternalError
from proxy.io.clock import Clock
from proxy.io.reading import Reading


class Abroad(Reading):
    """A choice that knows of other regions."""

    def __init__(self, config: ProxyConfig, clock: Clock) -> None:
        super().__init__(config, clock)
        self.remotes: tuple[RemoteState, ...] = ()
        self._places: list[Place] = []
        self.departures: dict[str, int] = {}  # requests that left, by model

    def seat(self) -> None:
        """Have a place in the picture for all that a request can be sent to."""
        fleet = self.fleet
        known = (*fleet.replicas.values(), *fleet.remotes.values())
        self.picture.know(known, self.clock.now_s())

    def take_remotes(self, states: Sequence[RemoteState]) -> frozenset[str] | None:
        """Know this of other regions from now on; return who has left or moved.

        None: they are the same, with the same models.
        """
        before, moved = self.fleet.remotes, None
        places = places_of(states, self._places, self.region)
        if places != self._places:
            self._places = places
            found = remotes_of(places)
            self.fleet = fleets.apply(self.fleet, fleets.RemotesReceived(found))
            self.seat()
            servers = {remote.replica_id: remote for remote in found}
            gone = {r.replica_id for r in before.values()} - servers.keys()
            moved = frozenset(gone | moved_of(before, servers))
            self.departures = {m: n for m, n in self.departures.items() if m in self.fleet.pools}
        self.remotes = tuple(states)
        self.picture.know_remotes(states)
        return moved

    def count_departure(self, lease: Lease, more: int) -> None:
        """Count a request that another region computes, and demand that is not this one's."""
        remote = self.fleet.remotes.get(lease.replica_name)
        if remote is not None:
            model = min(remote.models)
            self.departures[model] = self.departures.get(model, 0) + more

    def assert_permitted(self, decision: Decision, request: Request) -> None:
        """Refuse what may not be computed there, whoever has decided so: a fault of ours.

        Raises `InternalError`. Nothing gets past it, because every lease is taken behind it.
        """
        if not permits(request.regions, decision.replica):
            self._fault()
            raise InternalError("this request may not be computed where it was to be sent")


def moved_of(before: Mapping[str, Replica], servers: Mapping[str, Replica]) -> set[str]:
    """Return the servers that are at another address than they were."""
    return {
        r.replica_id
        for r in before.values()
        if r.replica_id in servers and not _same_place(r, servers[r.replica_id])
    }


def _same_place(one: Replica, other: Replica) -> bool:
    return (one.host, one.port, one.tls) == (other.host, other.port, other.tls)
