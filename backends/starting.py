"""What a start of a replica needs before there is a process: ports, a command, an environment.

Everything that can be found wrong without starting anything is found here, in the order of what it
costs: arguments that the engine would refuse, a program that is not installed, ports that are not
to be had.
"""

from __future__ import annotations

import os
import uuid
from typing import NamedTuple

from backends.engines.base import Engine, EngineMissingError, FlagError, launch_hash
from backends.engines.probe import Program, completed
from backends.engines.release import UNKNOWN_RELEASE, Release
from backends.journal import Launch
from backends.lifecycle import Lifecycle
from backends.ports import NoPortError, ReplicaPorts
from backends.spec import ReplicaSpec

# Why a start may not come about, each with words for a person.
START_ERRORS = (OSError, EngineMissingError, FlagError, NoPortError)


class Start(NamedTuple):
    """A process to be."""

    argv: tuple[str, ...]
    environ: dict[str, str]
    port: int
    further_ports: dict[str, tuple[int, int]]  # what for: the first, and how many
    kv_source: tuple[str, str, str] | None  # endpoint, replay endpoint and topic
    engine_version: str
    warnings: tuple[str, ...]


def prepare(
    engine: Engine, spec: ReplicaSpec, ports: ReplicaPorts, program: Program, release: Release
) -> Start:
    """Return how to start `spec` by `program` of `release`. Raises one of `START_ERRORS`."""
    warnings = engine.check(spec, release)
    leased = ports.take(engine.ports_needed(spec, release))
    argv, environ = completed(program, engine.command(spec, leased, release), spec, os.environ)
    source = engine.kv_source(spec, leased, release)
    return Start(
        argv=argv,
        environ=environ,
        port=leased.http,
        further_ports={kind: run for kind, run in ports.runs.items() if kind != "http"},
        engine_version=str(release) if release != UNKNOWN_RELEASE else "",
        kv_source=None if source is None else (source.endpoint, source.replay, source.topic),
        warnings=warnings,
    )


def intent(
    engine: Engine, spec: ReplicaSpec, start: Start, state: Lifecycle, at_s: float
) -> Launch:
    """Return what the journal keeps of a start: all that a later manager must know of it."""
    return Launch(
        launch_id=uuid.uuid4().hex,
        replica_id=spec.replica_id,
        launch_hash=launch_hash(engine, spec),
        engine=engine.name,
        model=spec.model,
        pool=spec.pool,
        port=start.port,
        stop_grace_s=spec.stop_grace_s,
        starts=state.starts,
        at_s=at_s,
        held=state.held,
        ports=start.further_ports,
        engine_version=start.engine_version,
        kv_source=start.kv_source,
    )
