"""What tenants use beyond the workers of this proxy: at other proxies, and before this one began.

The supervisor's part in the counts. A few times a second it tells other proxies what the workers
here have, and writes into its own column of their memory what the others have told, with what was
used of the day before this process began. Every so often it keeps the day's sums in a file
(`quota_path`), so that neither an end nor a kill begins the day anew.

A proxy that takes over hears the sums of the one before like any other's, over the link between the
two; when that one ends, its day becomes part of what was before this process began.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Callable
from collections.abc import Set as AbstractSet
from typing import Final

from proxy.config import ProxyConfig
from proxy.core import claim_limits, peer_wire, quota
from proxy.core.admission import NANO
from proxy.core.quota import Row
from proxy.core.quota_sums import (
    COUNT_MAX,
    LIVES_MAX,
    Elsewhere,
    Sums,
    read_telling,
    write_tellings,
)
from proxy.io.peer_link import PeerLink
from proxy.io.peers import PREDECESSOR, Peers
from proxy.io.quota_file import DaySums, read_sums, write_sums
from proxy.io.quota_memory import QuotaMemory
from proxy.io.telemetry import Sample

_log = logging.getLogger("doherty.quotas")

# What proxies know of each other is no older than this and the way between them.
TELL_INTERVAL_S: Final = 0.1
# A proxy that is killed forgets no more of the day than it counted in this time.
KEEP_INTERVAL_S: Final = 1.0
_BEHIND_BYTES: Final = 256 * 1024  # a link that does not take this is told all of it later


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
        self._predecessor = b""
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
            await asyncio.sleep(TELL_INTERVAL_S)
            self.tick()
            if self._now_s() >= due_s:
                due_s = self._now_s() + KEEP_INTERVAL_S
                await self.keep()

    def leave(self) -> None:
        """Another goes on with the file, and hears what still happens here."""
        self._keeps = False

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
            if life == self._predecessor:
                self._inherit(life)
        for life, link in links.items():
            if self._links.get(life) is not link:
                self._behind.add(life)
            if link.name == PREDECESSOR:
                self._predecessor = life
        self._links = links

    def _inherit(self, life: bytes) -> None:
        """The proxy before this one has ended: its day is ours to tell and to keep."""
        told = self._elsewhere.told_by(life)
        self._predecessor = b""
        if self._awaits and not told:
            self._begin(read_sums(self._path) if self._path is not None else DaySums())
            return
        days = {
            name: (s.day_tokens, s.day_cost) for name, s in told.items() if s.day == self._today
        }
        self._elsewhere.carry(life)
        self._begin(DaySums(self._today, [*self._before.lives, life.hex()], days))

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
        self._elsewhere.hear(link.peer_id, read_telling(octets))
        if link.name == PREDECESSOR:
            self._awaits = False
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
        """Return what is to outlive us: ours, and what the proxy before us has had until now."""
        days = {s.tenant: (s.day_tokens, s.day_cost) for s in self._told.values()}
        lives = [*self._before.lives, self._peers.proxy_id.hex()]
        if self._predecessor:
            lives.append(self._predecessor.hex())
            for name, sums in self._elsewhere.told_by(self._predecessor).items():
                if sums.day == self._today:
                    tokens, cost = days.get(name, (0, 0))
                    both = tokens + sums.day_tokens, cost + sums.day_cost
                    days[name] = (min(COUNT_MAX, both[0]), min(COUNT_MAX, both[1]))
        tenants = {name: sums for name, sums in days.items() if any(sums)}
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
