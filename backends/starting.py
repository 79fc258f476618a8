"""What a start needs before there is a process: GPUs, ports, a command and an environment.

Everything that can be found wrong without starting anything is found here, in the order of what it
costs: arguments that the engine would refuse, a program that is not installed, cards and ports that
are not to be had.
"""

from __future__ import annotations

import os
import uuid
from typing import NamedTuple

from backends.cards import Placement
from backends.engines.base import Engine, EngineMissingError, FlagError, launch_hash
from backends.engines.files import CACHES
from backends.engines.probe import Program, completed
from backends.engines.release import UNKNOWN_RELEASE, Release
from backends.gpus import NoGpuError
from backends.journal import Launch
from backends.lifecycle import Lifecycle
from backends.loras import of_start
from backends.ports import NoPortError, ReplicaPorts
from backends.spec import ReplicaSpec
from backends.warm import Warmer
from backends.weights import files_read

# Why a start may not come about, each with words for a person.
START_ERRORS = (OSError, EngineMissingError, FlagError, NoGpuError, NoPortError)


class Start(NamedTuple):
    """A process to be."""

    argv: tuple[str, ...]
    environ: dict[str, str]
    port: int
    further_ports: dict[str, tuple[int, int]]  # what for: the first, and how many
    kv_source: tuple[str, str, str] | None  # endpoint, replay endpoint and topic
    engine_version: str
    warnings: tuple[str, ...]
    gpus: tuple[str, ...] = ()


def gpus_wanted(engine: Engine, spec: ReplicaSpec) -> int:
    """Return how many cards a start takes: what the pool says, else what the arguments ask for."""
    return engine.gpus_needed(spec) if spec.gpus is None else spec.gpus


def prepare(
    engine: Engine,
    spec: ReplicaSpec,
    ports: ReplicaPorts,
    program: Program,
    release: Release,
    placement: Placement,
) -> Start:
    """Return how to start `spec` by `program` of `release`. Raises one of `START_ERRORS`."""
    warnings = engine.check(spec, release)
    leased = ports.take(engine.ports_needed(spec, release))
    ours = os.environ if program.inherits is None else dict(program.inherits)
    ours = ours | placement.environment
    argv, environ = completed(program, engine.command(spec, leased, release), spec, ours)
    source = engine.kv_source(spec, leased, release)
    return Start(
        argv=placement.prefix + argv,
        environ=environ,
        port=leased.http,
        further_ports={kind: run for kind, run in ports.runs.items() if kind != "http"},
        engine_version=str(release) if release != UNKNOWN_RELEASE else "",
        kv_source=None if source is None else (source.endpoint, source.replay, source.topic),
        warnings=warnings,
        gpus=placement.devices,
    )


def warm_up(warmer: Warmer, spec: ReplicaSpec, start: Start) -> None:
    """Have what this start reads read into memory beside it."""
    if spec.engine in CACHES:
        what = f"{spec.engine} {spec.model_path or spec.model}"
        warmer.warm(what, lambda: files_read(spec, start.environ))


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
        gpus=start.gpus,
        loras=of_start(engine, spec),
        image=spec.image,
    )
