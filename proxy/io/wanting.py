"""Carries between the manager here and other regions' proxies what the regions ask of each other.

What is asked is a whole, said again every `WANTED_INTERVAL_S` and at once when it grows, so that
nothing is lost by a frame that is, and what is not said again is wanted no more: a path that is cut
leaves no replica running for nobody.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence

import msgspec

from proxy.config import ProxyConfig
from proxy.contract import FleetSnapshot, PoolRecord
from proxy.contract.regions import (
    WANTED_BYTES_MAX,
    WANTED_INTERVAL_S,
    Wanted,
    decode_wanted,
    encode_wanted,
)
from proxy.core import peer_wire
from proxy.core.demand import sum_models
from proxy.core.wanting import Between, asked_of, elsewhere_of, summed, wanted_by
from proxy.io.control import Demanded
from proxy.io.peer_link import PeerLink
from proxy.io.peers import Peers
from proxy.io.regions import Regions
from proxy.io.telemetry import Sample
from proxy.io.teller import Teller


class Wanting:
    """What this region asks of others, and they of it."""

    def __init__(
        self,
        peers: Peers,
        regions: Regions,
        teller: Teller,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._peers = peers
        self._regions = regions
        self._teller = teller
        self._now_s = now_s
        self._region = ""
        self._allowed: dict[str, frozenset[str]] = {}
        self._pools: tuple[PoolRecord, ...] = ()
        self._heard: dict[bytes, tuple[Wanted, float]] = {}  # by the life of the proxy that said it
        self._said: dict[bytes, dict[str, float]] = {}
        self._news = asyncio.Event()
        peers.listen(peer_wire.WANTED, self.hear)
        teller.between = self.between

    def look(self, config: ProxyConfig) -> None:
        """Go on as `config` says."""
        self._region = config.region
        self._allowed = {
            model: frozenset(access.regions)
            for model, access in config.access.models.items()
            if access.regions
        }

    def know(self, snapshot: FleetSnapshot) -> None:
        """The manager has decided anew."""
        self._pools = snapshot.pools
        self._news.set()

    async def run(self) -> None:
        """Say what is asked, until cancelled."""
        while True:
            due_s = self._now_s() + WANTED_INTERVAL_S
            self.say()
            while (left_s := due_s - self._now_s()) > 0.0:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(left_s):
                        await self._news.wait()
                if self._news.is_set():  # snapshots may come more often than the interval passes
                    self._news.clear()
                    self.say(news_only=True)

    def say(self, *, news_only: bool = False) -> None:
        """Say to each other region what is asked of it; nothing, once, when that has ended."""
        links = self._peers.links(abroad=True)
        before, self._said = self._said, {}
        for link in links:
            said = before.get(link.peer_id, {})
            asked = asked_of(self._pools, link.region)
            self._said[link.peer_id] = asked
            if (asked != said if news_only else asked or said) and not link.waiting_bytes:
                octets = encode_wanted(Wanted(region=self._region, models=asked))
                if len(octets) < WANTED_BYTES_MAX:
                    link.send(peer_wire.write_message(peer_wire.WANTED, octets))

    def hear(self, link: PeerLink, octets: bytes) -> None:
        """Another region asks for something. Raises `WireError`."""
        try:
            wanted = decode_wanted(octets)
        except (msgspec.MsgspecError, ValueError) as fault:  # text that is no UTF-8 is the latter
            raise peer_wire.WireError("what it asks for cannot be read") from fault
        if wanted.region != link.region:
            raise peer_wire.WireError(f"it asks for {wanted.region!r}")
        before = self._heard.get(link.peer_id)
        present = {each.peer_id for each in self._peers.links(abroad=True)}
        self._heard = {peer: said for peer, said in self._heard.items() if peer in present}
        self._heard[link.peer_id] = wanted, self._now_s()
        if before is None or before[0].models != wanted.models:
            self._teller.hurry()

    def between(self, told: Sequence[Demanded]) -> Between:
        """Return what others could do and what they ask, for the manager; `told` by workers."""
        wanted = wanted_by(self._heard.values(), self._now_s())
        states = self._regions.states()
        if not states:
            return {}, wanted
        models = sum_models(one.models for one in told)
        queued = {model: one.queued for model, one in models.items()}
        abroad, bound = summed(one.abroad for one in told), summed(one.bound for one in told)
        return elsewhere_of(states, queued, abroad, bound, self._allowed), wanted

    def samples(self) -> list[Sample]:
        """Return gauges."""
        out, models = [], {pool.model for pool in self._pools}
        for model, by_region in wanted_by(self._heard.values(), self._now_s()).items():
            for region, inputs in by_region.items() if model in models else ():
                out.append(Sample("wanted_here_inputs", _labels(model, region), inputs))
        for pool in self._pools:
            for region, inputs in pool.wanted.items():
                out.append(Sample("wanted_elsewhere_inputs", _labels(pool.model, region), inputs))
        return out


def _labels(model: str, region: str) -> tuple[tuple[str, str], ...]:
    return (("model", model), ("region", region))
