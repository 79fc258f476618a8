"""The lines of one group of models: from the desk to the proxy, and their answers back.

What may be in flight is the gate's word (`turn`), of this moment. A line that comes out before its
answer does so by the closing of its connection: the proxy then closes that to the engine, which
computes no further. It is done later, by whoever asks first.

Everything is bounded: lines in hand by the gate (twice what may be in flight), octets by
`BYTES_MAX` over all groups, connections by lines in flight.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress

import msgspec

from backends.clock import Alarm, Clock
from backends.log import Log
from backends.offline.answers import Again, Answered, judge
from backends.offline.gate import Verdict
from backends.offline.holds import Held, HeldChunk, Pace
from backends.offline.work import Ask, Desk, Line, Result
from backends.tasks import cancel_all, place_of, spawn

URLS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses")
REPORT_S = 0.5
ASK_WAIT_S = 10.0
ASK_FAILED_S = 2.0
LINES_MIN = 8  # of an ask: fewer are not worth a transaction
LINES_MAX = 2_000
BYTES_MAX = 64 * 1024 * 1024  # of all bodies in hand
REPORT_FAILED_S = 1.0
LAST_REPORT_S = 5.0  # what was not given back by then is when its hold is over
SPARE, SEMI_ONLINE = "spare", "semi-online"  # classes, as the proxy has them

Post = Callable[[Line, str], Awaitable[Answered]]  # a line and its class


class Bytes:
    """The octets of bodies in hand, over all groups."""

    held = 0


class Counts(msgspec.Struct):
    """What came of lines, since the start."""

    results: int = 0
    failures: int = 0  # attempts that count against a line
    turned_back: int = 0  # attempts that found no room
    preempted: int = 0  # that the proxy ended for somebody's sake
    cut: int = 0  # that we ended ourselves, for the same reason
    dropped: int = 0  # answers that nobody wanted any more
    tokens: int = 0


class Sender:
    """One group's lines. `run` owns its time."""

    def __init__(
        self, worker_id: str, desk: Desk, post: Post, held: Bytes, clock: Clock, log: Log
    ) -> None:
        self.names: tuple[str, ...] = ()
        self.counts = Counts()
        self.work_class = SPARE
        self.refused_us = 0.0  # until when: our key is wrong
        self._worker_id = worker_id
        self._desk, self._post, self._bytes = desk, post, held
        self._clock, self._log = clock, log
        self._first = True  # nothing was asked yet
        self._verdict = Verdict(lines=0, keep=0)
        self._pace = Pace()
        self._waiting: deque[Held] = deque()
        self._flying: dict[asyncio.Task[None], Held] = {}  # the youngest last
        self._chunks: dict[str, HeldChunk] = {}
        self._alarm, self._hunger, self._reporting = Alarm(clock), asyncio.Event(), Alarm(clock)

    @property
    def in_flight(self) -> int:
        return len(self._flying)

    @property
    def in_hand(self) -> int:
        return len(self._flying) + len(self._waiting)

    async def run(self) -> None:
        """Ask, send and report until cancelled; then give back what is left."""
        chores = [
            spawn(self._ask_on(), "asking the desk for lines", self._log),
            spawn(self._report_on(), "reporting to the desk", self._log),
        ]
        try:
            while True:
                await self._alarm.wait(self._begin())
        finally:
            await cancel_all([*chores, *self._flying])
            for chunk in list(self._chunks.values()):
                self._give_back(chunk)
            self._waiting.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(LAST_REPORT_S):
                    await self._report(last=True)
            for chunk_id in list(self._chunks):  # not told: its hold runs out
                self._forget(chunk_id)

    def turn(self, verdict: Verdict, work_class: str) -> None:
        """Go by this from now on: send more, or take out what may not stay."""
        self._verdict, self.work_class = verdict, work_class
        for task in list(reversed(self._flying))[: max(0, self.in_flight - verdict.keep)]:
            self.counts.cut += 1
            task.cancel()
        if not verdict.lines and not verdict.keep:
            for chunk in self._chunks.values():
                self._give_back(chunk)
            self._reporting.ring()
        if verdict.lines:
            self._hunger.set()
        self._alarm.ring()

    # --- lines out --------------------------------------------------------------------------------

    def _begin(self) -> float | None:
        """Send what may go now; return when to look again, None: when something happens."""
        now_s = self._clock.now_s()
        if now_s < self.refused_us:
            return self.refused_us - now_s
        for _ in range(len(self._waiting)):
            if self.in_flight >= self._verdict.lines:
                break
            held = self._waiting.popleft()
            if held.gone:
                continue
            if held.not_before_s > now_s:
                self._waiting.append(held)
                continue
            verdict = self._verdict
            tokens_per_s, at_once = verdict.prompt_tokens_per_s, verdict.prompt_tokens_at_once
            if wait_s := self._pace.wait_s(tokens_per_s, at_once, now_s):
                self._waiting.appendleft(held)
                return wait_s
            self._pace.begin(held.prompt_tokens)
            self._send(held)
        if self._hungry():
            self._hunger.set()
        due_s = [held.not_before_s for held in self._waiting if held.not_before_s > now_s]
        return min(due_s) - now_s if due_s and self.in_flight < self._verdict.lines else None

    def _send(self, held: Held) -> None:
        task = spawn(self._do(held), "a line of a job", self._log)
        self._flying[task] = held
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        held = self._flying.pop(task)
        if task.cancelled() and not held.gone:  # cut: it is the next to go, if it is still ours
            self._waiting.appendleft(held)
        self._alarm.ring()

    async def _do(self, held: Held) -> None:
        try:
            answered = await self._post(held.line, self.work_class)
            fate = judge(held.line, answered, held.failures)
        except Exception as error:  # noqa: BLE001 - it has failed: a line that nobody minds never ends
            problem = f"{type(error).__name__}: {error}"
            self._log.fault("line_failed", models=self.names, error=problem, where=place_of(error))
            fate = judge(held.line, Answered(status=0, problem=problem), held.failures)
        if held.gone:
            self.counts.dropped += 1
            return
        if isinstance(fate, Result):
            self._take(held, fate)
        else:
            self._put_off(held, fate)

    def _take(self, held: Held, result: Result) -> None:
        self.counts.results += 1
        self.counts.tokens += result.prompt_tokens + result.completion_tokens
        held.chunk.answer(held, result)
        if not held.chunk.lines:
            self._reporting.ring()

    def _put_off(self, held: Held, again: Again) -> None:
        now_s = self._clock.now_s()
        held.not_before_s = now_s + again.wait_s
        held.failures += again.failed
        self.counts.failures += again.failed
        self.counts.turned_back += again.full
        self.counts.preempted += again.preempted
        if again.refused_us:
            self.refused_us = held.not_before_s
            self._log.caution("lines_refused", models=self.names, problem="the proxy takes no key")
        self._waiting.append(held)

    # --- lines in ---------------------------------------------------------------------------------

    def _hungry(self) -> bool:
        """Say whether more lines are wanted: what may fly soon is to be in hand."""
        most = self._verdict.lines
        return (
            most > 0
            and len(self._waiting) <= most // 4
            and self.in_hand < 2 * most
            and self._bytes.held < BYTES_MAX
        )

    async def _ask_on(self) -> None:
        while True:
            await self._hunger.wait()
            self._hunger.clear()
            if not self._hungry() or not self.names:
                continue
            ask = Ask(
                worker_id=self._worker_id,
                models=self.names,
                urls=URLS,
                lines_max=min(LINES_MAX, max(LINES_MIN, 2 * self._verdict.lines - self.in_hand)),
                bytes_max=max(1, min(BYTES_MAX - self._bytes.held, BYTES_MAX // 4)),
                wait_s=ASK_WAIT_S,
                spare=True,
                first=self._first,
            )
            try:
                chunk = await self._desk.ask(ask)
            except Exception as error:  # noqa: BLE001 - whatever a desk may raise: it is asked again
                self._log.caution("desk_asked_in_vain", problem=f"{type(error).__name__}: {error}")
                await asyncio.sleep(ASK_FAILED_S)
                continue
            self._first = False
            if chunk is not None:
                held = HeldChunk(chunk, self._worker_id, self._clock.now_s())
                self._chunks[chunk.chunk_id] = held
                self._bytes.held += held.body_bytes
                self._waiting.extend(held.lines.values())
                self._alarm.ring()
                self._reporting.ring()
            elif self._verdict.lines:
                self._hunger.set()  # it has waited already

    def _give_back(self, chunk: HeldChunk) -> None:
        for held in list(chunk.lines.values()):
            chunk.give_back(held)
        self._waiting = deque(held for held in self._waiting if not held.gone)

    # --- reports ----------------------------------------------------------------------------------

    async def _report_on(self) -> None:
        while True:
            await self._reporting.wait(REPORT_S if self._chunks else None)
            await self._report()

    async def _report(self, *, last: bool = False) -> None:
        for chunk_id, chunk in list(self._chunks.items()):
            now_s = self._clock.now_s()
            if chunk.over(now_s) and chunk.failures:
                self._log.caution("chunk_lost", models=self.names, chunk=chunk_id)
                chunk.lose()
                self._forget(chunk_id)
                self._let_go()
            elif last or chunk.due(now_s):
                await self._tell(chunk_id, chunk, now_s)

    async def _tell(self, chunk_id: str, chunk: HeldChunk, now_s: float) -> None:
        """Report all that there is, in as many reports as it takes."""
        while chunk_id in self._chunks:
            report = chunk.report()
            try:
                receipt = await self._desk.report(report)
            except Exception as error:  # noqa: BLE001 - as above; the same report is sent again
                chunk.failures += 1
                chunk.retry_s = now_s + REPORT_FAILED_S
                problem = f"{type(error).__name__}: {error}"
                self._log.caution("desk_report_failed", models=self.names, problem=problem)
                return
            if not chunk.heard(report, receipt, now_s):
                self._forget(chunk_id)
            elif not chunk.unsaid:
                break
        self._let_go()

    def _forget(self, chunk_id: str) -> None:
        """It is not ours any more: what still flies of it is for nobody."""
        chunk = self._chunks.pop(chunk_id)
        self._bytes.held -= chunk.body_bytes

    def _let_go(self) -> None:
        """End what is for nobody: of lost chunks, of jobs that were cancelled."""
        for task, held in self._flying.items():
            if held.gone:
                task.cancel()
        self._waiting = deque(held for held in self._waiting if not held.gone)
        self._alarm.ring()


def verdict_when_moved_up(lines_max: int) -> Verdict:
    """Return what may be in flight of lines that have moved up: the proxy has them wait."""
    return Verdict(
        lines=lines_max, keep=2**31, prompt_tokens_per_s=math.inf, reason="moved up: due soon"
    )
