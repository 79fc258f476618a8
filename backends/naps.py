"""Puts an engine to sleep and wakes it, and measures both.

What comes of it is an event for the lifecycle. A sleep that fails is taken back where the engine's
table knows how; where it does not, nobody knows what the engine has let go of, and the answer is
that it broke. Every turn is noted before it begins and after it is done: a manager that dies in
between leaves a replica that its successor starts anew rather than guess. So a turn towards sleep
that cannot be noted does not happen.
"""

from __future__ import annotations

from collections.abc import Callable

from backends.calls import CallFailedError, perform
from backends.engines.base import Engine, FlagError
from backends.journal import Nap
from backends.lifecycle import Event
from backends.spec import ReplicaSpec
from backends.surroundings import Surroundings


class Naps:
    """The sleep of one replica: how deep, and how long the turns took."""

    def __init__(self, engine: Engine, around: Surroundings) -> None:
        self.level = 0  # of the sleep that it is in, or on its way to
        self.asleep = False
        self.sleep_s = 0.0
        self.wake_s = 0.0
        self._engine = engine
        self._around = around

    async def fall_asleep(
        self, launch_id: str, spec: ReplicaSpec, url: str, go_on: Callable[[], bool]
    ) -> tuple[Event, str]:
        """Have it let go of its memory while `go_on()`; return what came of it, and why."""
        began_s = self._around.clock.now_s()
        try:
            calls = self._engine.sleep_calls(spec, self.level)
            self._around.journal.append(Nap(launch_id, self.level, turning=True))
            await perform(calls, url, self._around.fetch, go_on)
            if not go_on():
                return Event.BROKE, "it is not to go on"
        except (FlagError, OSError) as error:
            return Event.BALKED, f"not put to sleep: {error}"
        except CallFailedError as error:
            event, reason = await self._take_back(spec, url, error, go_on)
            if event is Event.BALKED:
                self._around.note(Nap(launch_id, None, turning=False))
            return event, reason
        self.asleep = True
        self.sleep_s = self._around.clock.now_s() - began_s
        self._around.note(Nap(launch_id, self.level, turning=False))
        return Event.SLEPT, f"asleep at level {self.level}, after {self.sleep_s:.2f} s"

    async def _take_back(
        self, spec: ReplicaSpec, url: str, error: CallFailedError, go_on: Callable[[], bool]
    ) -> tuple[Event, str]:
        calls = self._engine.balk_calls(spec, self.level, error.done)
        if calls is None or not go_on():
            return Event.BROKE, f"it broke while it fell asleep: {error}"
        try:
            await perform(calls, url, self._around.fetch, go_on)
        except CallFailedError as second:
            return Event.BROKE, f"it would not sleep: {error}; nor serve again: {second}"
        return Event.BALKED, f"it would not sleep, and serves on: {error}"

    async def wake(
        self, launch_id: str, spec: ReplicaSpec, url: str, go_on: Callable[[], bool]
    ) -> str | None:
        """Have it take its memory back while `go_on()`; return what went wrong, if anything did."""
        began_s = self._around.clock.now_s()
        self._around.note(Nap(launch_id, self.level, turning=True))
        try:
            calls = self._engine.wake_calls(spec, self.level)
            await perform(calls, url, self._around.fetch, go_on)
        except CallFailedError as error:
            return f"it would not wake: {error}"
        if not go_on():
            return "it is not to go on"
        self.asleep = False
        self.wake_s = self._around.clock.now_s() - began_s
        self._around.note(Nap(launch_id, None, turning=False))
        return None
