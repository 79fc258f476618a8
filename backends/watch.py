"""Asks one life of an engine, from its first answer to its end: is it ready, how busy is it?

Busy is not dead. A dead process is noticed at once, by its exit. A process that lives and gives no
answer is left alone for `SILENCE_S_MAX`: a long prefill, a compilation or a page of swap looks just
the same from outside, and a restart costs minutes and the whole cache.

One that sleeps is asked whether it is there, by the path that tells readiness, and nothing more:
its scheduler is not to be disturbed, and there is nothing to know. One that is suspended is asked
nothing: it stands still.

It is drained when it says that it is idle and no proxy says that it has a request on it. A proxy
counts a request that it has bound and not sent yet, which the engine cannot know of; where no proxy
reports, the engine's word is all there is. An engine worker is not waited for at all: it gives back
what it has not done.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from backends.clock import Alarm
from backends.lifecycle import SERVING, Event, Phase
from backends.questions import Questions
from backends.surroundings import Surroundings
from proxy.contract import LoadSample

SILENCE_S_MAX = 300.0
READY_POLL_S = (0.05, 1.0)  # the first pause between readiness probes, and the longest
DRAIN_POLL_S = 0.25
IDLE_S = 0.2  # a request that left a proxy before it heard of the drain shows by then


class Told(Protocol):
    """Who hears what has been found out."""

    def apply(self, event: Event, reason: str = "") -> None: ...

    async def ripen(self) -> bool:
        """Do what is to be done before it is ready; say whether it is to be asked again."""

    def answered(self) -> None:
        """It is ready."""


class Watch:
    """The questions to one life; `phase()` is None once it is over."""

    def __init__(
        self,
        questions: Questions,
        around: Surroundings,
        told: Told,
        phase: Callable[[], Phase | None],
    ) -> None:
        self._questions = questions
        self._around = around
        self._told = told
        self._phase = phase
        self._alarm = Alarm(around.clock)
        self._silent_since_s: float | None = None
        self._idle_since_s: float | None = None

    def ring(self) -> None:
        """Something has changed: look again now."""
        self._alarm.ring()

    async def follow(self) -> None:
        """Ask until this life is over."""
        await self.until_ready(Phase.STARTING, self._alarm)
        while (phase := self._phase()) is not None:
            if phase is Phase.ASLEEP:
                self._note_silence(answered=(await self._questions.probe()).status > 0)
                await self._alarm.wait(self._around.scrape_interval_s)
            elif phase in SERVING:
                await self._ask()
            else:
                self._silent_since_s = None  # nobody asks, so no silence means anything
                await self._alarm.wait(None)

    async def until_ready(self, during: Phase, alarm: Alarm | None = None) -> None:
        """Ask whether it is ready while it is in this phase, and tell when it is."""
        alarm = alarm or Alarm(self._around.clock)
        poll_s, poll_s_max = READY_POLL_S
        while self._phase() is during:
            answer = await self._questions.probe()
            if answer.status == 200 and self._phase() is during:
                if during is Phase.STARTING and await self._told.ripen():
                    continue
                # Its names and its load, so that it enters the fleet complete.
                await self._questions.list()
                await self._questions.read()
                if self._phase() is during:
                    self._told.answered()
                return
            await alarm.wait(poll_s)
            poll_s = min(poll_s * 1.5, poll_s_max)

    async def _ask(self) -> None:
        if self._phase() is Phase.DRAINING and self._questions.gives_back:
            self._told.apply(Event.IDLE)
            return
        if self._questions.listing_due:
            await self._questions.list()
        answered, load = await self._questions.read()
        phase = self._phase()
        if phase is None:
            return
        if load is not None:
            self._around.changed()
        self._note_silence(answered=answered)
        emptying = phase in {Phase.DRAINING, Phase.EMPTYING}
        if self._stays_idle(load if emptying else None):
            then = "; it goes to rest" if phase is Phase.EMPTYING else ""
            self._told.apply(Event.IDLE, f"drained{then}")
        else:
            await self._alarm.wait(DRAIN_POLL_S if emptying else self._around.scrape_interval_s)

    def _stays_idle(self, load: LoadSample | None) -> bool:
        now_s = self._around.clock.now_s()
        self._around.demand.expire(now_s)  # a proxy that is gone has nothing here
        theirs = self._around.demand.in_flight(self._questions.spec.replica_id)
        if load is None or load.running or load.waiting or theirs:
            self._idle_since_s = None
            return False
        if self._idle_since_s is None:
            self._idle_since_s = now_s
        return now_s - self._idle_since_s >= IDLE_S

    def _note_silence(self, *, answered: bool) -> None:
        """Count the time without any answer; too much of it ends this life."""
        now_s = self._around.clock.now_s()
        if answered:
            self._silent_since_s = None
        elif self._silent_since_s is None:
            self._silent_since_s = now_s
        elif now_s - self._silent_since_s >= SILENCE_S_MAX and self._phase() is not None:
            self._told.apply(Event.UNRESPONSIVE, f"no answer for {SILENCE_S_MAX:.0f} s")
