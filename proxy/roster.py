"""The fleet as this proxy takes it: what its source says, less what nobody could use or wants used.

Records that nobody can connect to are left out, so that one cannot spoil the rest. Where there is
no manager, an operator's wish that a replica drain is kept here: it takes nothing new and finishes
what it has, whatever its list says of it, until it is to serve again.
"""

from __future__ import annotations

import logging
import time

from msgspec import structs

from proxy.contract import HELD_REASON, FleetSnapshot, ReplicaRecord, ReplicaState
from proxy.io.registry import STATIC_EPOCH
from proxy.sources import Usable

_log = logging.getLogger("doherty.proxy")


class Roster:
    """One writer: the supervisor."""

    def __init__(self, held: frozenset[str] = frozenset()) -> None:
        self.fleet: FleetSnapshot | None = None
        self.at_s = time.monotonic()  # when it was heard of
        self.held = held  # replicas that an operator drains
        self._told: FleetSnapshot | None = None  # by the source
        self._usable = Usable()

    def take(self, snapshot: FleetSnapshot) -> FleetSnapshot | None:
        """Return the fleet by what its source says now; None: that is older than what is known."""
        known = self._told
        if known is not None and snapshot.epoch == known.epoch:
            if snapshot.version < known.version:
                return None
        elif known is not None:
            _log.info("a new manager speaks for the fleet")
        self._told = self._usable.of(snapshot)
        listed = self._told.replicas if snapshot.epoch == STATIC_EPOCH else ()
        self.held &= {record.replica_id for record in listed}  # a manager keeps its own
        self.at_s = time.monotonic()
        self.fleet = self._with_held(self._told)
        return self.fleet

    def hold(self, held: frozenset[str]) -> FleetSnapshot | None:
        """These replicas drain from now on, and no others; return the fleet, if there is one."""
        self.held = held
        if self._told is not None:
            self.fleet = self._with_held(self._told)
        return self.fleet

    def _with_held(self, snapshot: FleetSnapshot) -> FleetSnapshot:
        if not self.held:
            return snapshot
        replicas = tuple([self._of(record) for record in snapshot.replicas])
        return structs.replace(snapshot, replicas=replicas)

    def _of(self, record: ReplicaRecord) -> ReplicaRecord:
        if record.replica_id not in self.held:
            return record
        if record.state is not ReplicaState.READY:
            return structs.replace(record, held=True)
        return structs.replace(record, state=ReplicaState.DRAINING, reason=HELD_REASON, held=True)
