"""The life of an engine worker: ask for lines, have them done, tell what came of them.

Three things go on side by side. One asks whenever too little is in hand, so that the engine never
runs dry between two chunks; one tells, which also renews the holds; and each line is a task of its
own, which waits for the engine. The ends:

- told to stop: lines are given up, what is done is told, the rest goes back, exit 0;
- the engine is dead: what is done is told, the rest is NOT given back, exit 1. The desk must see
  that it was not done: a line that kills engines is found by that;
- the desk is lost: what is in hand is computed on and told once it is back, under the old fence.
  A desk that was away has given nothing to others and takes it all; what it did give to others,
  because only the way to it was lost, is dropped at its word and at no sooner time: there was
  nothing else to compute meanwhile, since nobody could be asked for it;
- the desk refuses (a wrong key): exit 1 with its word.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

from backends.clock import Alarm, Clock
from backends.log import Log
from backends.offline.desk_client import DeskLostError, DeskRefusedError, RemoteDesk
from backends.offline.doing import RESULT_BYTES_MAX, HeldChunk, HeldLine, Holdings
from backends.offline.line_engine import EngineError, LineEngine, error_result
from backends.offline.work import Ask, Chunk
from backends.offline.worker_meters import Meters
from backends.tasks import cancel_all, spawn

ASK_WAIT_S = 20.0
EMPTY_PAUSE_S = 0.5  # after a desk that answered "nothing" without waiting
REPORT_PATIENCE_S = 5.0  # then the chunk that lapses first has its turn again
LOOK_S = 1.0  # at most between two looks at what is due
STOP_S = 5.0  # to give back what is in hand
DEATH_OR_STOP_S = 0.5  # within which a signal explains the engine's end
FEED_LINES = 32  # started at a time; between them others of this process get their turn


class Worker:
    """One engine, one desk."""

    def __init__(
        self,
        engine: LineEngine,
        desk: RemoteDesk,
        worker_id: str,
        chunk_lines: int,
        clock: Clock,
        log: Log,
    ) -> None:
        self._engine = engine
        self._desk = desk
        self._worker_id = worker_id
        self._chunk_lines = chunk_lines
        self._clock = clock
        self._log = log
        # Half as much again as it computes at once: the queue that stands while the next chunk
        # comes. A chunk of any size is more than that lasts.
        self.holdings = Holdings(worker_id, engine.sequences_max * 3 // 2)
        self.meters = Meters()
        self._tasks: dict[HeldLine, asyncio.Task[None]] = {}
        self._hungry = asyncio.Event()
        self._hungry.set()
        self._urgent = Alarm(clock)
        self._refused: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._lost = False
        self._first = True  # nothing was asked yet

    async def run(self, stop: asyncio.Event) -> int:
        """Work until `stop` (0), the engine's death or the desk's refusal (1)."""
        going = [
            spawn(self._ask_on(), "ask", self._log),
            spawn(self._tell_on(), "tell", self._log),
        ]
        stopping = asyncio.ensure_future(stop.wait())
        ends: list[asyncio.Future[Any]] = [stopping, self._engine.dead, self._refused, *going]
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        if self._engine.dead.done():
            # Who stops a group of processes stops the engine's own ones in the same moment.
            await asyncio.wait((stopping,), timeout=DEATH_OR_STOP_S)
        stopping.cancel()
        await cancel_all(going)
        await self._give_up(self._tasks)
        return await self._end(stopped=stop.is_set())

    async def _end(self, *, stopped: bool) -> int:
        dead = self._engine.dead.done() and not stopped
        if self._refused.done():
            self._log.fault("desk_refused", why=self._refused.result())
            return 1
        if dead:
            self._log.fault("engine_died", why=self._engine.dead.result())
        try:
            async with asyncio.timeout(STOP_S):
                for chunk in self.holdings.all():
                    await self._tell_last(chunk, give_back=not dead)
        except TimeoutError:
            self._log.caution("not_told", chunks=len(self.holdings))
        return 0 if stopped else 1

    # --- asking --------------------------------------------------------------------------------

    async def _ask_on(self) -> None:
        while True:
            await self._hungry.wait()
            asked_s = self._clock.now_s()
            try:
                chunk = await self._desk.ask(self._ask())
            except DeskLostError as error:
                self._note_lost(str(error))
                continue
            except DeskRefusedError as error:
                self._refuse(str(error))
                return
            self._note_found()
            self._first = False
            if chunk is not None and chunk.lines:
                await self._begin(chunk)
            elif self._clock.now_s() - asked_s < EMPTY_PAUSE_S:
                await asyncio.sleep(EMPTY_PAUSE_S)

    def _ask(self) -> Ask:
        return Ask(
            worker_id=self._worker_id,
            models=self._engine.models,
            urls=self._engine.urls,
            lines_max=self._chunk_lines,
            wait_s=0.0 if self._first else ASK_WAIT_S,
            first=self._first,
        )

    async def _begin(self, chunk: Chunk) -> None:
        lines = self.holdings.take(chunk, self._clock.now_s())
        self._urgent.ring()  # its hold may have to be renewed before the next look
        self._look_round()
        while chunk.alone and self._tasks:  # until what was in hand before is done
            await asyncio.wait(self._tasks.values())
        for index, held in enumerate(lines):
            if held not in held.chunk.undone:  # dropped while we were at it
                continue
            self._tasks[held] = spawn(self._do(held), "line", self._log)
            if index % FEED_LINES == FEED_LINES - 1:
                await asyncio.sleep(0)

    # --- doing ---------------------------------------------------------------------------------

    async def _do(self, held: HeldLine) -> None:
        line = held.line
        try:
            result = await self._engine.do(line)
        except EngineError:
            return  # `dead` tells
        except Exception as error:  # noqa: BLE001  # of one line: no other may suffer from it
            what = f"{type(error).__name__}: {error}"
            self._log.fault("line_failed", job=line.job_id, number=line.number, error=what)
            result = error_result(line, 500, what)
        finally:
            self._tasks.pop(held, None)
        if len(bytes(result.body)) > RESULT_BYTES_MAX:
            result = error_result(line, 500, f"the answer has more than {RESULT_BYTES_MAX} bytes")
        self.meters.finish(result, self._clock.now_s())
        if self.holdings.finish(held, result):
            self._urgent.ring()
        self._look_round()

    def _look_round(self) -> None:
        """See what follows from what is in hand now."""
        now_s = self._clock.now_s()
        self.meters.note_busy(busy=bool(self._tasks), gpus=self._engine.gpus, now_s=now_s)
        if self.holdings.wants_more():
            self._hungry.set()
        else:
            self._hungry.clear()

    async def _give_up(self, lines: Iterable[HeldLine]) -> None:
        """End the tasks of lines that are not ours any more."""
        tasks = [task for held in list(lines) if (task := self._tasks.get(held)) is not None]
        await cancel_all(tasks)
        self._look_round()

    # --- telling -------------------------------------------------------------------------------

    async def _tell_on(self) -> None:
        while True:
            due_s = self.holdings.next_due_s()
            delay_s = LOOK_S if due_s is None else due_s - self._clock.now_s()
            if delay_s > 0:
                await self._urgent.wait(min(LOOK_S, delay_s))
            for chunk in self.holdings.due(self._clock.now_s()):
                if not await self._tell(chunk, give_back=False):
                    break

    async def _tell(self, chunk: HeldChunk, *, give_back: bool) -> bool:
        """Report on one chunk; return whether the desk answered."""
        sent_s = self._clock.now_s()
        self._look_round()
        busy_s = self.meters.take_busy_s()
        report = self.holdings.report(chunk, busy_s, give_back=give_back)
        try:
            receipt = await self._desk.report(report, REPORT_PATIENCE_S)
        except DeskLostError as error:
            self.meters.untake_busy_s(busy_s)
            self._note_lost(str(error))
            return False
        except DeskRefusedError as error:
            self._refuse(str(error))
            return False
        self._note_found()
        unwanted = self.holdings.told(chunk, report, receipt, sent_s)
        self.meters.lines["given_back" if give_back else "lost"] += len(unwanted)
        if not receipt.held:
            self._log.caution("fence_lost", chunk=chunk.chunk_id, lines=len(unwanted))
        await self._give_up(unwanted)
        return True

    async def _tell_last(self, chunk: HeldChunk, *, give_back: bool) -> None:
        """Report on a chunk until all of it is told."""
        while chunk in self.holdings.all() and (chunk.untold or give_back):
            if not await self._tell(chunk, give_back=give_back) and self._refused.done():
                return

    # --- the desk ------------------------------------------------------------------------------

    def _refuse(self, why: str) -> None:
        if not self._refused.done():
            self._refused.set_result(why)

    def _note_lost(self, why: str) -> None:
        self.meters.desk_failures += 1
        if not self._lost:
            self._log.caution("desk_lost", why=why)
        self._lost = True

    def _note_found(self) -> None:
        if self._lost:
            self._log.tell("desk_found")
        self._lost = False
