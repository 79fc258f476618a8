"""What a start needs before there is a process: GPUs, ports, a command and an environment.

Everything that can be found wrong without starting anything is found here, in the order of what it
costs: arguments that the engine would refuse, a program that is not installed, cards and ports that
are not to be had.
"""

from __future__ import annotations

import os
import uuid
from typing import NamedTuple

import msgspec

from backends.cards import Placement
from backends.engines.base import (
    HOST,
    Engine,
    EngineMissingError,
    FlagError,
    Ports,
    launch_hash,
)
from backends.engines.files import CACHES
from backends.engines.probe import Program, can_trace, completed
from backends.engines.release import UNKNOWN_RELEASE, Release
from backends.gpus import NoGpuError
from backends.journal import Launch
from backends.lifecycle import Lifecycle
from backends.loras import of_start
from backends.ports import NoPortError, ReplicaPorts, cell_ports
from backends.snapshots.base import Snapshot, Snapshots
from backends.spec import ReplicaSpec
from backends.warm import Warmer
from backends.weights import files_read
from proxy import systemd

_NO_TRACES = (
    "{engine}: traces end at the proxy: opentelemetry-exporter-otlp-proto-http is not installed "
    "beside it"
)
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
    launch_id: str
    gpus: tuple[str, ...] = ()
    host: str = HOST  # where this machine reaches it
    restored: bool = False  # from an image
    image_of: str = ""  # what an image made of it would be an image of; empty: none can be made
    rid_header: bool = False  # it takes a chat request's id from a field of the head
    priority_fields: tuple[str, ...] = ()  # of the head, by class


def gpus_wanted(engine: Engine, spec: ReplicaSpec) -> int:
    """Return how many cards a start takes: what the pool says, else what the arguments ask for."""
    return engine.gpus_needed(spec) if spec.gpus is None else spec.gpus


def gpus_leased(engine: Engine, spec: ReplicaSpec) -> int:
    """Return how many of them are leased: none where it names what else its node must have.

    Only the cluster knows which nodes those are, and it may have to get one first.
    """
    return 0 if spec.resources else gpus_wanted(engine, spec)


def prepare(
    engine: Engine,
    spec: ReplicaSpec,
    ports: ReplicaPorts,
    program: Program,
    release: Release,
    placement: Placement,
) -> Start:
    """Return how to start `spec` by `program` of `release`. Raises one of `START_ERRORS`."""
    leased = ports.take(engine.ports_needed(spec, release))
    start = _start(engine, spec, leased, program, release, placement)
    further = {kind: run for kind, run in ports.runs.items() if kind != "http"}
    return start._replace(further_ports=further, host=ports.host)


def enclosed(
    engine: Engine,
    spec: ReplicaSpec,
    program: Program,
    release: Release,
    placement: Placement,
    *,
    snapshots: Snapshots,
    found: Snapshot | None,
) -> Start:
    """Return how to start it in a cell, or as a copy of the image that was `found`.

    Its ports are the same in every cell, so none is leased. Raises `SnapshotError`, too.
    """
    leased = cell_ports(engine.ports_needed(spec, release))
    start = _start(engine, spec, leased, program, release, placement)
    if found is None:
        cell = snapshots.enclose(start.launch_id, start.argv)
    else:
        cell = snapshots.restore(found, start.launch_id)
    source = start.kv_source
    if source is not None:
        source = moved_to(source[0], cell.host), moved_to(source[1], cell.host), source[2]
    return start._replace(
        argv=cell.argv,
        host=cell.host,
        port=leased.http if found is None else found.port,
        kv_source=source,
        restored=found is not None,
    )


def moved_to(url: str, host: str) -> str:
    """Return an address of this machine's loopback as it is in a cell at `host`."""
    return url.replace(f"//{HOST}:", f"//{host}:", 1)


def _start(
    engine: Engine,
    spec: ReplicaSpec,
    leased: Ports,
    program: Program,
    release: Release,
    placement: Placement,
) -> Start:
    warnings = engine.check(spec, release)
    if spec.traces_url and engine.uses_gpu and not can_trace(program):
        spec = msgspec.structs.replace(spec, traces_url="")
        warnings += (_NO_TRACES.format(engine=engine.name),)
    ours = systemd.without(os.environ) if program.inherits is None else dict(program.inherits)
    ours = ours | placement.environment
    command = engine.command(spec, leased, release)
    argv, environ = completed(program, command, spec, ours)
    source = engine.kv_source(spec, leased, release)
    return Start(
        argv=placement.prefix + argv,
        environ=environ,
        port=leased.http,
        further_ports={},
        engine_version=str(release) if release != UNKNOWN_RELEASE else "",
        kv_source=None if source is None else (source.endpoint, source.replay, source.topic),
        warnings=warnings,
        launch_id=uuid.uuid4().hex,
        gpus=placement.devices,
        rid_header=command.rid_header,
        priority_fields=command.priority_fields,
    )


def warm_up(warmer: Warmer, spec: ReplicaSpec, start: Start) -> None:
    """Have what this start reads read into memory beside it: its programs first, weights last."""
    if spec.engine in CACHES:
        if start.engine_version:
            warmer.ahead(f"{spec.engine} {start.engine_version}", start.environ)
        what = f"{spec.engine} {spec.model_path or spec.model}"
        warmer.warm(what, lambda: files_read(spec, start.environ))


def intent(
    engine: Engine, spec: ReplicaSpec, start: Start, state: Lifecycle, at_s: float
) -> Launch:
    """Return what the journal keeps of a start: all that a later manager must know of it."""
    return Launch(
        launch_id=start.launch_id,
        replica_id=spec.replica_id,
        launch_hash=launch_hash(engine, spec),
        engine=engine.name,
        model=spec.model,
        pool=spec.pool,
        port=start.port,
        host=start.host,
        staged=start.restored,
        stop_grace_s=spec.stop_grace_s,
        starts=state.starts,
        at_s=at_s,
        held=state.held,
        ports=start.further_ports,
        engine_version=start.engine_version,
        kv_source=start.kv_source,
        rid_header=start.rid_header,
        priority_fields=start.priority_fields,
        gpus=start.gpus,
        loras=of_start(engine, spec),
        image_of=start.image_of,
        image=spec.image,
        gpus_wanted=gpus_wanted(engine, spec),
        resources=spec.resources,
    )
