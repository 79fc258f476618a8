"""Has one life of an engine load and unload LoRA adapters while it serves.

A change is noted before it begins and after it is done, as a sleep is: a manager that dies in
between leaves a replica that its successor starts anew. The same follows from a call that fails:
what the engine has then is not what anybody asked for, and a start with the new command says
whether it can be had at all. That start is the reconciler's, one replica of a pool at a time, so an
adapter that cannot be loaded takes down one replica and not the model.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from backends.adapters import Loaded, after
from backends.calls import CallFailedError, perform
from backends.engines.base import Engine
from backends.journal import Adapted, Launch
from backends.spec import ReplicaSpec
from backends.surroundings import Surroundings


class Loras:
    """The adapters of one life."""

    def __init__(self, launch: Launch, engine: Engine, around: Surroundings) -> None:
        self.loaded = launch.loras
        self.changing = False
        self._launch_id = launch.launch_id
        self._engine = engine
        self._around = around

    async def change(self, spec: ReplicaSpec, url: str, go_on: Callable[[], bool]) -> None:
        """Make what is loaded what `spec` wants while `go_on()`, or unknown when a call fails."""
        before = self.loaded
        calls = self._engine.adapter_calls(spec, before.paths, spec.adapters)
        unknown = msgspec.structs.replace(before, settled=False)
        log, replica = self._around.log, spec.replica_id
        self._around.note(Adapted(self._launch_id, unknown))
        try:
            await perform(calls, url, self._around.fetch, go_on)
        except CallFailedError as error:
            self.loaded, self.changing = unknown, False
            if go_on():  # what ended meanwhile is no failure of the call
                why = f"its adapters were not changed, so it is to be started anew: {error}"
                log.tell("replica_adapters_failed", replica=replica, reason=why)
            return
        once = self._engine.facts(spec).adapter_names_once
        self.loaded, self.changing = after(before, spec.adapters, names_once=once), False
        self._around.note(Adapted(self._launch_id, self.loaded))
        done = [call.why for call in calls]
        log.tell("replica_adapters_changed", replica=replica, calls=done)


def of_start(engine: Engine, spec: ReplicaSpec) -> Loaded:
    """Return what a process has that is started by the command of `spec`."""
    facts = engine.facts(spec)
    room = facts.adapters_at_run_time and bool(spec.adapters)
    return after(Loaded(room=room), spec.adapters, names_once=facts.adapter_names_once)
