"""What is known of other regions: the links to their proxies, their summaries, how far they are.

A remote is a proxy that the configuration names. Its link is whichever of both sides has dialled;
which one that is, its own answer to our call has said. It counts as linked while its summary is
young. TCP may hang for minutes where a path is cut, so nothing waits for it: a remote whose summary
is old is left in the same moment, and its connection is given up a little later, so that a fresh
one is there as soon as the path is.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Mapping
from typing import Final

import msgspec

from proxy.config import ProxyConfig
from proxy.contract.regions import (
    SUMMARY_AGE_S_MAX,
    SUMMARY_BYTES_MAX,
    SUMMARY_INTERVAL_S,
    ModelSummary,
    RegionSummary,
    RemoteState,
    decode_summary,
    encode_summary,
)
from proxy.core import peer_wire
from proxy.io import control
from proxy.io.peer_link import PeerLink
from proxy.io.telemetry import Sample

_log = logging.getLogger("doherty.regions")

TOLD_PAUSE_S = 0.02  # the summaries that come within so long are told to workers together
GIVEN_UP_S: Final = 2 * SUMMARY_AGE_S_MAX


class _Linked:
    """One link to a proxy of another region."""

    def __init__(self, link: PeerLink, now_s: float) -> None:
        self.link = link
        self.summary: RegionSummary | None = None
        self.at_s = now_s  # of the summary; before the first, of the link

    def is_young(self, now_s: float) -> bool:
        return self.summary is not None and now_s - self.at_s <= SUMMARY_AGE_S_MAX


class _Remote:
    """One proxy that the configuration names."""

    def __init__(self, name: str, region: str, url: str) -> None:
        self.name = name
        self.region = region
        self.url = url
        self.proxy_id = b""  # of its present life; empty: we have not reached it yet
        self.since_s = 0.0  # when it became linked; 0: it is not
        self.left_s = 0.0  # when it ceased to be; 0: it is, or never was


class Regions:
    """All that one proxy knows of other regions, told to its workers."""

    def __init__(
        self,
        tell: Callable[[control.Message], None],
        summary: Callable[[], Mapping[str, ModelSummary] | None],
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        """`summary()` returns what there is here, for others; None: nobody would serve them."""
        self.draining = False  # this proxy is: nobody should send anything here
        self._tell = tell
        self._summary = summary
        self._now_s = now_s
        self._region = ""
        self._ours = b""
        self._remotes: dict[str, _Remote] = {}  # by the address of its links
        self._links: dict[bytes, _Linked] = {}  # by the other's name
        self._sequence = 0
        self._news = asyncio.Event()

    def know(self, config: ProxyConfig, ours: bytes) -> None:
        """These are the remotes from now on; `ours` names the life of this proxy."""
        before, self._remotes = self._remotes, {}
        self._region, self._ours = config.region, ours
        numbers: dict[str, int] = {}
        for each in config.access.remote_regions:
            number = numbers.get(each.region, 0)
            numbers[each.region] = number + 1
            remote = _Remote(f"{each.region}#{number}", each.region, each.url)
            known = before.get(each.peer)
            if known is not None and known.region == remote.region:
                remote.proxy_id, remote.since_s = known.proxy_id, known.since_s
                remote.left_s = known.left_s
            self._remotes[each.peer] = remote
        if self._remotes or before:
            self._news.set()

    def places(self) -> dict[str, str]:
        """Return the region of each address at which a remote is to be dialled."""
        return {address: remote.region for address, remote in self._remotes.items()}

    # --- links -------------------------------------------------------------------------------

    def met(self, address: str, proxy_id: bytes) -> None:
        """Who answers at this address is that one now."""
        remote = self._remotes.get(address)
        if remote is not None and remote.proxy_id != proxy_id:
            remote.proxy_id = proxy_id
            self._news.set()

    def link(self, link: PeerLink) -> None:
        """A proxy of another region has shown who it is."""
        self._links[link.peer_id] = _Linked(link, self._now_s())
        if frame := self._frame():
            _send(link, frame)
        link.beat()

    def unlink(self, link: PeerLink) -> None:
        """It is gone, or its link is."""
        linked = self._links.get(link.peer_id)
        if linked is not None and linked.link is link:
            del self._links[link.peer_id]
            self._news.set()

    def hear(self, link: PeerLink, octets: bytes) -> None:
        """A summary has come. Raises `WireError`."""
        linked = self._links.get(link.peer_id)
        if linked is None or linked.link is not link:
            return
        try:
            summary = decode_summary(octets)
        except (msgspec.MsgspecError, ValueError) as fault:  # text that is no UTF-8 is the latter
            raise peer_wire.WireError("its summary cannot be read") from fault
        if summary.region != link.region:
            raise peer_wire.WireError(f"it speaks for {summary.region!r}")
        linked.summary, linked.at_s = summary, self._now_s()
        self._news.set()

    # --- time --------------------------------------------------------------------------------

    async def run(self) -> None:
        """Tell others and our workers, until cancelled."""
        while True:
            due_s = self._now_s() + SUMMARY_INTERVAL_S
            self.tick()
            while (left_s := due_s - self._now_s()) > 0.0:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(left_s):
                        await self._news.wait()
                if self._news.is_set():
                    self._news.clear()
                    self.tell_workers()
                    await asyncio.sleep(TOLD_PAUSE_S)

    def tick(self) -> None:
        """Say what there is here, and see who has long said nothing."""
        now_s = self._now_s()
        for linked in list(self._links.values()):
            if now_s - linked.link.heard_s > GIVEN_UP_S:
                linked.link.fail("it is silent")
            else:
                linked.link.beat()
        self.say_now()
        if self._remotes:
            self.tell_workers()

    def say_now(self) -> None:
        """Tell all others what there is here."""
        if self._links and (frame := self._frame()):
            for linked in self._links.values():
                _send(linked.link, frame)

    def tell_workers(self) -> None:
        self._tell(control.RemotesAre(self.states(), self._ours))

    def _frame(self) -> bytes:
        """Return what to tell; nothing, where nobody would serve: to be silent is to be left."""
        models = self._summary()
        if models is None and not self.draining:
            return b""
        self._sequence += 1
        told = dict(models or {})
        while True:
            summary = RegionSummary(
                region=self._region, sequence=self._sequence, draining=self.draining, models=told
            )
            octets = encode_summary(summary)
            if len(octets) < SUMMARY_BYTES_MAX:
                return peer_wire.write_message(peer_wire.SUMMARY, octets)
            told = dict(list(told.items())[: len(told) // 2])  # thousands of the longest names

    # --- what is known -----------------------------------------------------------------------

    def states(self) -> list[RemoteState]:
        """Return what is known now of each remote."""
        now_s = self._now_s()
        return [self._state(remote, now_s) for remote in self._remotes.values()]

    @property
    def serve(self) -> bool:
        """Whether a request that nobody here can take would be served in another region."""
        return any(
            model.awake or model.coming or model.wakes
            for state in self.states()
            if state.linked and state.summary is not None and not state.summary.draining
            for model in state.summary.models.values()
        )

    def _state(self, remote: _Remote, now_s: float) -> RemoteState:
        linked = self._links.get(remote.proxy_id)
        is_young = linked is not None and linked.is_young(now_s)
        if is_young != (remote.since_s > 0.0):
            remote.since_s, remote.left_s = (now_s, 0.0) if is_young else (0.0, now_s)
            if is_young:
                _log.info("%s is linked", remote.name)
            else:
                _log.warning("%s is left: nothing is heard of it", remote.name)
        if linked is None:
            return RemoteState(
                name=remote.name,
                region=remote.region,
                url=remote.url,
                proxy_id=remote.proxy_id,
                left_s=remote.left_s,
            )
        return RemoteState(
            name=remote.name,
            region=remote.region,
            url=remote.url,
            linked=is_young,
            since_s=remote.since_s,
            left_s=remote.left_s,
            round_trip_s=linked.link.round_trip_s,
            proxy_id=remote.proxy_id,
            at_s=linked.at_s,
            summary=linked.summary,
        )

    def samples(self) -> list[Sample]:
        """Return gauges."""
        out, now_s = [], self._now_s()
        for state in self.states():
            by = (("remote", state.name), ("region", state.region))
            out.append(Sample("remote_linked", by, float(state.linked)))
            out.append(Sample("remote_round_trip_seconds", by, state.round_trip_s))
            if state.summary is not None:
                out.append(Sample("remote_summary_age_seconds", by, now_s - state.at_s))
                out.append(Sample("remote_draining", by, float(state.summary.draining)))
        return out


def _send(link: PeerLink, frame: bytes) -> None:
    if link.waiting_bytes <= SUMMARY_BYTES_MAX:  # a path that is behind gets the next one
        link.send(frame)
