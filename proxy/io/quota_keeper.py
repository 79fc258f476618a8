"""What tenants use beyond the workers of this proxy: at other proxies, and before this one began.

The supervisor's part in the counts. A few times a second it tells other proxies what the workers
here have, and writes into its own column of their memory what the others have told, with what was
used of the day before this process began. Every so often it keeps the day's sums in a file
(`quota_path`), so that neither an end nor a kill begins the day anew.

A proxy that takes over hears the sums of the one before like any other's, over the link between the
two, and has that one's day as part of what was before this process began. Nothing of a day is lost
on the way: the one before keeps the file once more before it says that it leaves, and does not end
before the new one has read all that it told; where no link came to be, the file is read.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import Callable
from collections.abc import Set as AbstractSet
from typing import Final

from proxy.config import ProxyConfig
from proxy.core import claim_limits, limits, peer_wire, quota
from proxy.core.admission import NANO
from proxy.core.quota import Row
from proxy.core.quota_sums import (
    COUNT_MAX,
    LIVES_MAX,
    Elsewhere,
    Sums,
    Telling,
    read_telling,
    write_tellings,
)
from proxy.io.peer_link import PeerLink
from proxy.io.peers import PREDECESSOR, SUCCESSOR, Peers
from proxy.io.quota_file import DaySums, read_sums, write_sums
from proxy.io.quota_memory import QuotaMemory
from proxy.io.tasks import beat
from proxy.io.telemetry import Sample

_log = logging.getLogger("doherty.quotas")

# What proxies know of each other is no older than this and the way between them.
TELL_INTERVAL_S: Final = 0.1
# A proxy that is killed forgets no more of the day than it counted in this time.
KEEP_INTERVAL_S: Final = 1.0
_BEHIND_BYTES: Final = 256 * 1024  # a link that does not take this is told all of it later
# A successor that is still greeting its predecessor has this long; only one that hangs needs it.
FAREWELL_TIMEOUT_S: Final = limits.PEER_HANDSHAKE_TIMEOUT_S + 1.0


class QuotaKeeper:
    """The counts of all tenants, as the supervisor has them."""

    def __init__(
        self,
        memory: QuotaMemory,
        peers: Peers,
        *,
        takes_over: bool = False,
        now_s: Callable[[], float] = time.monotonic,
        unix_s: Callable[[], float] = time.time,
    ) -> None:
        self._memory = memory
        self._peers = peers
        self._now_s, self._unix_s = now_s, unix_s
        self._elsewhere = Elsewhere()
        self._before = DaySums()  # of the day, and of proxies whose work this one goes on with
        self._told: dict[str, Sums] = {}  # what we told last
        self._links: dict[bytes, PeerLink] = {}
        self._behind: set[bytes] = set()  # they have missed something
        self._awaits = takes_over  # what was before has not been heard yet
        self._path: str | None = None
        self._keeps = True  # the file is ours to write
        self._keeping = asyncio.Lock()  # at the end, beside one that has not ended yet
        self._kept = DaySums()
        self._today = quota.day_at(unix_s())
        peers.listen(peer_wire.QUOTAS, self._hear)

    def know(self, config: ProxyConfig) -> None:
        """Go on as `config` says; what was kept is read once."""
        path, self._path = self._path, config.quota_path
        if self._path is None:
            if any(t.tokens_per_day or t.budget_per_day is not None for t in config.access.tenants):
                _log.warning(
                    "the day of tenants with daily limits begins anew with each start; "
                    "quota_path names a file that keeps it"
                )
        elif path is None and not self._awaits and not self._before.lives:
            self._begin(read_sums(self._path))

    def _begin(self, sums: DaySums) -> None:
        """Go on with a day of before."""
        self._awaits = False
        if sums.day == self._today:
            self._before = sums
            self._touch(set(sums.tenants))
        self._told.clear()  # all hear whose sums ours are

    async def run(self) -> None:
        """Tell and keep until cancelled."""
        due_s = self._now_s() + KEEP_INTERVAL_S
        while True:
            needed = self._awaits or self._peers.links() or self._memory.rows()
            await beat(TELL_INTERVAL_S if needed else KEEP_INTERVAL_S)
            self.tick()
            if self._now_s() >= due_s:
                due_s = self._now_s() + KEEP_INTERVAL_S
                await self.keep()

    async def leave(self) -> None:
        """Another goes on with the file as it is now, and hears what still happens here."""
        self.tick()
        await self.keep()
        self._keeps = False

    async def farewell(self) -> None:
        """Keep and tell for the last time; return once a successor has read it."""
        self.tick()
        await self.keep()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FAREWELL_TIMEOUT_S):
                await self._tell_last()

    async def _tell_last(self) -> None:
        while True:
            successor = next(
                (link for link in self._links.values() if link.name == SUCCESSOR), None
            )
            if successor is not None and successor.peer_id not in self._behind:
                break
            if successor is None and not self._peers.greets(SUCCESSOR):
                return
            await asyncio.sleep(TELL_INTERVAL_S)
            self.tick()
        successor.end_writing()
        await successor.ended.wait()  # it has read to the end, and ends it, too

    # --- what is told, and heard -------------------------------------------------------------

    def tick(self) -> None:
        """See who is linked, tell what has changed, write what is known of others."""
        now_s, today = self._now_s(), quota.day_at(self._unix_s())
        if today != self._today:
            self._today, self._before = today, DaySums()
            self._touch(set(self._memory.rows()))
        rows = self._memory.rows()
        self._touch(rows.keys() - self._told.keys())  # others may know them, or the file
        self._see_links(now_s)
        changed = [sums for name, row in rows.items() if (sums := self._changed(name, row))]
        if changed or self._behind:
            self._tell(changed)
        self._elsewhere.sweep(now_s, today)
        self._touch(self._elsewhere.take_touched() & rows.keys())

    def _see_links(self, now_s: float) -> None:
        links = {link.peer_id: link for link in self._peers.links()}
        for life in self._links.keys() - links.keys():
            self._elsewhere.gone(life, now_s)
            self._behind.discard(life)
            del self._links[life]
        for link in links.values():
            self._meet(link)
        if self._awaits and self._peers.is_over(PREDECESSOR):  # and nothing was heard over it
            self._begin(read_sums(self._path) if self._path is not None else DaySums())

    def _meet(self, link: PeerLink) -> None:
        """A link that is new is told all, and its end is seen, however short it was."""
        if self._links.get(link.peer_id) is not link:
            self._links[link.peer_id] = link
            self._behind.add(link.peer_id)

    def _follow(self, life: bytes, telling: Telling) -> None:
        """The day of the proxy before is ours to tell and to keep, while it goes on, too."""
        self._awaits = False
        self._elsewhere.carry(life)
        before = self._before.tenants if self._before.day == self._today else {}
        news = {s.tenant: (s.day_tokens, s.day_cost) for s in telling.sums if s.day == self._today}
        lives = dict.fromkeys([*(each.hex() for each in telling.lives), life.hex()])
        self._before = DaySums(self._today, list(lives)[-LIVES_MAX:], {**before, **news})

    def _changed(self, name: str, row: Row) -> Sums | None:
        """Return what our workers have of a tenant, if that was not told so."""
        tokens, cost = self._before.tenants.get(name, (0, 0))

        def ours(kind: int) -> int:  # where a worker that died was writing it may be below 0
            return min(COUNT_MAX, max(0, row.sum_of_workers(kind)))

        sums = Sums(
            name,
            ours(quota.REQUESTS),
            ours(quota.TOKENS),
            ours(quota.CONCURRENT),
            ours(quota.HELD_TOKENS),
            ours(quota.HELD_COST),
            self._today,
            min(COUNT_MAX, tokens + row.of_day(quota.DAY_TOKENS, self._today, workers_only=True)),
            min(COUNT_MAX, cost + row.of_day(quota.DAY_COST, self._today, workers_only=True)),
        )
        if self._told.get(name) == sums:
            return None
        self._told[name] = sums
        return sums

    def _tell(self, changed: list[Sums]) -> None:
        lives = [bytes.fromhex(life) for life in self._before.lives]
        news = [
            peer_wire.write_message(peer_wire.QUOTAS, m) for m in write_tellings(lives, changed)
        ]
        for life, link in self._links.items():
            if link.waiting_bytes > _BEHIND_BYTES:
                self._behind.add(life)
            elif life in self._behind:
                self._behind.discard(life)
                for message in write_tellings(lives, list(self._told.values())):
                    link.send(peer_wire.write_message(peer_wire.QUOTAS, message))
            elif changed:
                for frame in news:
                    link.send(frame)

    def _hear(self, link: PeerLink, octets: bytes) -> None:
        """A proxy tells of its tenants. Raises `WireError`."""
        telling = read_telling(octets)
        self._meet(link)
        self._elsewhere.hear(link.peer_id, telling)
        if link.name == PREDECESSOR:
            self._follow(link.peer_id, telling)
        self._touch(self._elsewhere.take_touched() & self._memory.rows().keys())

    def _touch(self, tenants: AbstractSet[str]) -> None:
        """Write what others have of these tenants, with what was before, for our workers."""
        rows = self._memory.rows() if tenants else {}
        for name in tenants & rows.keys():
            others = self._elsewhere.total(name, self._now_s(), self._today)
            tokens, cost = self._before.tenants.get(name, (0, 0))
            row = rows[name]
            row.put(quota.REQUESTS, others.requests)
            row.put(quota.TOKENS, others.tokens)
            row.put(quota.CONCURRENT, others.concurrent)
            row.put(quota.HELD_TOKENS, others.held_tokens)
            row.put(quota.HELD_COST, others.held_cost)
            row.put(quota.DAY_TOKENS, others.day_tokens + tokens)
            row.put(quota.DAY_COST, others.day_cost + cost)
            row.put(quota.DAY, self._today)

    # --- what is kept ------------------------------------------------------------------------

    async def keep(self) -> None:
        """Write the file, if it is ours and anything has changed."""
        async with self._keeping:
            if self._path is None or not self._keeps or self._awaits:
                return
            sums = self._of_the_day()
            if sums == self._kept:
                return
            try:
                await asyncio.to_thread(write_sums, self._path, sums)
                self._kept = sums
            except OSError as error:
                _log.error("quota_path: %s cannot be written: %s", self._path, error)

    def _of_the_day(self) -> DaySums:
        """Return what is to outlive us: ours, with what was before."""
        days = {s.tenant: (s.day_tokens, s.day_cost) for s in self._told.values()}
        tenants = {name: sums for name, sums in (self._before.tenants | days).items() if any(sums)}
        lives = [*self._before.lives, self._peers.proxy_id.hex()]
        return DaySums(self._today, lives[-LIVES_MAX:], tenants)

    # --- what is reported --------------------------------------------------------------------

    def samples(self) -> list[Sample]:
        """Return gauges: what counts for each limited tenant, wherever it was used."""
        out = []
        for name, row in itertools.islice(
            self._memory.rows().items(), claim_limits.TENANT_SERIES_MAX
        ):
            by = (("tenant", name),)
            cost = row.of_day(quota.DAY_COST, self._today) / NANO
            out += [
                Sample("tenant_minute_requests", by, row.sum(quota.REQUESTS)),
                Sample("tenant_minute_tokens", by, row.sum(quota.TOKENS)),
                Sample("tenant_concurrent", by, row.sum(quota.CONCURRENT)),
                Sample("tenant_day_tokens", by, row.of_day(quota.DAY_TOKENS, self._today)),
                Sample("tenant_day_cost", by, cost),
            ]
        return out
