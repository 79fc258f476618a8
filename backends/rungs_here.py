"""Which rungs a pool may use on this machine, and how much memory is left for those that rest.

The configuration says which are allowed, the engine and the machine which of these work. What works
is asked again now and then, and whoever is asked finds out anew, beside us, what did not work: a
driver may have been loaded since.
"""

from __future__ import annotations

from collections.abc import Mapping

from backends.engines.base import Engine
from backends.host_memory import available_bytes, total_bytes
from backends.ladder import Rung, Rungs
from backends.spec import PoolSpec
from backends.surroundings import Surroundings

PROBE_S = 60.0
HOST_SHARE_KEPT = 1 / 16  # of the host's memory, which replicas at rest leave to those that serve


class RungsHere:
    """What works here, asked again every `PROBE_S`."""

    def __init__(self, around: Surroundings, engines: Mapping[str, Engine]) -> None:
        self._around = around
        self._engines = engines
        self._works: dict[tuple[str, bool], tuple[float, frozenset[Rung]]] = {}

    def of(self, pool: PoolSpec, launch_hash: str, *, imaged: bool) -> Rungs:
        """Return the ladder of one pool; `imaged`: there is an image of it."""
        works = self._probed(pool.first.engine, images=pool.first.snapshot)
        allowed = {Rung(name) for name in pool.autoscale.rungs} if pool.autoscale else set()
        if not pool.first.sleep:
            allowed.discard(Rung.ASLEEP)
        if not pool.first.snapshot:
            allowed.discard(Rung.SNAPSHOTTED)
        usable = frozenset(rung for rung in allowed if rung is Rung.ASLEEP or rung in works)
        return Rungs(
            launch_hash=launch_hash, engine=pool.first.engine, allowed=usable, imaged=imaged
        )

    def _probed(self, engine: str, *, images: bool) -> frozenset[Rung]:
        """Return what works of what may be wanted: to ask for images takes a second or two."""
        now_s = self._around.clock.now_s()
        due_s, works = self._works.get((engine, images), (now_s, frozenset()))
        if now_s >= due_s:
            found = set()
            if self._around.suspender_of(self._engines[engine]).probe().works:
                found.add(Rung.SUSPENDED)
            if images and self._around.snapshots.probe().works:
                found.add(Rung.SNAPSHOTTED)
            works = frozenset(found)
            self._works[engine, images] = now_s + PROBE_S, works
        return works


def host_bytes_free() -> int | None:
    """Return the memory that replicas at rest may still take; None where nobody says."""
    total = total_bytes()
    return available_bytes() - int(HOST_SHARE_KEPT * total) if total else None
