"""How a life begins here: who and where it is, and in which state a manager before has left it.

Until a cluster has found it a machine, a process has no address: its launch names a host that
nobody can be (`UNPLACED`), so that no stranger at the same port of this machine answers for it.
What it waits for is told meanwhile, by its record as by the log: the cluster may have to get a
machine first.
"""

from __future__ import annotations

import asyncio

import msgspec

from backends.journal import Launch, Placed, Started
from backends.lifecycle import Lifecycle, Phase, adopted
from backends.providers.base import Process
from backends.spec import ReplicaSpec
from backends.starting import moved_to
from backends.surroundings import Surroundings

LOOK_S = 0.5


async def meet(process: Process, launch: Launch, around: Surroundings) -> Launch:
    """Return `launch` with its address, once that is known; ends with the process if it never is.

    The journal has it then, too, for a manager after this one.
    """
    if process.placed is None:
        return launch
    told = ""
    while not process.placed.done():
        if process.waits != told:
            told = process.waits
            around.log.tell("replica_waits", replica=launch.replica_id, waits=told)
            around.changed()
        await asyncio.wait({process.placed}, timeout=LOOK_S)
    host = process.placed.result()
    if host == launch.host:
        return launch
    placed = placed_at(launch, host)
    around.note(Placed(launch.launch_id, placed.host, placed.kv_source))
    around.log.tell("replica_placed", replica=launch.replica_id, host=host)
    return placed


def placed_at(launch: Launch, host: str) -> Launch:
    """Return `launch` as it is at `host`: what it says of loopback is true there alone."""
    source = launch.kv_source
    if source is not None:
        source = moved_to(source[0], host), moved_to(source[1], host), source[2]
    return msgspec.structs.replace(launch, host=host, kv_source=source)


def note_process(launch: Launch, process: Process, around: Surroundings) -> None:
    """Note by what the process of `launch` is known on this machine."""
    boot_id = around.provider.boot_id
    around.note(Started(launch.launch_id, process.pid, process.start_ticks, boot_id))


def as_left(
    launch: Launch, spec: ReplicaSpec, rest: Phase | None, around: Surroundings, *, ready: bool
) -> Lifecycle:
    """Return the state of what a manager before has started."""
    return adopted(
        ready=ready,
        held=launch.held,
        rest=rest,
        starts=launch.starts,
        now_s=around.clock.now_s(),
        timing=around.timing(spec),
    )
