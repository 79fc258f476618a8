"""What every keeper of a manager shares."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import msgspec

from backends.cards import Cards
from backends.clock import Clock
from backends.engines.base import Engine
from backends.fetch import Fetch
from backends.journal import Entry, Journal
from backends.lifecycle import Timing
from backends.log import Log
from backends.moves import Follows, Nobody
from backends.ports import PortLeases
from backends.providers.base import Provider
from backends.snapshots.absent import NobodyTells, NoSnapshots, NoSuspender
from backends.snapshots.base import Snapshots, Suspender
from backends.snapshots.shelf import Shelf
from backends.spec import ReplicaSpec
from backends.warm import Warmer


class Demanded(Protocol):
    """What the proxies say that they have on replicas."""

    def in_flight(self, replica_id: str) -> int | None:
        """Return the requests of all proxies on this one; None: no proxy tells."""

    def expire(self, now_s: float) -> None:
        """Forget the proxies that have been silent for too long."""


class Surroundings(msgspec.Struct, frozen=True):
    """Where time, processes, answers, ports, GPUs and memory come from, and what is configured."""

    clock: Clock
    provider: Provider
    fetch: Fetch
    journal: Journal
    ports: PortLeases
    cards: Cards
    warmer: Warmer
    log: Log
    log_folder: Path
    region: str
    scrape_interval_s: float
    backoff_s: float
    backoff_s_max: float
    changed: Callable[[], None]
    suspender_of: Callable[[Engine], Suspender] = lambda _engine: NoSuspender()
    snapshots: Snapshots = NoSnapshots()
    demand: Demanded = NobodyTells()
    moves: Follows = Nobody()
    shelf: Shelf = msgspec.field(default_factory=Shelf)

    def timing(self, spec: ReplicaSpec) -> Timing:
        """Return the waits of a replica."""
        return Timing(
            start_timeout_s=spec.start_timeout_s,
            stop_grace_s=spec.stop_grace_s,
            backoff_s=self.backoff_s,
            backoff_s_max=self.backoff_s_max,
        )

    def note(self, entry: Entry) -> None:
        """Note what has happened; it has happened whether or not the disk takes the note."""
        try:
            self.journal.append(entry)
        except OSError as error:
            self.log.fault("journal_failed", error=str(error))
