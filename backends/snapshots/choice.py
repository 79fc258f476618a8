"""Which suspension and which images a manager has, as its configuration says.

Both are for processes of this machine: what runs in containers has its own engine between.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from backends.engines.base import Engine
from backends.log import Log
from backends.snapshots.absent import NoSnapshots, NoSuspender
from backends.snapshots.base import Snapshots, Suspender
from backends.snapshots.criu import CriuSnapshots
from backends.snapshots.suspend import suspender_of
from proxy.config import Config


def suspenders(config: Config) -> Callable[[Engine], Suspender]:
    """Return what suspends the replicas of an engine."""
    if config.manager.provider != "process":
        return lambda _engine: NoSuspender()
    return suspender_of


def open_snapshots(config: Config, log: Log) -> Snapshots:
    """Return what keeps images; nothing is looked at before a pool wants one."""
    settings = config.manager
    if settings.provider != "process":
        return NoSnapshots()
    folder = settings.snapshot_dir or str(Path(settings.run_dir) / "snapshots")
    return CriuSnapshots(Path(folder), bytes_max=settings.snapshot_bytes_max, tell=log.caution)


def look_ahead(config: Config, engines: Mapping[str, Engine], snapshots: Snapshots) -> None:
    """Ask what may be wanted whether it works; the first answer takes seconds."""
    pools = [pool for model in config.models for pool in model.pools]
    used = {engines[pool.engine] for pool in pools}
    for suspender in {suspenders(config)(engine) for engine in used}:
        suspender.probe()
    if any(pool.snapshot for pool in pools):
        snapshots.probe()
