"""Images of a replica that serves already: by an operator's wish, or because its start had to wait.

At its start a replica is made into an image unless one of another is being made; then it serves
without, and is made into one as soon as it has nothing to do. An operator may wish one of any that
runs in a cell. It is drained first, like one that is to sleep, stands aside for as long as the dump
takes, and serves on, whatever comes of it. Those who count replicas take it for one that comes.

What it has answered may then be in its memory, and so in the image: it is kept like the secrets
that are in every image.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress

from backends.clock import Alarm
from backends.engines.base import Engine
from backends.engines.release import UNKNOWN_RELEASE
from backends.images import Images, key_of
from backends.journal import Launch
from backends.lifecycle import Event, Phase
from backends.loras import of_start
from backends.questions import Questions
from backends.reconcile import Observed
from backends.snapshots.base import Progress
from backends.surroundings import Surroundings
from backends.turns import Life, RefusedError

POLL_S = 5.0  # between looks whether one that waits for its image has nothing to do
_AWAY = frozenset({Phase.EMPTYING, Phase.FALLING_ASLEEP})  # phases of one that was ready
_BUSY = "an image of another replica is being made"


class Posing:
    """What makes an image of one replica that was ready."""

    def __init__(
        self, engine: Engine, around: Surroundings, images: Images, questions: Questions
    ) -> None:
        self.wished = False
        self._adopted: Launch | None = None  # of whose image the key is not known yet
        self._engine = engine
        self._around = around
        self._images = images
        self._questions = questions

    def adopt(self, launch: Launch) -> None:
        """Take over a life of the manager before: its key is found out when it is needed."""
        self._adopted = launch if launch.image_of else None

    def wish(self, seen: Observed, spec_hash: str) -> None:
        """Have an image made of it once it has drained. Raises `RefusedError`."""
        if seen.phase not in {Phase.READY, Phase.HELD}:
            raise RefusedError(f"it is {seen.phase.words}; only what is ready can be made into one")
        anew = seen.launch_hash != spec_hash or seen.adapting
        if anew or seen.loaded != of_start(self._engine, seen.spec):
            raise RefusedError("it is not what its pool's command starts; restart it first")
        if self._images.key is None and self._adopted is None:
            why = self._around.snapshots.probe().reason
            raise RefusedError(
                "it does not run in a cell, so no image can be made of it: its pool needs "
                f"`snapshot: true` before it starts, and snapshots have to work here ({why})"
            )
        if self._around.shelf.making:
            raise RefusedError(f"{_BUSY}; ask again later")
        self.wished, self._images.progress = True, Progress("draining")

    def follow(self, phase: Phase) -> None:
        """Its phase has changed: one that was called back is not made into an image."""
        if phase in {Phase.STARTING, Phase.BACKOFF, Phase.STOPPED}:  # another life
            self._adopted = None
        if self.wished and phase not in _AWAY:
            self.wished = False
            if self._images.progress.doing:
                self._images.progress = Progress(problem=f"it was {phase.words} before that")

    async def pose(self, life: Life) -> tuple[Event, str]:
        """Make an image of one that has drained; return what comes of it.

        One that has requests left in spite of its time to drain keeps them.
        """
        if not self.idle:
            return self._in_vain("its requests did not end in time")
        if self._images.key is None and not await self._find_key(life):
            return self._in_vain("its model or its command is not what it was started with")
        if self._around.shelf.making:
            return self._in_vain(_BUSY)
        problem = await self._images.make(life)
        if problem is not None:
            return problem
        made = self._images.progress
        if made.problem:
            return self._in_vain(made.problem)
        size = f"{made.image_bytes / (1 << 20):.0f} MiB"
        return Event.BALKED, f"image {made.snapshot} was made of it, {size}"

    async def later(self, current: Callable[[], Phase | None], pose: Callable[[str], None]) -> None:
        """Wish the image that is lacking once it has nothing to do; `current`: None at its end."""
        alarm = Alarm(self._around.clock)
        while (phase := current()) is not None and self._images.lacking:
            if phase is Phase.READY and self._images.due and self.idle:
                with suppress(RefusedError):
                    pose("the image is made that another's was in the way of")
                return
            await alarm.wait(POLL_S)

    @property
    def idle(self) -> bool:
        """Say whether it has nothing to do, by its own word and the proxies'."""
        questions = self._questions
        theirs = self._around.demand.in_flight(questions.spec.replica_id)
        load = questions.load
        return load is not None and not (load.running or load.waiting or theirs)

    def _in_vain(self, reason: str) -> tuple[Event, str]:
        self._images.progress = Progress(problem=reason)
        return Event.BALKED, f"no image was made of it: {reason}"

    async def _find_key(self, life: Life) -> bool:
        """Find out what a life of the manager before is, and whether it still is that."""
        launch = self._adopted
        assert launch is not None
        release = launch.engine_version or str(UNKNOWN_RELEASE)
        cards = self._around.cards.described(launch.gpus)
        key = await asyncio.to_thread(key_of, self._engine, life.spec, release, cards)
        if key.launch_hash == launch.image_of:
            self._images.take_key(key, launch.port)
        return self._images.key is not None
